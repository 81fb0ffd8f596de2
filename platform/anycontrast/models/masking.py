"""Which tokens are hidden, and which of the hidden ones are predicted.

Every volume draws from a generator of its own, keyed by (seed, epoch, study id, contrast, draw);
the draw tells apart the servings of a study within an epoch. So a mask does not depend on what else
is in the batch, on the rank, or on which other contrasts the study has and in which order; only the
Dirichlet budget, which is shared by a study's contrasts, does look at the others. Host only: the
indices travel with the batch.

Letters: T tokens, N visible, M predicted, S studies, V volumes, L tokens of one volume.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.order import study_rng

# (1 - 0.9) * 10 is 0.99999...: without this the floor would lose a token.
_FLOOR_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How tokens are hidden. A fraction is always the fraction hidden."""

    strategy: Literal["per_contrast", "dirichlet"] = "per_contrast"
    """`per_contrast`: the same fraction of every volume (AMAE). `dirichlet`: one visible budget
    for the study, divided over its contrasts at random (MultiMAE, BM-MAE)."""
    hidden_fraction: float = 0.7
    """Fraction of tokens hidden, between 0 and 1, both excluded."""
    alpha: float = 1.0
    """Concentration of the Dirichlet draw, > 0; when small, few contrasts get nearly all."""
    target_fraction: float = 1.0
    """Fraction of the hidden tokens of every volume that is predicted, at least one. Below 1 it
    saves time with the `cross` decoder only."""

    def __post_init__(self) -> None:
        if self.strategy not in ("per_contrast", "dirichlet"):
            raise ValueError(
                f"masking.strategy must be per_contrast or dirichlet, got {self.strategy!r}"
            )
        if not 0.0 < self.hidden_fraction < 1.0:
            raise ValueError(
                f"masking.hidden_fraction must lie between 0 and 1, got {self.hidden_fraction}; "
                "AMAE hides 0.7, BM-MAE 0.75"
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0.0):
            raise ValueError(f"masking.alpha must be finite and > 0, got {self.alpha}; use 1.0")
        if not 0.0 < self.target_fraction <= 1.0:
            raise ValueError(
                f"masking.target_fraction must be in (0, 1], got {self.target_fraction}; "
                "1.0 predicts every hidden token"
            )


@dataclass(frozen=True, kw_only=True)
class MaskedPack:
    """A PackedBatch and what is hidden in it. Indices are ascending, so studies stay in runs."""

    batch: PackedBatch
    hidden_T: Tensor
    """[T] bool, True = hidden from the encoder."""
    visible_index_N: Tensor
    """[N] int64, tokens the encoder sees."""
    target_index_M: Tensor
    """[M] int64, hidden tokens that are predicted."""
    visible_lengths: tuple[int, ...]
    """Visible tokens per study."""
    target_lengths: tuple[int, ...]
    """Predicted tokens per study."""
    cu_visible: Tensor
    """[S + 1] int32, running sum of `visible_lengths`."""
    cu_target: Tensor
    """[S + 1] int32, running sum of `target_lengths`."""

    @property
    def num_targets(self) -> int:
        """M."""
        return sum(self.target_lengths)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "MaskedPack":
        """Return the pack with every tensor on `device`."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            batch=self.batch.to(device, non_blocking=non_blocking),
            hidden_T=moved(self.hidden_T),
            visible_index_N=moved(self.visible_index_N),
            target_index_M=moved(self.target_index_M),
            cu_visible=moved(self.cu_visible),
            cu_target=moved(self.cu_target),
        )


def mask_batch(batch: PackedBatch, config: MaskingConfig, seed: int) -> MaskedPack:
    """Hide tokens of every study of a batch on the CPU.

    Budgets are exact. `per_contrast`: every volume of L tokens keeps floor((1 - h) L) visible, but
    at least one visible and one hidden. `dirichlet`: every study of L tokens keeps
    floor((1 - h) L) visible, at least one visible and one hidden; a volume may keep none or all.

    Args:
        batch: on the CPU.
        config: strategy and fractions.
        seed: of the run.

    Raises:
        ValueError: a volume (`per_contrast`) or study (`dirichlet`) has fewer than 2 tokens.

    Source: AMAE, arXiv 2501.09096, section 2 (per contrast); BM-MAE, arXiv 2505.00568, and
        MultiMAE, arXiv 2204.01678 (Dirichlet).
    """
    hidden: list[npt.NDArray[np.bool_]] = []
    target: list[npt.NDArray[np.bool_]] = []
    volume = 0
    for study_id, epoch, draw, contrasts in zip(
        batch.study_ids, batch.epochs, batch.draws, batch.contrasts, strict=True
    ):
        lengths = batch.volume_lengths[volume : volume + len(contrasts)]
        volume += len(contrasts)
        rngs = [study_rng(seed, epoch, study_id, f"mask/{name}", draw=draw) for name in contrasts]
        budgets = _visible_budgets(lengths, contrasts, rngs, config, study_id)
        for length, num_visible, rng in zip(lengths, budgets, rngs, strict=True):
            hidden_L, target_L = _draw(length, num_visible, config.target_fraction, rng)
            hidden.append(hidden_L)
            target.append(target_L)
    return _masked_pack(batch, np.concatenate(hidden), np.concatenate(target))


def _visible_budgets(
    lengths: Sequence[int],
    contrasts: Sequence[str],
    rngs: Sequence[np.random.Generator],
    config: MaskingConfig,
    study_id: str,
) -> list[int]:
    if config.strategy == "per_contrast":
        return [
            _num_visible(length, config.hidden_fraction, f"study {study_id} {name}")
            for length, name in zip(lengths, contrasts, strict=True)
        ]
    total = _num_visible(sum(lengths), config.hidden_fraction, f"study {study_id}")
    share = _dirichlet(rngs, config.alpha)
    return _divide(total, share, lengths)


def _num_visible(length: int, hidden_fraction: float, where: str) -> int:
    if length < 2:
        raise ValueError(
            f"masking {where}: at least 2 tokens are needed, one to see and one to hide, "
            f"found {length}; use a smaller patch_vox or a larger crop"
        )
    return min(max(math.floor((1.0 - hidden_fraction) * length + _FLOOR_SLACK), 1), length - 1)


def _dirichlet(rngs: Sequence[np.random.Generator], alpha: float) -> npt.NDArray[np.float64]:
    """Draw proportions from Dirichlet(alpha, ..., alpha), one gamma variate per volume's rng.

    In logarithms, because gamma variates underflow for a small alpha:
    Gamma(a) = Gamma(a + 1) * U^(1 / a).
    """
    log_gamma = np.array(
        [np.log(rng.standard_gamma(alpha + 1.0)) + np.log1p(-rng.random()) / alpha for rng in rngs]
    )
    weight = np.exp(log_gamma - log_gamma.max())
    return np.asarray(weight / weight.sum(), dtype=np.float64)


def _divide(total: int, share: npt.NDArray[np.float64], capacity: Sequence[int]) -> list[int]:
    """Divide `total` tokens by `share` with largest remainders; no volume over its capacity.

    What exceeds a capacity goes to the others in proportion to their shares. `total` is at most
    the sum of `capacity`.
    """
    room = np.asarray(capacity, dtype=np.int64)
    # The floor keeps a volume with a share of about 0 able to take what the others cannot.
    weight = np.maximum(share, 1e-12)
    want = np.zeros(len(room))
    is_open = np.ones(len(room), dtype=bool)
    while is_open.any():
        left = total - want[~is_open].sum()
        want[is_open] = left * weight[is_open] / weight[is_open].sum()
        over = is_open & (want > room)
        if not over.any():
            break
        want[over] = room[over]
        is_open &= ~over
    count = np.minimum(np.floor(want + _FLOOR_SLACK).astype(np.int64), room)
    by_remainder = np.argsort(count - want, kind="stable")
    fillable = by_remainder[count[by_remainder] < room[by_remainder]]
    count[fillable[: total - int(count.sum())]] += 1
    assert int(count.sum()) == total, "the visible budget is exact"
    return [int(n) for n in count]


def _draw(
    length: int, num_visible: int, target_fraction: float, rng: np.random.Generator
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Choose visible tokens and targets of one volume uniformly: (hidden [L], target [L])."""
    # The raw stream is stable over NumPy releases, `permutation` need not be.
    order = np.argsort(rng.bit_generator.random_raw(length), kind="stable")
    num_hidden = length - num_visible
    num_target = min(num_hidden, max(1, round(target_fraction * num_hidden)))
    hidden = np.ones(length, dtype=bool)
    hidden[order[:num_visible]] = False
    target = np.zeros(length, dtype=bool)
    target[order[num_visible : num_visible + num_target]] = True
    return hidden, target


def _masked_pack(
    batch: PackedBatch, hidden: npt.NDArray[np.bool_], target: npt.NDArray[np.bool_]
) -> MaskedPack:
    visible_lengths = _count_per_study(~hidden, batch.offsets)
    target_lengths = _count_per_study(target, batch.offsets)
    return MaskedPack(
        batch=batch,
        hidden_T=torch.from_numpy(hidden),
        visible_index_N=torch.from_numpy(np.flatnonzero(~hidden)),
        target_index_M=torch.from_numpy(np.flatnonzero(target)),
        visible_lengths=visible_lengths,
        target_lengths=target_lengths,
        cu_visible=torch.tensor([0, *accumulate(visible_lengths)], dtype=torch.int32),
        cu_target=torch.tensor([0, *accumulate(target_lengths)], dtype=torch.int32),
    )


def _count_per_study(chosen: npt.NDArray[np.bool_], offsets: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(chosen[start:stop].sum()) for start, stop in pairwise(offsets))
