"""Which inner chunk suits the Zarr store: whole studies, crops and patches by three readers.

A study is read from Zarr stores of several chunk shapes by our reader, zarr-python and tensorstore,
beside the volume store, which has no chunks. All in one process and in alternating rounds.
"""

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anycontrast.bench.timing import alternate, markdown_table
from anycontrast_datasets.store.reader import StudyStore, open_store
from anycontrast_datasets.store.zarr_config import ZarrConfig
from anycontrast_datasets.store.zarr_metadata import HIERARCHY, chunk_shape
from anycontrast_datasets.store.zarr_writer import write_zarr_store
from anycontrast_datasets.study import StudyRecord

CROP_VOX = (96, 96, 96)
PATCH_VOX = (16, 16, 16)
PATCH_SHARE = 0.3
OURS = "anycontrast"
VOLUME_STORE = "volume store"

Way = Callable[[int], object]
Row = dict[str, Any]


def chunk_rows(
    volume_store: Path, folder: Path, longest_vox: Sequence[int], rounds: int
) -> dict[str, Row]:
    """Measure every chunk shape; CPU ms per study.

    Args:
        volume_store: Studies of one shape.
        folder: For the Zarr stores; removed afterwards.
        longest_vox: Longest sides of a chunk to try; 0 is the whole volume.
        rounds: Of the measurement.

    Returns:
        Store -> `mb_per_study`, and `whole`, `crop` and `patches` by reader.
    """
    source = open_store(volume_store)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folders = {}
        for longest in longest_vox:
            name = "x".join(map(str, chunk_shape(source.records[0].shape, longest)))
            config = ZarrConfig(chunk_vox=longest, num_levels=1)
            write_zarr_store(source, folder / name, config)
            folders[f"zarr {name}"] = folder / name
        ways = _our_ways({VOLUME_STORE: source, **{n: open_store(p) for n, p in folders.items()}})
        for name, path in folders.items():
            ways |= _foreign_ways(name, path, list(source.records))
        timings = alternate(ways, 2 * len(source), rounds)
        num_bytes = {name: _num_bytes(path, "c/0/0/0") for name, path in folders.items()}
        num_bytes[VOLUME_STORE] = _num_bytes(volume_store, "*.tar")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows: dict[str, Row] = {}
    for (name, what, reader), timing in timings.items():
        row = rows.setdefault(name, {"mb_per_study": num_bytes[name] / 1e6 / len(source)})
        row.setdefault(what, {})[reader] = timing.cpu_ms
    return rows


def chunk_table(rows: dict[str, Row]) -> str:
    """Return the rows as Markdown."""
    columns = [
        (what, reader)
        for what in ("whole", "crop", "patches")
        for reader in (OURS, "zarr-python", "tensorstore")
        if any(reader in row.get(what, {}) for row in rows.values())
    ]
    header = ["store", "MB/study", *(f"{what}, {reader}" for what, reader in columns)]
    body = [
        [name, f"{row['mb_per_study']:.1f}"]
        + [
            f"{row[what][reader]:.1f}" if reader in row.get(what, {}) else ""
            for what, reader in columns
        ]
        for name, row in rows.items()
    ]
    return markdown_table(header, body)


def _our_ways(stores: dict[str, StudyStore]) -> dict[tuple[str, str, str], Way]:
    ways: dict[tuple[str, str, str], Way] = {}
    for name, store in stores.items():
        record = store.records[0]
        slots = {c: np.empty(record.shape, dtype=np.int16) for c in record.contrasts}
        patches = _patches(record)

        def whole(item: int, store: StudyStore = store, slots: Any = slots) -> object:
            return store.read(item % len(store), out=slots)

        def crop(item: int, store: StudyStore = store) -> object:
            start = _start(store.records[0].shape, item)
            return store.read_crop(item % len(store), start, CROP_VOX)

        def some(item: int, store: StudyStore = store, patches: Any = patches) -> object:
            return store.read_patches(item % len(store), PATCH_VOX, patches)

        ways |= {(name, "whole", OURS): whole, (name, "crop", OURS): crop}
        ways[name, "patches", OURS] = some
    return ways


def _foreign_ways(
    name: str, folder: Path, records: list[StudyRecord]
) -> dict[tuple[str, str, str], Way]:
    """Open every array once by each library that is installed; return how they read."""
    ways: dict[tuple[str, str, str], Way] = {}
    for reader, opener in (("zarr-python", _open_zarr), ("tensorstore", _open_tensorstore)):
        try:
            studies = [
                [opener(folder / HIERARCHY / r.study_id / c / "0") for c in r.contrasts]
                for r in records
            ]
        except ImportError:
            continue

        def whole(item: int, studies: Any = studies) -> object:
            return [np.asarray(array[...]) for array in studies[item % len(studies)]]

        def crop(item: int, studies: Any = studies) -> object:
            start = _start(records[0].shape, item)
            box = tuple(slice(a, a + n) for a, n in zip(start, CROP_VOX, strict=True))
            return [np.asarray(array[box]) for array in studies[item % len(studies)]]

        ways |= {(name, "whole", reader): whole, (name, "crop", reader): crop}
    return ways


def _open_zarr(path: Path) -> Any:
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.open_array(str(path), mode="r")


class _Tensorstore:
    """An array of tensorstore that reads when it is indexed, like the others."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getitem__(self, box: Any) -> Any:
        return self._array[box].read().result()


def _open_tensorstore(path: Path) -> _Tensorstore:
    import tensorstore

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "context": {"data_copy_concurrency": {"limit": 1}},
    }
    return _Tensorstore(tensorstore.open(spec, open=True, read=True).result())


def _start(shape: tuple[int, int, int], item: int) -> tuple[int, int, int]:
    """Draw where a crop begins; the same for every way of an item."""
    rng = np.random.default_rng(item)
    x, y, z = (int(rng.integers(0, n - c + 1)) for n, c in zip(shape, CROP_VOX, strict=True))
    return (x, y, z)


def _patches(record: StudyRecord) -> dict[str, Any]:
    total = int(np.prod([n // p for n, p in zip(record.shape, PATCH_VOX, strict=True)]))
    rng = np.random.default_rng(0)
    count = int(PATCH_SHARE * total)
    return {c: np.sort(rng.permutation(total)[:count]) for c in record.contrasts}


def _num_bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern))
