"""Which study is served when: a pure function of (seed, epoch, weights, number of studies).

In: a seed and, where studies are mixed unevenly, a weight for each. Out: for every epoch the
studies in the order they are served. With equal weights an epoch is a permutation of all studies.
With weights it deals N places to N studies: study i gets floor or ceil of N * w_i / sum(w) of them,
by systematic resampling within strata, so no dataset falls more than one place behind its share.
World size, threads and shard layout never enter. Cost: about 0.1 s an epoch of a million studies,
0.4 s with weights.

Randomness is taken from the raw Philox stream, which NumPy keeps stable over releases, and not from
`Generator.permutation`, which it may change.
"""

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Two epochs meet in a step, and a state may be asked for of the one before.
_KEPT_EPOCHS = 3


@dataclass(frozen=True)
class EpochOrder:
    """The N places of one epoch, in the order they are served."""

    study_N: npt.NDArray[np.int64]
    """Number of the study, 0 .. num_studies - 1."""
    repeat_N: npt.NDArray[np.int64]
    """0 at one of the study's places in this epoch, 1 at another, and so on."""


class StudyOrder:
    """The order of all epochs.

    Args:
        num_studies: Studies to choose from, >= 1.
        seed: Seed of the run.
        weights: Per study, >= 0, not all 0; None serves every study once an epoch. A study of
            weight 0 is left out and makes the epoch one place shorter.
        strata: Per study, the number of the group whose share of places is to be exact, e.g. of its
            dataset; without weights it has no effect.

    Raises:
        ValueError: If there are no studies, or a weight is negative, not finite, or all are 0.

    Source: systematic resampling: Kitagawa, J. Comput. Graph. Stat. 5, 1996, appendix.
    """

    def __init__(
        self,
        num_studies: int,
        seed: int,
        *,
        weights: npt.NDArray[np.float64] | None = None,
        strata: npt.NDArray[np.int64] | None = None,
    ) -> None:
        if num_studies < 1:
            raise ValueError(f"order: num_studies must be >= 1, got {num_studies}")
        self._seed = seed
        self._chosen = np.arange(num_studies)
        self._weights: npt.NDArray[np.float64] | None = None
        if weights is not None:
            self._set_weights(weights)
        self._strata = np.zeros(num_studies, np.int64) if strata is None else strata
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()

    def _set_weights(self, weights: npt.NDArray[np.float64]) -> None:
        if weights.shape != self._chosen.shape:
            raise ValueError(
                f"order: one weight per study, got {len(weights)} for {len(self._chosen)} studies"
            )
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise ValueError("order: weights must be finite, >= 0 and not all 0")
        self._chosen = np.flatnonzero(weights)
        kept = weights[self._chosen]
        if (kept != kept[0]).any():
            self._weights = kept

    @property
    def num_places(self) -> int:
        """N, the studies served in an epoch, repeats counted; the same for every epoch."""
        return len(self._chosen)

    def epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch, >= 0."""
        if epoch not in self._epochs:
            self._epochs[epoch] = self._make(epoch)
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def _make(self, epoch: int) -> EpochOrder:
        shuffled = _permutation(self.num_places, self._seed, epoch, "order")
        if self._weights is None:
            return EpochOrder(self._chosen[shuffled], np.zeros(self.num_places, np.int64))
        # Strata one after the other, each in an order of its own for this epoch: which studies of a
        # stratum share the remainder changes from epoch to epoch.
        strata = self._strata[self._chosen[shuffled]]
        dealt = shuffled[np.argsort(strata, kind="stable")]
        counts = self._count_places(self._weights[dealt], epoch)
        repeat = np.arange(self.num_places) - np.repeat(np.cumsum(counts) - counts, counts)
        mixed = _permutation(self.num_places, self._seed, epoch, "order/mixed")
        return EpochOrder(self._chosen[np.repeat(dealt, counts)[mixed]], repeat[mixed])

    def _count_places(self, weights: npt.NDArray[np.float64], epoch: int) -> npt.NDArray[np.int64]:
        edges = np.cumsum(weights)
        edges *= self.num_places / edges[-1]
        edges[-1] = self.num_places
        key = _philox_key(self._seed, epoch, "", "order/offset", 0)
        offset = float(np.random.Philox(key=key).random_raw(1)[0] >> np.uint64(11)) / 2**53
        reached = np.floor(edges + offset).astype(np.int64)
        return reached - np.concatenate(([0], reached[:-1]))


def study_rng(
    seed: int, epoch: int, study_id: str, purpose: str, *, draw: int = 0
) -> np.random.Generator:
    """Make the random generator of one study in one epoch for one purpose.

    Masks, crops and flips drawn from it are the same on every rank, thread and world size.

    Args:
        seed: Seed of the run.
        epoch: Epoch the study is served for.
        study_id: The study's id.
        purpose: What is drawn, e.g. `mask` or `augment`; streams of two purposes are independent.
        draw: Tells apart the servings of a study within the epoch, see `PackedBatch.draws`.
    """
    key = _philox_key(seed, epoch, study_id, purpose, draw)
    return np.random.Generator(np.random.Philox(key=key))


def _permutation(size: int, seed: int, epoch: int, purpose: str) -> npt.NDArray[np.int64]:
    raw = np.random.Philox(key=_philox_key(seed, epoch, "", purpose, 0)).random_raw(size)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


def _philox_key(seed: int, epoch: int, study_id: str, purpose: str, draw: int) -> int:
    # JSON keeps the fields apart: ("a", "bc") and ("ab", "c") give different keys.
    fields = [int(seed), int(epoch), study_id, purpose, *([int(draw)] if draw else [])]
    digest = hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")
