"""The tables beside the codes of a PackedBatch, from the patches kept of every volume.

In: per study its record, grid and kept patches. Out: the batch: which volume, place and study every
token belongs to. No voxel is looked at here.

Letters: N kept patches of a volume; otherwise those of `batch.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.study import StudyRecord, VolumeRecord

Vox3 = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class StudyTokens:
    """What of one study is in a pack."""

    record: StudyRecord
    epoch: int
    patch_grid: Vox3
    origin_vox: Vox3
    """Voxel of the (flipped) stored box at grid index 0."""
    volumes: tuple[VolumeRecord, ...]
    kept: tuple[npt.NDArray[np.int64], ...]
    """Per volume [N]: flat C-order indices into the patch grid as seen, ascending."""
    starts: tuple[int, ...]
    """Per volume, its first voxel in `PackedBatch.codes_B`."""
    shape: Vox3
    """Voxels of each volume there."""
    flips: tuple[int, ...] = ()
    """Axes along which the volumes are seen mirrored."""
    draw: int = 0
    label: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Of all volumes."""
        return sum(len(kept_N) for kept_N in self.kept)


def packed_batch(
    parts: Sequence[StudyTokens],
    codes_B: npt.NDArray[np.int16],
    patch_vox: Vox3,
    *,
    labels: bool,
) -> PackedBatch:
    """Put studies and their codes together.

    Args:
        parts: In the order of the pack.
        codes_B: [B] int16, the voxels of all volumes of all studies.
        patch_vox: Voxels of a patch along i, j, k.
        labels: Whether to hand on labels, None for a study without one.
    """
    lengths = tuple(part.num_tokens for part in parts)
    volumes = [volume for part in parts for volume in part.volumes]
    volume_lengths = tuple(len(kept_N) for part in parts for kept_N in part.kept)
    grid_T3 = _grid_index(parts)
    return PackedBatch(
        codes_B=torch.from_numpy(codes_B),
        volume_start_V=torch.tensor([start for part in parts for start in part.starts]),
        volume_shape_V3=torch.tensor([part.shape for part in parts for _ in part.volumes]),
        flip_V3=torch.tensor(
            [[axis in part.flips for axis in range(3)] for part in parts for _ in part.volumes]
        ),
        volume_T=_repeat(volume_lengths),
        position_mm_T3=torch.from_numpy(_position_mm(parts, grid_T3, patch_vox)),
        grid_T3=torch.from_numpy(grid_T3),
        intensity_V4=torch.tensor([v.intensity_map for v in volumes], dtype=torch.float32),
        contrast_V=torch.tensor([contrast_id(v.contrast) for v in volumes]),
        descriptor_VK=torch.from_numpy(np.stack([v.descriptor.vector() for v in volumes])),
        study_V=_repeat([len(part.volumes) for part in parts]),
        cu_seqlens=torch.tensor((0, *accumulate(lengths)), dtype=torch.int32),
        lengths=lengths,
        volume_lengths=volume_lengths,
        study_ids=tuple(part.record.study_id for part in parts),
        epochs=tuple(part.epoch for part in parts),
        draws=tuple(part.draw for part in parts),
        contrasts=tuple(tuple(v.contrast for v in part.volumes) for part in parts),
        patch_grids=tuple(part.patch_grid for part in parts),
        patch_vox=(patch_vox[0], patch_vox[1], patch_vox[2]),
        spacing_mm=tuple(part.record.spacing_mm for part in parts),
        labels=tuple(part.label for part in parts) if labels else (),
    )


def _grid_index(parts: Sequence[StudyTokens]) -> npt.NDArray[np.int64]:
    grids = [
        np.stack(np.unravel_index(kept_N, part.patch_grid), axis=1)
        for part in parts
        for kept_N in part.kept
    ]
    return np.concatenate(grids).astype(np.int64, copy=False)


def _position_mm(
    parts: Sequence[StudyTokens], grid_T3: npt.NDArray[np.int64], patch: Vox3
) -> npt.NDArray[np.float32]:
    lengths = [part.num_tokens for part in parts]
    origin_S3 = np.array([part.origin_vox for part in parts], dtype=np.float64)
    centre_S3 = np.array([part.record.shape for part in parts], dtype=np.float64) / 2
    spacing_S3 = np.array([part.record.spacing_mm for part in parts], dtype=np.float64)
    shift_T3 = np.repeat(origin_S3 - centre_S3, lengths, axis=0)
    voxel_T3 = (grid_T3 + 0.5) * np.array(patch, dtype=np.float64) + shift_T3
    position: npt.NDArray[np.float64] = voxel_T3 * np.repeat(spacing_S3, lengths, axis=0)
    return position.astype(np.float32)


def _repeat(counts: Sequence[int]) -> Tensor:
    """Number rows 0, 1, ... and repeat each by its count: [sum(counts)] int64."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
