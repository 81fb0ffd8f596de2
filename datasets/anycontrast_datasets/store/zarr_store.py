"""The Zarr store, read without a Zarr library: studies, crops and patches, every byte checked.

In: the folder `write_zarr_store` wrote, or its address. What an array is and where its chunks lie
comes from `index.parquet`, not from the `zarr.json` files: one ranged read per run of neighbouring
chunks, one checksum and one blosc decode per chunk. So a missing shard, which Zarr libraries take
for fill values, is an error here; so are a flipped bit, a chunk of another array, and a study with
fewer contrasts than its record. `verify` also makes every `zarr.json` again and compares.

Threads share one store; it holds no open file and no buffer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from anycontrast_datasets.store.byte_source import ByteSource, LocalSource
from anycontrast_datasets.store.cache import CacheConfig
from anycontrast_datasets.store.codec import Codes
from anycontrast_datasets.store.partial import (
    Vox3,
    check_patches,
    clip_box,
    gather_patches,
    wanted_contrasts,
    with_only,
)
from anycontrast_datasets.store.slots import scratch_array, slot_array
from anycontrast_datasets.store.study_records import StudyRecords
from anycontrast_datasets.store.volume_index import RECORD_MEMBER, read_dataset
from anycontrast_datasets.store.zarr_index import (
    AGAIN,
    ArrayRow,
    check_version,
    read_index,
    row_from_dict,
)
from anycontrast_datasets.store.zarr_metadata import (
    CHUNK_KEY,
    HIERARCHY,
    LABEL,
    image_path,
    root_metadata,
)
from anycontrast_datasets.store.zarr_shard import ShardFile, decode_box
from anycontrast_datasets.store.zarr_verify import strangers, study_problems
from anycontrast_datasets.study import ShardError, StudyArrays, StudyRecord


class ZarrStore:
    """A finished Zarr store.

    Args:
        source: Folder or address with `dataset.json`, `index.parquet` and `studies.zarr/`.
        dataset: Content of `dataset.json` if it was read already.
        cache: Where to keep what was fetched; None fetches anew.

    Raises:
        ShardError: If a table is missing, damaged, hostile or of a newer version.
    """

    def __init__(
        self,
        source: ByteSource,
        *,
        dataset: Mapping[str, Any] | None = None,
        cache: CacheConfig | None = None,
    ) -> None:
        self.dataset = dict(read_dataset(source) if dataset is None else dataset)
        check_version(self.dataset, source.shown)
        self._index = read_index(source, str(self.dataset.get("index_sha256")))
        is_record = pc.equal(self._index["contrast"], RECORD_MEMBER).to_numpy()
        self._ends = np.flatnonzero(is_record) + 1
        if self._index.num_rows != (self._ends[-1] if len(self._ends) else 0):
            raise ShardError(f"opening the zarr store: its last study has no record; {AGAIN}")
        self.records = StudyRecords(
            self._index["record"].take(self._ends - 1), self._contrasts_of_all
        )
        self._origin = source
        self._source = source
        if cache is not None and cache.folder is not None:
            self._source = self._cached(source, cache)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def fingerprint(self) -> str:
        """Of the store it was made from: same studies, same voxels, same order."""
        return str(self.dataset["fingerprint"])

    def read(
        self,
        index: int,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
        out: Mapping[str, npt.NDArray[np.int16]] | None = None,
    ) -> StudyArrays:
        """Return one study; see `StudyStore.read`.

        Raises:
            ShardError: If an array cannot be read, a byte is not the one that was written, or the
                arrays do not match the study's record. Names study, array and chunk.
            IndexError: If there is no such study.
        """
        record, arrays = self._study(index)
        whole = ((0, 0, 0), record.shape)
        codes = {}
        for name in wanted_contrasts(record, contrasts):
            codes[name] = slot_array(out, name, record.shape)
            self._decode(arrays[name], record, whole, codes[name])
        stored = self._read_label(arrays, record, whole) if label and record.has_label else None
        return StudyArrays(record=with_only(record, codes), codes=codes, label=stored)

    def read_crop(
        self,
        index: int,
        start_vox: Vox3,
        size_vox: Vox3,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
    ) -> StudyArrays:
        """Return the part of a study inside a box, reading only the chunks it touches.

        Raises:
            ShardError: As `read`.
            ValueError: If the crop is malformed or lies outside the study.
        """
        record, arrays = self._study(index)
        first, end = clip_box(record.shape, start_vox, size_vox)
        size = tuple(b - a for a, b in zip(first, end, strict=True))
        codes = {}
        for name in wanted_contrasts(record, contrasts):
            codes[name] = np.empty(size, dtype=np.int16)
            self._decode(arrays[name], record, (first, end), codes[name])
        stored = (
            self._read_label(arrays, record, (first, end)) if label and record.has_label else None
        )
        return StudyArrays(record=with_only(record, codes), codes=codes, label=stored)

    def read_patches(
        self, index: int, patch_vox: Vox3, patches: Mapping[str, npt.NDArray[np.int64]]
    ) -> dict[str, npt.NDArray[np.int16]]:
        """Return [N, P] int16 per contrast, reading only the chunks that hold the patches.

        Raises:
            ShardError: As `read`.
            ValueError: If an index lies outside the patch grid.
        """
        record, arrays = self._study(index)
        found = {}
        for name in wanted_contrasts(record, tuple(patches)):
            index_N = np.asarray(patches[name], dtype=np.int64)
            check_patches(record.shape, patch_vox, index_N)
            layout = arrays[name].layout
            numbers = _chunks_of(index_N, patch_vox, record.shape, layout.chunk, layout.grid)
            # What lay there before stays where no patch is.
            codes = scratch_array(record.shape)
            self._decode(arrays[name], record, ((0, 0, 0), record.shape), codes, numbers)
            found[name] = gather_patches(codes, patch_vox, index_N)
        return found

    def verify(self) -> list[str]:
        """Hash every file and compare it with what was written; one line per problem."""
        problems = []
        try:
            root = self._origin.read_all(f"{HIERARCHY}/zarr.json", 2**20)
        except (FileNotFoundError, ShardError) as error:
            root = str(error).encode()
        if root != root_metadata():
            problems.append(f"{HIERARCHY}/zarr.json: is not the one that was written; {AGAIN}")
        for index in range(len(self)):
            rows = self._rows(index)
            try:
                self._check(rows, self.records[index])
                problems += study_problems(self._origin, rows)
                if isinstance(self._origin, LocalSource):
                    problems += strangers(self._origin, rows)
            except ShardError as error:
                problems.append(str(error))
        return problems

    def close(self) -> None:
        """Release what is held open; reading again opens it again."""
        self._source.close()

    def _rows(self, index: int) -> list[ArrayRow]:
        """Return the rows of a study, its record last."""
        if not 0 <= index < len(self._ends):
            raise IndexError(f"study {index} of {len(self._ends)}")
        first = int(self._ends[index - 1]) if index else 0
        rows = self._index.slice(first, int(self._ends[index]) - first).to_pylist()
        return [row_from_dict(row) for row in rows]

    def _study(self, index: int) -> tuple[StudyRecord, dict[str, ArrayRow]]:
        """Return a record and the full-size arrays that it promises."""
        rows = self._rows(index)
        record = self.records[index]
        self._check(rows, record)
        return record, {row.contrast: row for row in rows[:-1] if row.resolution == 0}

    def _check(self, rows: list[ArrayRow], record: StudyRecord) -> None:
        """Compare the rows of a study with its record, and with what an array of ours can be."""
        expected = [(name, "int16") for name in record.contrasts]
        if record.has_label:
            expected.append((LABEL, "uint8"))
        full = [row for row in rows[:-1] if row.resolution == 0]
        found = [(row.contrast, row.dtype) for row in full]
        shapes = {tuple(row.shape) for row in full}
        ids = {row.study_id for row in rows}
        if found != expected or shapes != {record.shape} or ids != {record.study_id}:
            raise ShardError(
                f"study {record.study_id}: the index must list {expected} of shape {record.shape}, "
                f"lists {found} of {sorted(shapes)} for {sorted(ids)}; {AGAIN}"
            )
        for row in full:
            assert row.layout.shape == record.shape

    def _decode(
        self,
        row: ArrayRow,
        record: StudyRecord,
        box: tuple[Vox3, Vox3],
        out: Codes,
        numbers: Sequence[int] | None = None,
    ) -> None:
        name = f"{HIERARCHY}/{image_path(record, row.contrast)}/{row.resolution}/{CHUNK_KEY}"
        shard = ShardFile(self._source, name, row.layout, row.table)
        try:
            decode_box(shard, box, out, numbers=numbers)
        except ShardError as error:
            raise ShardError(f"{row.where}: {error}; {AGAIN}", code=error.code) from error
        except ValueError as error:
            raise ShardError(f"{row.where}, {error}; {AGAIN}") from error

    def _read_label(
        self, arrays: Mapping[str, ArrayRow], record: StudyRecord, box: tuple[Vox3, Vox3]
    ) -> npt.NDArray[np.uint8]:
        size = tuple(b - a for a, b in zip(*box, strict=True))
        found = np.empty(size, dtype=np.uint8)
        self._decode(arrays[LABEL], record, box, found)
        return found

    def _contrasts_of_all(self) -> tuple[tuple[str, ...], ...]:
        names = self._index["contrast"].to_pylist()
        is_full = (self._index["resolution"].to_numpy() == 0).tolist()
        starts = [0, *self._ends[:-1].tolist()]
        return tuple(
            tuple(
                names[row] for row in range(start, end - 1) if is_full[row] and names[row] != LABEL
            )
            for start, end in zip(starts, self._ends.tolist(), strict=True)
        )

    def _cached(self, source: ByteSource, cache: CacheConfig) -> ByteSource:
        from anycontrast_datasets.store.cache import CachedSource

        hashes, largest = {}, 0
        for index, record in enumerate(self.records):
            for row in self._rows(index)[:-1]:
                path = f"{image_path(record, row.contrast)}/{row.resolution}/{CHUNK_KEY}"
                hashes[f"{HIERARCHY}/{path}"] = row.sha256
                largest = max(largest, row.table.shard_bytes)
        return CachedSource(source, cache, hashes, largest)


def _chunks_of(
    index_N: npt.NDArray[np.int64], patch_vox: Vox3, shape: Vox3, chunk: Vox3, grid: Vox3
) -> list[int]:
    """Return the numbers, ascending, of the chunks that any of the patches touches."""
    patches = [-(-n // p) for n, p in zip(shape, patch_vox, strict=True)]
    touched = np.zeros(grid, dtype=np.bool_)
    at_3N = np.unravel_index(np.unique(index_N), patches)
    firsts = [at * p // c for at, p, c in zip(at_3N, patch_vox, chunk, strict=True)]
    lasts = [
        np.minimum((at + 1) * p - 1, n - 1) // c
        for at, p, n, c in zip(at_3N, patch_vox, shape, chunk, strict=True)
    ]
    reach = [int((b - a).max(initial=0)) for a, b in zip(firsts, lasts, strict=True)]
    for step in np.ndindex(*(r + 1 for r in reach)):
        at = tuple(np.minimum(a + s, b) for a, b, s in zip(firsts, lasts, step, strict=True))
        touched[at] = True
    numbers: list[int] = np.flatnonzero(touched).tolist()
    return numbers
