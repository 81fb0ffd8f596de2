"""The volume store: studies out of tar shards by byte range, every byte checked.

In: the shards `shard.py` wrote, in a folder or behind an address. Out: `StudyArrays`, a crop, or
patches. One study is one read of adjacent members, one checksum each, and one blosc decode straight
into the array that is handed out: 10 ms of CPU and 13 MB for four contrasts of 160 x 192 x 160, 8
of them blosc's, against 15 ms through a tar reader. Nothing is taken from the tar's own headers; a
tar that was cut, shifted or swapped cannot pass for a study with fewer contrasts, because the index
says what each study has. Bytes from an address that prove wrong are asked for again before they are
an error.

Threads share one store; a fork or a pickle of it needs no care.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.store.byte_source import ByteSource, LocalSource
from anycontrast_datasets.store.cache import CacheConfig, CachedSource
from anycontrast_datasets.store.codec import checksum, decode_into
from anycontrast_datasets.store.index_check import check_index, check_shards, study_spans
from anycontrast_datasets.store.partial import clip_box, gather_patches, wanted_contrasts, with_only
from anycontrast_datasets.store.slabs import decode_planes
from anycontrast_datasets.store.slots import scratch_array, slot_array
from anycontrast_datasets.store.study_records import StudyRecords
from anycontrast_datasets.store.verify import verify_shards
from anycontrast_datasets.store.volume_index import (
    AGAIN,
    LABEL_MEMBER,
    MemberRow,
    member_from_dict,
    read_dataset,
    read_index,
)
from anycontrast_datasets.study import ShardError, StudyArrays, StudyRecord

logger = logging.getLogger(__name__)

Vox3 = tuple[int, int, int]
Codes = npt.NDArray[np.int16]
_NEAR_BYTES = 2**20
"""Fetched along rather than left out between two pieces."""


class VolumeStore:
    """A finished set of shards.

    Args:
        source: Folder, or source of the files: `dataset.json`, `index.parquet` and the shards.
        dataset: What `dataset.json` holds, if it has been read.
        cache: Where to keep the studies' bytes; None, or one without a folder, keeps nothing.

    Raises:
        ShardError: If `dataset.json` or the index is missing, damaged or of another schema, a
            shard of a local folder is missing or has not the size that was written, or the cache
            cannot be used.
    """

    def __init__(
        self,
        source: ByteSource | Path,
        *,
        dataset: dict[str, Any] | None = None,
        cache: CacheConfig | None = None,
    ) -> None:
        self._origin: ByteSource = LocalSource(source) if isinstance(source, Path) else source
        self._source = self._origin
        self.dataset = read_dataset(self._source) if dataset is None else dataset
        shown = self._source.shown
        self._shards = check_shards(self.dataset.get("shards"), shown)
        self._index = read_index(self._source, str(self.dataset.get("index_sha256")))
        self._ends = check_index(self._index, self._shards, shown)
        if self._source.is_local:
            self._check_sizes()
        if cache is not None and cache.folder is not None:
            starts, stops = study_spans(self._index, self._ends)
            hashes = {str(s["name"]): str(s["sha256"]) for s in self.dataset["shards"]}
            largest_bytes = int((stops - starts).max(initial=0))
            self._source = CachedSource(self._source, cache, hashes, largest_bytes)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def fingerprint(self) -> str:
        """Names the content and the order of the studies."""
        return str(self.dataset["fingerprint"])

    @cached_property
    def records(self) -> StudyRecords:
        """Every study, in manifest order; parsed when asked for."""
        return StudyRecords(self._index["record"].take(self._ends - 1), self._contrasts)

    def read(
        self,
        index: int,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
        out: Mapping[str, Codes] | None = None,
    ) -> StudyArrays:
        """Return one study.

        Args:
            index: Position in `records`.
            contrasts: Names to read, all of which the study has; None reads every one. The result
                keeps the stored order, and its record lists only these.
            label: Read the label too, if the study has one.
            out: Contrast -> int16 memory to decode into, see `slots.slot_array`; the codes
                returned lie in it and change when it is used again.

        Raises:
            ShardError: If a shard cannot be read, a byte is not the one that was written, or the
                members do not match the study's record. Names shard, study and member.
            IndexError: If there is no such study.
            ValueError: If a slot does not fit.
        """
        rows = self._members(index)
        record = self._record(index, rows)
        names = wanted_contrasts(record, contrasts)
        codes: dict[str, Codes] = {}
        stored_label: npt.NDArray[np.uint8] | None = None
        for row, block in self._fetch(_chosen(rows, names, label), rows):
            if row.contrast == LABEL_MEMBER:
                stored_label = np.empty(row.shape, dtype=np.uint8)
                _decode(row, block, stored_label)
            else:
                codes[row.contrast] = slot_array(out, row.contrast, row.shape)
                _decode(row, block, codes[row.contrast])
        return StudyArrays(with_only(record, names), codes, stored_label)

    def read_crop(
        self,
        index: int,
        start_vox: Vox3,
        size_vox: Vox3,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
    ) -> StudyArrays:
        """Return the part of a study inside a box; the record's shape stays the whole study's.

        Whole members are read and checked, and of them the planes of the box decoded.

        Raises:
            ShardError: As `read`.
            ValueError: If the box lies outside, see `partial.clip_box`.
        """
        rows = self._members(index)
        record = self._record(index, rows)
        first, end = clip_box(record.shape, start_vox, size_vox)
        (x0, y0, z0), (x1, y1, z1) = first, end
        names = wanted_contrasts(record, contrasts)
        codes: dict[str, Codes] = {}
        stored_label: npt.NDArray[np.uint8] | None = None
        for row, block in self._fetch(_chosen(rows, names, label), rows):
            if row.contrast == LABEL_MEMBER:
                whole = np.empty(row.shape, dtype=np.uint8)
                _decode(row, block, whole)
                stored_label = whole[x0:x1, y0:y1, z0:z1].copy()
            else:
                try:
                    planes = decode_planes(block, record.shape, x0, x1)
                except ValueError as error:
                    raise ShardError(f"{_where(row)}: {error}; {AGAIN}") from error
                codes[row.contrast] = planes[:, y0:y1, z0:z1].copy()
        return StudyArrays(with_only(record, names), codes, stored_label)

    def read_patches(
        self, index: int, patch_vox: Vox3, patches: Mapping[str, npt.NDArray[np.int64]]
    ) -> dict[str, Codes]:
        """Return [N, P] int16 per contrast, in stored order; see `StudyStore.read_patches`.

        Raises:
            ShardError: As `read`.
            ValueError: If an index lies outside the patch grid.
        """
        rows = self._members(index)
        record = self._record(index, rows)
        found = {}
        for row, block in self._fetch(
            _chosen(rows, wanted_contrasts(record, tuple(patches)), label=False), rows
        ):
            codes_XYZ = scratch_array(record.shape)
            _decode(row, block, codes_XYZ)
            found[row.contrast] = gather_patches(codes_XYZ, patch_vox, patches[row.contrast])
        return found

    def announce(self, index: int, contrasts: Sequence[str]) -> None:
        """Say that a study will be read soon; see `Announcer.announce`."""
        if not isinstance(self._source, LocalSource):
            return
        rows = self._members(index)
        record, wanted = rows[-1], _chosen(rows, list(contrasts), label=False)
        start, stop = wanted[0].offset, wanted[-1].offset + wanted[-1].bytes
        end = record.offset + record.bytes
        if record.offset - stop < _NEAR_BYTES:
            self._source.announce(record.shard, start, end)
        else:
            self._source.announce(record.shard, start, stop)
            self._source.announce(record.shard, record.offset, end)

    def verify(self) -> list[str]:
        """Read every shard; return one line per shard that is not what was written."""
        return verify_shards(self._origin, self.dataset["shards"], self._index)

    def close(self) -> None:
        """Release what is held open; reading again opens it again."""
        self._source.close()

    def _check_sizes(self) -> None:
        for name, num_bytes in self._shards.items():
            try:
                found = self._source.size(name)
            except FileNotFoundError:
                raise ShardError(
                    f"opening shards: shard {name}: missing from {self._source.shown}; {AGAIN}"
                ) from None
            if found != num_bytes:
                raise ShardError(
                    f"opening shards: shard {name}: must have {num_bytes} bytes, found {found}; "
                    f"{AGAIN}"
                )

    def _contrasts(self) -> tuple[tuple[str, ...], ...]:
        names = self._index["contrast"].to_pylist()
        starts = [0, *self._ends[:-1].tolist()]
        return tuple(
            tuple(name for name in names[start : end - 1] if name != LABEL_MEMBER)
            for start, end in zip(starts, self._ends.tolist(), strict=True)
        )

    def _members(self, index: int) -> list[MemberRow]:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"study {index} of {len(self._ends)}")
        first = int(self._ends[index - 1]) if index else 0
        rows = self._index.slice(first, int(self._ends[index]) - first).to_pylist()
        return [member_from_dict(row) for row in rows]

    def _record(self, index: int, rows: list[MemberRow]) -> StudyRecord:
        """Return the record of a study after comparing it with the members that it should have."""
        record = self.records[index]
        expected = [(name, "int16") for name in record.contrasts]
        if record.has_label:
            expected.append((LABEL_MEMBER, "uint8"))
        found = [(row.contrast, row.dtype) for row in rows[:-1]]
        shapes = {tuple(row.shape) for row in rows[:-1]}
        if found != expected or shapes != {record.shape}:
            raise ShardError(
                f"{_where(rows[-1])}: the index must list {expected} of shape {record.shape}, "
                f"lists {found} of {sorted(shapes)}; {AGAIN}"
            )
        return record

    def _fetch(
        self, wanted: list[MemberRow], rows: list[MemberRow]
    ) -> list[tuple[MemberRow, memoryview]]:
        """Read the wanted members and the record; ask again for bytes that prove wrong."""
        for attempt in range(1, self._source.tries + 1):
            parts = self._read_parts(wanted, rows, again=attempt > 1)
            problem = _problem(wanted, rows[-1], parts)
            if not problem:
                return list(zip(wanted, parts[:-1], strict=True))
            if attempt < self._source.tries:
                logger.warning("%s; asking again", problem)
        raise ShardError(f"{problem}; the shard was damaged after it was written; {AGAIN}")

    def _read_parts(
        self, wanted: list[MemberRow], rows: list[MemberRow], *, again: bool
    ) -> list[memoryview]:
        """Return the bytes of the wanted members, then those of the record: one read or two."""
        record_row = rows[-1]
        start, span_end = wanted[0].offset, wanted[-1].offset + wanted[-1].bytes
        end = record_row.offset + record_row.bytes
        unit = (rows[0].offset, end)
        name, source = record_row.shard, self._source
        try:
            if not source.is_local or end - span_end <= 4 * record_row.bytes:
                block = source.read(name, start, end, unit=unit, again=again)
                text = block[record_row.offset - start :]
            else:
                block = source.read(name, start, span_end, unit=unit, again=again)
                text = source.read(name, record_row.offset, end, unit=unit, again=again)
        except ShardError as error:
            remedy = f"; {AGAIN}" if source.is_local else ""
            where = f"shard {name}, study {record_row.study_id}"
            raise ShardError(f"{where}: {error}{remedy}", code=error.code) from error
        parts = [block[row.offset - start : row.offset - start + row.bytes] for row in wanted]
        return [*parts, text]


def _chosen(rows: list[MemberRow], names: list[str], label: bool) -> list[MemberRow]:
    """Return the rows of the named contrasts, and that of the label if wanted, in stored order."""
    wanted = {*names, LABEL_MEMBER} if label else names
    return [row for row in rows[:-1] if row.contrast in wanted]


def _problem(wanted: list[MemberRow], record_row: MemberRow, parts: list[memoryview]) -> str:
    """Compare every checksum, and the record with the index; return what is wrong, or nothing."""
    for row, part in zip([*wanted, record_row], parts, strict=True):
        found = checksum(part)
        if found != row.xxh3_64:
            return f"{_where(row)}: xxh3 must be {row.xxh3_64}, found {found}"
    if bytes(parts[-1]) != (record_row.record or "").encode():
        return f"{_where(record_row)}: differs from the record in the index"
    return ""


def _where(row: MemberRow) -> str:
    return f"shard {row.shard}, study {row.study_id}, member {row.contrast}"


def _decode(row: MemberRow, block: memoryview, out: Codes | npt.NDArray[np.uint8]) -> None:
    try:
        decode_into(block, out)
    except ValueError as error:
        raise ShardError(f"{_where(row)}: {error}; {AGAIN}") from error
