"""Which studies of a store a stream serves, as columns.

In: a store and what is asked of it. Out: one row per study of the split that has a wanted
contrast: where it lies in the store, its dataset, the set of contrasts served, and a hash of its
id. A million rows take 32 MB.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.store.study_records import StudyRecords
from anycontrast_datasets.study import SPLITS, ManifestError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The studies of a stream; N of them, numbered in the order of the store."""

    index_N: npt.NDArray[np.int64]
    """Index in the store."""
    dataset_N: npt.NDArray[np.int64]
    """Row of `dataset_names`."""
    contrast_set_N: npt.NDArray[np.uint64]
    """The contrasts served; bit n stands for vocabulary id n."""
    id_hash_N: npt.NDArray[np.uint64]
    """`id_hash` of the study's id."""
    dataset_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.index_N)


def id_hash(study_id: str) -> int:
    """Return 64 bits that stand for a study id."""
    return int.from_bytes(hashlib.blake2b(study_id.encode(), digest_size=8).digest(), "little")


def select_studies(store: StudyStore, split: str, contrasts: Sequence[str]) -> Selection:
    """Choose the studies of a split that have one of `contrasts`, or any where it is empty.

    Raises:
        ManifestError: If there is none; the message says how many studies each split has.
    """
    columns = _columns(store)
    bits_of = {names: _bits(names, contrasts) for names in set(columns.contrasts)}
    set_A = np.array([bits_of[names] for names in columns.contrasts], dtype=np.uint64)
    in_split = np.array(columns.splits) == split
    index_N = np.flatnonzero(in_split & (set_A != 0))
    if len(index_N) == 0:
        found = Counter(columns.splits)
        counts = {name: found[name] for name in SPLITS}
        raise ManifestError(
            f"stream: no study to serve from split {split!r} with contrasts "
            f"{list(contrasts) or 'any'}; studies per split: {counts}; "
            "change the split, its fractions at scanning, or the contrasts"
        )
    logger.info(
        "split %s: %d studies served, %d left out for having none of the wanted contrasts %s",
        split,
        len(index_N),
        int(in_split.sum()) - len(index_N),
        list(contrasts) or "(all)",
    )
    chosen = index_N.tolist()
    names = sorted({columns.datasets[index] for index in chosen})
    number_of = {name: number for number, name in enumerate(names)}
    return Selection(
        index_N=index_N,
        dataset_N=np.array([number_of[columns.datasets[i]] for i in chosen], dtype=np.int64),
        contrast_set_N=set_A[index_N],
        id_hash_N=np.array([id_hash(columns.study_ids[i]) for i in chosen], dtype=np.uint64),
        dataset_names=tuple(names),
    )


@dataclass(frozen=True)
class _Columns:
    """What selection looks at, of every study of a store."""

    study_ids: Sequence[str]
    splits: Sequence[str]
    datasets: Sequence[str]
    contrasts: Sequence[tuple[str, ...]]


def _columns(store: StudyStore) -> _Columns:
    records = store.records
    if isinstance(records, StudyRecords):
        # By column, because parsing a million records takes a minute.
        return _Columns(
            study_ids=records.field("study_id").tolist(),
            splits=records.field("split").tolist(),
            datasets=records.field("dataset").tolist(),
            contrasts=records.contrasts,
        )
    return _Columns(
        study_ids=[record.study_id for record in records],
        splits=[record.split for record in records],
        datasets=[record.dataset for record in records],
        contrasts=[record.contrasts for record in records],
    )


def _bits(names: Iterable[str], wanted: Sequence[str]) -> int:
    return sum(1 << contrast_id(name) for name in names if not wanted or name in wanted)
