"""Which studies of a store a stream serves, as columns.

In: a store and what is asked of it. Out: one row per study of the split that has a wanted
contrast: where it lies in the store, its dataset, the set of contrasts served, and a hash of its
id. A million rows take 32 MB.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.store.reader import StudyStore
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
    wanted = set(contrasts)
    splits: Counter[str] = Counter()
    datasets: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    for index, record in enumerate(store.records):
        splits[record.split] += 1
        if record.split != split:
            continue
        names = [volume.contrast for volume in record.volumes]
        bits = sum(1 << contrast_id(name) for name in names if not wanted or name in wanted)
        if bits:
            number = datasets.setdefault(record.dataset, len(datasets))
            rows.append((index, number, bits, id_hash(record.study_id)))
    if not rows:
        counts = {name: splits[name] for name in SPLITS}
        raise ManifestError(
            f"stream: no study to serve from split {split!r} with contrasts "
            f"{list(contrasts) or 'any'}; studies per split: {counts}; "
            "change the split, its fractions at scanning, or the contrasts"
        )
    logger.info(
        "split %s: %d studies served, %d left out for having none of the wanted contrasts %s",
        split,
        len(rows),
        splits[split] - len(rows),
        list(contrasts) or "(all)",
    )
    indices, dataset, sets, hashes = zip(*rows, strict=True)
    return Selection(
        index_N=np.array(indices, dtype=np.int64),
        dataset_N=np.array(dataset, dtype=np.int64),
        contrast_set_N=np.array(sets, dtype=np.uint64),
        id_hash_N=np.array(hashes, dtype=np.uint64),
        dataset_names=tuple(datasets),
    )
