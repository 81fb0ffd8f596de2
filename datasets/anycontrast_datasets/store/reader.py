"""What a store of prepared studies must do, and how one is opened.

Whoever streams studies knows only this protocol; the layout on disk is the store's own affair.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.store.byte_source import (
    ByteSource,
    LocalSource,
    Location,
    parse_location,
)
from anycontrast_datasets.store.cache import CacheConfig
from anycontrast_datasets.store.volume_index import AGAIN, DATASET_NAME, read_dataset
from anycontrast_datasets.store.volume_index import KIND as VOLUME
from anycontrast_datasets.study import ShardError, StudyArrays, StudyRecord

Vox3 = tuple[int, int, int]
Codes = npt.NDArray[np.int16]


class StudyStore(Protocol):
    """Prepared studies by index. All that reads may be called from many threads."""

    @property
    def records(self) -> Sequence[StudyRecord]:
        """Every study, in manifest order."""

    @property
    def fingerprint(self) -> str:
        """Names the content: equal fingerprints, equal voxels and equal order."""

    def __len__(self) -> int:
        """Return the number of studies."""

    def read(
        self,
        index: int,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
        out: Mapping[str, Codes] | None = None,
    ) -> StudyArrays:
        """Return study `index` with all, or only the named, contrasts, checked byte for byte.

        Args:
            index: Position in `records`.
            contrasts: Names to read; None reads every one.
            label: Read the label too, if there is one.
            out: Contrast -> int16 memory to decode into, see `slots.slot_array`; the arrays
                returned lie in it and change when it is used again.
        """

    def read_crop(
        self,
        index: int,
        start_vox: Vox3,
        size_vox: Vox3,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
    ) -> StudyArrays:
        """Return the part of a study inside a box; the record stays that of the whole study."""

    def read_patches(
        self, index: int, patch_vox: Vox3, patches: Mapping[str, npt.NDArray[np.int64]]
    ) -> dict[str, Codes]:
        """Return [N, P] int16 per contrast: patches by flat C-order index into the patch grid.

        The grid is padded at its far ends with code 0 up to whole patches.
        """

    def verify(self) -> list[str]:
        """Re-read everything; return one line per problem, empty if the store is intact."""

    def close(self) -> None:
        """Release what is held open; reading again opens it again."""


@runtime_checkable
class Announcer(Protocol):
    """A store that can be told what will be read."""

    def announce(self, index: int, contrasts: Sequence[str]) -> None:
        """Say what of a study will be read soon, so that a disk may begin; returns at once."""


def open_store(location: Path | str, *, cache: CacheConfig | None = None) -> StudyStore:
    """Open a sharded data set.

    Args:
        location: Folder that `anycontrast shard` wrote, or its address: `s3://`, `gs://`,
            `https://`, `file://` (and `http://` on this machine). Addresses must be text.
        cache: Where to keep what was fetched from an address; None, or one without a folder,
            fetches every study anew. A plain folder is never cached, `file://` is.

    Raises:
        ShardError: If the address is not allowed, nobody answers, or the data set is missing,
            unfinished, damaged or of another schema.
    """
    place = parse_location(location)
    source = _source_of(place)
    dataset = read_dataset(source)
    kind = dataset.get("kind", VOLUME)
    if kind in (VOLUME, "zarr") and not isinstance(dataset.get("fingerprint"), str):
        raise ShardError(
            f"opening shards: {place.shown}/{DATASET_NAME} is damaged (no fingerprint); {AGAIN}"
        )
    if kind == "zarr":
        from anycontrast_datasets.store.zarr_store import ZarrStore

        return ZarrStore(source, dataset=dataset, cache=cache if place.scheme else None)
    if kind != VOLUME:
        raise ShardError(
            f"opening shards: {place.shown} is a store of kind {str(kind)[:40]!r}, this "
            "installation reads volume and zarr; upgrade anycontrast"
        )
    from anycontrast_datasets.store.volume_store import VolumeStore

    return VolumeStore(source, dataset=dataset, cache=cache if place.scheme else None)


def describe_store(location: Path | str) -> dict[str, Any]:
    """Return `dataset.json` of a sharded data set: what was made of what, and how.

    Raises:
        ShardError: As `open_store`.
    """
    return dict(read_dataset(_source_of(parse_location(location))))


def _source_of(place: Location) -> ByteSource:
    if not place.is_local:
        from anycontrast_datasets.store.remote import RemoteSource

        return RemoteSource(place)
    root = Path(place.base).expanduser()
    if not root.is_dir():
        raise ShardError(f"opening shards: {root} is not a folder; run `anycontrast shard` first")
    return LocalSource(root)
