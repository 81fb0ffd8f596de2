import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch

from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import DESCRIPTOR_SIZE, contrast_id

FOUR = ("T1w", "T1wCE", "T2w", "FLAIR")


def batch_of(
    studies: dict[str, dict[str, int]], *, epochs: Sequence[int] | None = None
) -> PackedBatch:
    """A batch with a number of tokens per study and contrast; patches of one voxel."""
    volume_lengths = tuple(n for study in studies.values() for n in study.values())
    lengths = tuple(sum(study.values()) for study in studies.values())
    names = [name for study in studies.values() for name in study]
    num_tokens, num_volumes = sum(lengths), len(names)
    rows = torch.repeat_interleave(torch.arange(num_volumes), torch.tensor(volume_lengths))
    return PackedBatch(
        codes_B=torch.arange(num_tokens, dtype=torch.int16),
        volume_start_V=torch.tensor([0, *accumulate(volume_lengths)][:-1]),
        volume_shape_V3=torch.tensor([[n, 1, 1] for n in volume_lengths]),
        flip_V3=torch.zeros(num_volumes, 3, dtype=torch.bool),
        volume_T=rows,
        position_mm_T3=torch.zeros(num_tokens, 3),
        grid_T3=torch.zeros(num_tokens, 3, dtype=torch.int64),
        intensity_V4=torch.tensor([[1.0, 0.0, -9e9, 9e9]]).repeat(num_volumes, 1),
        contrast_V=torch.tensor([contrast_id(name) for name in names]),
        descriptor_VK=torch.zeros(num_volumes, DESCRIPTOR_SIZE),
        study_V=torch.repeat_interleave(
            torch.arange(len(studies)), torch.tensor([len(s) for s in studies.values()])
        ),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        lengths=lengths,
        volume_lengths=volume_lengths,
        study_ids=tuple(studies),
        epochs=tuple(epochs) if epochs is not None else (0,) * len(studies),
        contrasts=tuple(tuple(study) for study in studies.values()),
        patch_grids=((1, 1, 1),) * len(studies),
        patch_vox=(1, 1, 1),
        spacing_mm=((1.0, 1.0, 1.0),) * len(studies),
    )


def visible_per_volume(pack: MaskedPack) -> list[int]:
    parts = torch.split(~pack.hidden_T, list(pack.batch.volume_lengths))
    return [int(part.sum()) for part in parts]


def hidden_of(pack: MaskedPack, study_id: str, contrast: str) -> list[bool]:
    volume = 0
    for name, contrasts in zip(pack.batch.study_ids, pack.batch.contrasts, strict=True):
        if name == study_id:
            volume += contrasts.index(contrast)
            break
        volume += len(contrasts)
    start, stop = pack.batch.volume_offsets[volume : volume + 2]
    return [bool(x) for x in pack.hidden_T[start:stop]]


PER_CONTRAST = MaskingConfig()
DIRICHLET = MaskingConfig(strategy="dirichlet", hidden_fraction=0.75)


@pytest.mark.parametrize("config", [PER_CONTRAST, DIRICHLET], ids=["per_contrast", "dirichlet"])
def test_a_pack_is_consistent_with_itself(config: MaskingConfig) -> None:
    config = replace(config, target_fraction=0.5)
    pack = mask_batch(batch_of({"a": {"T1w": 20, "ADC": 7}, "b": {"DWI": 33}}), config, 1)
    assert torch.equal((~pack.hidden_T).nonzero().flatten(), pack.visible_index_N)
    assert bool(pack.hidden_T[pack.target_index_M].all())
    assert pack.target_index_M.tolist() == sorted(set(pack.target_index_M.tolist()))
    assert pack.cu_visible.tolist() == [0, *accumulate(pack.visible_lengths)]
    assert pack.cu_target.tolist() == [0, *accumulate(pack.target_lengths)]
    assert pack.cu_visible.dtype == pack.cu_target.dtype == torch.int32
    assert pack.num_targets == len(pack.target_index_M)
    first = pack.visible_index_N < pack.batch.lengths[0]
    assert int(first.sum()) == pack.visible_lengths[0]


@pytest.mark.parametrize(
    ("length", "hidden_fraction", "visible"),
    [(512, 0.7, 153), (10, 0.7, 3), (20, 0.9, 2), (100, 0.75, 25), (2, 0.7, 1), (3, 0.1, 2)],
)
def test_per_contrast_budget_is_exact(length: int, hidden_fraction: float, visible: int) -> None:
    config = MaskingConfig(hidden_fraction=hidden_fraction)
    pack = mask_batch(batch_of({"a": {"T1w": length, "T2w": length}}), config, 0)
    assert visible_per_volume(pack) == [visible, visible]


def test_per_contrast_hides_every_place_equally_often() -> None:
    batch = batch_of({"a": {"T1w": 20, "FLAIR": 20}})
    draws = 600
    hidden = torch.stack([mask_batch(batch, PER_CONTRAST, seed).hidden_T for seed in range(draws)])
    rate = hidden.float().mean(0)
    # Five standard deviations of a rate of 0.7.
    slack = 5 * math.sqrt(0.7 * 0.3 / draws)
    assert float((rate - 0.7).abs().max()) < slack
    # Contrasts are hidden independently: the same place in both at a rate of 0.49.
    both = (hidden[:, :20] & hidden[:, 20:]).float().mean()
    assert abs(float(both) - 0.49) < 0.02


def test_dirichlet_budget_of_the_study_is_exact() -> None:
    batch = batch_of({"a": dict.fromkeys(FOUR, 512), "b": {"T1w": 5, "ADC": 90, "DWI": 31}})
    for alpha in (0.01, 1.0, 50.0):
        config = replace(DIRICHLET, alpha=alpha)
        for seed in range(25):
            pack = mask_batch(batch, config, seed)
            assert pack.visible_lengths == (512, 31)


def test_dirichlet_at_low_hidden_fractions_respects_the_size_of_a_volume() -> None:
    batch = batch_of({"a": {"T1w": 4, "T2w": 40, "FLAIR": 4}})
    for seed in range(50):
        config = MaskingConfig(strategy="dirichlet", hidden_fraction=0.1, alpha=0.05)
        pack = mask_batch(batch, config, seed)
        visible = visible_per_volume(pack)
        assert sum(visible) == 43
        assert all(v <= n for v, n in zip(visible, pack.batch.volume_lengths, strict=True))


def test_dirichlet_statistics_are_those_published_for_bm_mae() -> None:
    """Uniform Dirichlet over four contrasts of 512 tokens, 512 visible in total."""
    batch = batch_of({"a": dict.fromkeys(FOUR, 512)})
    counts = np.array(
        [visible_per_volume(mask_batch(batch, DIRICHLET, seed)) for seed in range(1500)]
    )
    assert np.abs(counts.mean(0) - 128).max() < 8
    assert abs(counts.std() - 99) < 6
    # A contrast keeps under 5 % of its tokens in 14.3 % of draws.
    assert abs((counts < 0.05 * 512).mean() - 0.143) < 0.02
    # All four keep 12.5 % or more in 12.8 % of draws.
    assert abs((counts >= 64).all(1).mean() - 0.128) < 0.03


def test_alpha_sets_how_unequal_contrasts_are() -> None:
    batch = batch_of({"a": dict.fromkeys(FOUR, 512)})

    def spread(alpha: float) -> float:
        config = replace(DIRICHLET, alpha=alpha)
        drawn = [visible_per_volume(mask_batch(batch, config, seed)) for seed in range(60)]
        return float(np.array(drawn).std())

    assert spread(100.0) < 12 < spread(1.0) < spread(0.1)


@pytest.mark.parametrize("config", [PER_CONTRAST, DIRICHLET], ids=["per_contrast", "dirichlet"])
def test_masks_do_not_depend_on_the_rest_of_the_batch(config: MaskingConfig) -> None:
    a, b = {"T1w": 30, "ADC": 17}, {"T1w": 25, "FLAIR": 25}
    together = mask_batch(batch_of({"x": b, "a": a, "y": b}), config, 4)
    alone = mask_batch(batch_of({"a": a}), config, 4)
    assert torch.equal(together.hidden_T[50:97], alone.hidden_T)


@pytest.mark.parametrize("config", [PER_CONTRAST, DIRICHLET], ids=["per_contrast", "dirichlet"])
def test_masks_do_not_depend_on_the_order_of_contrasts(config: MaskingConfig) -> None:
    sizes = {"T1w": 30, "ADC": 17, "FLAIR": 22}
    pack = mask_batch(batch_of({"a": sizes}), config, 4)
    turned = mask_batch(batch_of({"a": dict(reversed(sizes.items()))}), config, 4)
    for name in sizes:
        assert hidden_of(pack, "a", name) == hidden_of(turned, "a", name)


def test_masks_change_with_seed_epoch_study_and_contrast() -> None:
    sizes = {"T1w": 40, "T2w": 40}
    base = mask_batch(batch_of({"a": sizes}), PER_CONTRAST, 0)
    again = mask_batch(batch_of({"a": sizes}), PER_CONTRAST, 0)
    others = [
        mask_batch(batch_of({"a": sizes}), PER_CONTRAST, 1),
        mask_batch(batch_of({"a": sizes}, epochs=[1]), PER_CONTRAST, 0),
        mask_batch(batch_of({"b": sizes}), PER_CONTRAST, 0),
    ]
    assert torch.equal(base.hidden_T, again.hidden_T)
    assert not any(torch.equal(base.hidden_T, other.hidden_T) for other in others)
    assert hidden_of(base, "a", "T1w") != hidden_of(base, "a", "T2w")


@pytest.mark.parametrize(("fraction", "targets"), [(1.0, 28), (0.25, 7), (0.001, 1)])
def test_target_fraction_is_exact_per_volume(fraction: float, targets: int) -> None:
    config = MaskingConfig(target_fraction=fraction)
    pack = mask_batch(batch_of({"a": {"T1w": 40, "T2w": 40}}), config, 0)
    rows = pack.batch.volume_T[pack.target_index_M]
    assert torch.bincount(rows).tolist() == [targets, targets]


def test_target_fraction_does_not_change_what_is_hidden() -> None:
    batch = batch_of({"a": {"T1w": 40, "T2w": 40}})
    part = mask_batch(batch, MaskingConfig(target_fraction=0.3), 0)
    assert torch.equal(part.hidden_T, mask_batch(batch, PER_CONTRAST, 0).hidden_T)


def test_a_volume_of_one_patch_is_refused_by_name() -> None:
    batch = batch_of({"a": {"T1w": 9, "ADC": 1}})
    with pytest.raises(ValueError, match="masking study a ADC: at least 2 tokens"):
        mask_batch(batch, PER_CONTRAST, 0)
    assert mask_batch(batch, DIRICHLET, 0).visible_lengths == (2,)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"strategy": "random"}, r"masking\.strategy .*'random'"),
        ({"hidden_fraction": 1.0}, r"masking\.hidden_fraction .*1\.0"),
        ({"hidden_fraction": 0.0}, r"masking\.hidden_fraction"),
        ({"alpha": 0.0}, r"masking\.alpha"),
        ({"alpha": float("inf")}, r"masking\.alpha"),
        ({"target_fraction": 0.0}, r"masking\.target_fraction"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MaskingConfig(**change)  # type: ignore[arg-type]
