"""Which study is served at which step: a pure function of (seed, position, number of studies).

In: a position in the endless concatenation of epochs, each a permutation of all studies. Out: the
epoch and the study's index. Step n of B studies takes positions [n * B, (n + 1) * B), so an epoch
may end inside a step, nothing is dropped or repeated, and the state of a run is one integer. World
size, threads and shard layout never enter. Cost: one sort an epoch (about 0.1 s for a million
studies), then a lookup.

Randomness is taken from the raw Philox stream, which NumPy keeps stable over releases, and not from
`Generator.permutation`, which it may change.
"""

import hashlib
import json
from functools import lru_cache

import numpy as np
import numpy.typing as npt


def study_rng(seed: int, epoch: int, study_id: str, purpose: str) -> np.random.Generator:
    """Make the random generator of one study in one epoch for one purpose.

    Masks, crops and flips drawn from it are the same on every rank, thread and world size.

    Args:
        seed: Seed of the run.
        epoch: Epoch the study is served for.
        study_id: The study's id.
        purpose: What is drawn, e.g. `mask` or `augment`; streams of two purposes are independent.
    """
    return np.random.Generator(np.random.Philox(key=_philox_key(seed, epoch, study_id, purpose)))


def study_at(position: int, num_studies: int, seed: int) -> tuple[int, int]:
    """Return `(epoch, index)` of the study at a position of the endless order.

    Args:
        position: Number of studies served before this one, >= 0.
        num_studies: Studies in an epoch, >= 1.
        seed: Seed of the run.

    Raises:
        ValueError: If `position` is negative or there are no studies.
    """
    if num_studies < 1:
        raise ValueError(f"order: num_studies must be >= 1, got {num_studies}")
    if position < 0:
        raise ValueError(f"order: position must be >= 0, got {position}")
    epoch, offset = divmod(position, num_studies)
    return epoch, int(_epoch_permutation(num_studies, seed, epoch)[offset])


def step_studies(
    step: int, studies_per_step: int, num_studies: int, seed: int
) -> list[tuple[int, int]]:
    """Return `(epoch, index)` of the studies that form one global step, in order.

    Args:
        step: Global step, >= 0.
        studies_per_step: Studies in a step over all ranks, >= 1; may exceed `num_studies`.
        num_studies: Studies in an epoch, >= 1.
        seed: Seed of the run.

    Raises:
        ValueError: If `step` is negative or a count is below 1.
    """
    if studies_per_step < 1:
        raise ValueError(f"order: studies_per_step must be >= 1, got {studies_per_step}")
    first = step * studies_per_step
    return [study_at(first + i, num_studies, seed) for i in range(studies_per_step)]


# Two epochs meet in a step; four entries let a training and a validation order live side by side.
@lru_cache(maxsize=4)
def _epoch_permutation(num_studies: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    raw = np.random.Philox(key=_philox_key(seed, epoch, "", "order")).random_raw(num_studies)
    permutation = np.argsort(raw, kind="stable").astype(np.int64, copy=False)
    permutation.flags.writeable = False
    return permutation


def _philox_key(seed: int, epoch: int, study_id: str, purpose: str) -> int:
    # JSON keeps the fields apart: ("a", "bc") and ("ab", "c") give different keys.
    text = json.dumps([int(seed), int(epoch), study_id, purpose])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
