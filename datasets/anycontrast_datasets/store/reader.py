"""What a store of prepared studies must do, and how one is opened.

Whoever streams studies knows only this protocol; the layout on disk is the store's own affair.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from anycontrast_datasets.study import ShardError, StudyArrays, StudyRecord


class StudyStore(Protocol):
    """Prepared studies by index. `read` may be called from many threads."""

    @property
    def records(self) -> tuple[StudyRecord, ...]:
        """Every study, in manifest order."""

    @property
    def fingerprint(self) -> str:
        """Names the content: equal fingerprints, equal voxels and equal order."""

    def read(
        self, index: int, *, contrasts: Sequence[str] | None = None, label: bool = False
    ) -> StudyArrays:
        """Return study `index` with all, or only the named, contrasts, checked byte for byte."""

    def verify(self) -> list[str]:
        """Re-read everything; return one line per problem, empty if the store is intact."""


def open_store(path: Path | str) -> StudyStore:
    """Open a sharded data set.

    Args:
        path: Folder that `anycontrast shard` wrote.

    Raises:
        ShardError: If the folder is missing, unfinished, damaged or of a newer schema.
    """
    from anycontrast_datasets.store.volume_store import VolumeStore

    root = Path(path)
    if "://" in str(path):
        raise ShardError(
            f"opening shards: must be a local or mounted folder, got the address {path}; "
            "copy the shards here or mount them"
        )
    if not root.is_dir():
        raise ShardError(f"opening shards: {root} is not a folder; run `anycontrast shard` first")
    return VolumeStore(root)
