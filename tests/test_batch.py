"""PackedBatch: counts and offsets follow from the lengths, and every tensor moves."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from anycontrast_datasets.batch import PackedBatch


@pytest.fixture
def batch() -> PackedBatch:
    lengths, volume_lengths = (5, 3), (2, 3, 3)
    return PackedBatch(
        codes_B=torch.arange(3 * 6, dtype=torch.int16),
        volume_start_V=torch.tensor([0, 6, 12]),
        volume_shape_V3=torch.tensor([[1, 1, 6]] * 3),
        flip_V3=torch.zeros(3, 3, dtype=torch.bool),
        volume_T=torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]),
        position_mm_T3=torch.zeros(8, 3),
        grid_T3=torch.zeros(8, 3, dtype=torch.int64),
        intensity_V4=torch.zeros(3, 4),
        contrast_V=torch.tensor([1, 5, 1]),
        descriptor_VK=torch.zeros(3, 6),
        study_V=torch.tensor([0, 0, 1]),
        cu_seqlens=torch.tensor([0, 5, 8], dtype=torch.int32),
        lengths=lengths,
        volume_lengths=volume_lengths,
        study_ids=("a", "b"),
        epochs=(0, 0),
        contrasts=(("T1w", "FLAIR"), ("T1w",)),
        patch_grids=((1, 1, 3), (1, 1, 3)),
        patch_vox=(1, 1, 2),
        spacing_mm=((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        labels=(torch.ones(1, 1, 6, dtype=torch.uint8), None),
    )


def test_counts_and_offsets_follow_from_the_lengths(batch: PackedBatch) -> None:
    assert (batch.num_tokens, batch.num_studies, batch.num_volumes) == (8, 2, 3)
    assert batch.offsets == tuple(batch.cu_seqlens.tolist()) == (0, 5, 8)
    assert batch.volume_offsets == (0, 2, 5, 8)


def test_every_tensor_moves_and_the_host_side_stays(batch: PackedBatch) -> None:
    moved = batch.to("meta")
    tensors = [f.name for f in fields(moved) if isinstance(getattr(moved, f.name), Tensor)]
    assert len(tensors) == 12
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert moved.labels[0] is not None
    assert moved.labels[0].device.type == "meta"
    assert moved.labels[1] is None
    assert (moved.lengths, moved.study_ids) == (batch.lengths, batch.study_ids)
    assert batch.codes_B.device.type == "cpu"
