"""The two tables of a Zarr store: `index.parquet` (every array, every chunk) and `dataset.json`.

`index.parquet` has one row per array, studies in manifest order, then one row per study with the
record and the hash of its group's metadata. `dataset.json` is written last and is the commit. What
a table says is held against limits before anything is allocated or opened after it.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anycontrast_datasets.store.byte_source import ByteSource
from anycontrast_datasets.store.codec import HEADER_BYTES
from anycontrast_datasets.store.partial import Vox3
from anycontrast_datasets.store.volume_index import (
    INDEX_NAME,
    KEY_PATTERN,
    read_hashed_table,
)
from anycontrast_datasets.store.zarr_metadata import ArrayLayout
from anycontrast_datasets.store.zarr_shard import CRC_BYTES, ChunkTable
from anycontrast_datasets.study import ShardError

ZARR_VERSION = 1
KIND = "zarr"
AGAIN = "run `anycontrast zarr` again"
MAX_ARRAY_BYTES = 2**31
"""Of one decoded array: what a hostile table may make a reader allocate."""

INDEX_SCHEMA = pa.schema(
    [
        ("study_id", pa.string()),
        ("contrast", pa.string()),
        ("resolution", pa.int8()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("chunk", pa.list_(pa.int32())),
        ("fill", pa.int32()),
        ("codec", pa.string()),
        ("level", pa.int8()),
        ("chunk_bytes", pa.list_(pa.int64())),
        ("chunk_xxh3", pa.list_(pa.uint64())),
        ("sha256", pa.string()),
        ("record", pa.string()),
    ],
    metadata={"zarr_version": str(ZARR_VERSION)},
)


@dataclass(frozen=True, kw_only=True)
class ArrayRow:
    """One array of a study, or its record."""

    study_id: str
    contrast: str
    """Vocabulary name, "label", or "study.json" for the record."""
    sha256: str
    """Of the shard; of the study's own `zarr.json` for the record."""
    resolution: int = 0
    dtype: str = ""
    shape: tuple[int, ...] = ()
    chunk: tuple[int, ...] = ()
    fill: int = 0
    codec: str = ""
    level: int = 0
    chunk_bytes: tuple[int, ...] = ()
    chunk_xxh3: tuple[int, ...] = ()
    record: str | None = None
    """The record's text; only on its own row."""

    @property
    def where(self) -> str:
        """Names the array in messages."""
        return f"study {self.study_id}, array {self.contrast}/{self.resolution}"

    @property
    def layout(self) -> ArrayLayout:
        """How the array lies on disk, after holding the row against the limits.

        Raises:
            ShardError: If no array of ours can be laid out so.
        """
        shape, chunk = _vox3(self.shape), _vox3(self.chunk)
        item_bytes = {"int16": 2, "uint8": 1}.get(self.dtype, 0)
        if not (
            shape
            and chunk
            and item_bytes
            and self.codec in ("zstd", "lz4")
            and all(c <= n for c, n in zip(chunk, shape, strict=True))
            and item_bytes * math.prod(shape) <= MAX_ARRAY_BYTES
        ):
            raise ShardError(
                f"{self.where}: must be int16 or uint8 with three sides and chunks within them, at "
                f"most {MAX_ARRAY_BYTES} bytes, the index says {self.dtype!r} {self.shape} in "
                f"chunks of {self.chunk} by {self.codec!r}; {AGAIN}"
            )
        return ArrayLayout(
            shape=shape,
            dtype="int16" if item_bytes == 2 else "uint8",
            chunk=chunk,
            fill=self.fill,
            codec="zstd" if self.codec == "zstd" else "lz4",
            level=self.level,
        )

    @property
    def table(self) -> ChunkTable:
        """Sizes and checksums of the chunks.

        Raises:
            ShardError: If they are not as many as the layout has, or too small or large to be.
        """
        layout = self.layout
        largest = 2 * math.prod(layout.chunk) * 2 + 4096
        smallest = HEADER_BYTES + CRC_BYTES
        if not len(self.chunk_bytes) == len(self.chunk_xxh3) == layout.num_chunks or not all(
            smallest <= n <= largest for n in self.chunk_bytes
        ):
            raise ShardError(
                f"{self.where}: must have {layout.num_chunks} chunks of {smallest} to {largest} "
                f"bytes, the index lists {len(self.chunk_bytes)} and {len(self.chunk_xxh3)}; "
                f"{AGAIN}"
            )
        return ChunkTable(tuple(self.chunk_bytes), tuple(self.chunk_xxh3))


def row_to_dict(row: ArrayRow) -> dict[str, Any]:
    """Return a JSON-ready copy."""
    lists = ("shape", "chunk", "chunk_bytes", "chunk_xxh3")
    return {k: list(v) if k in lists else v for k, v in asdict(row).items()}


def row_from_dict(values: Mapping[str, Any]) -> ArrayRow:
    """Inverse of `row_to_dict`.

    Raises:
        ShardError: If the study's id could not be a folder of the store.
    """
    lists = ("shape", "chunk", "chunk_bytes", "chunk_xxh3")
    fields: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in values.items()}
    row = ArrayRow(**fields)
    if not KEY_PATTERN.fullmatch(row.study_id):
        raise ShardError(
            f"opening the zarr store: a study id must match {KEY_PATTERN.pattern}, the index has "
            f"{row.study_id[:80]!r}; {AGAIN}"
        )
    return row


def index_bytes(rows: list[ArrayRow]) -> bytes:
    """Return the rows as a Parquet file."""
    table = pa.Table.from_pylist([row_to_dict(row) for row in rows], schema=INDEX_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def check_version(dataset: Mapping[str, Any], shown: str) -> None:
    """Refuse a Zarr store that a newer version wrote.

    Args:
        dataset: Content of `dataset.json`.
        shown: The store, for messages.

    Raises:
        ShardError: If the version is newer, or there is none.
    """
    version = dataset.get("zarr_version")
    if dataset.get("kind") != KIND or not isinstance(version, int):
        raise ShardError(
            f"opening the zarr store: {shown} is of kind {str(dataset.get('kind'))[:40]!r} and "
            f"version {str(version)[:40]!r}; {AGAIN}"
        )
    if version > ZARR_VERSION:
        raise ShardError(
            f"opening the zarr store: {shown} has version {version}, newer than {ZARR_VERSION}, "
            f"the newest this installation reads; upgrade anycontrast or {AGAIN}"
        )


def read_index(source: ByteSource, sha256: str) -> pa.Table:
    """Read `index.parquet` as a table with the columns of `INDEX_SCHEMA`.

    Raises:
        ShardError: If it is missing or is not the index that was written.
    """
    what = f"opening the zarr store: {INDEX_NAME} in {source.shown}"
    table = read_hashed_table(source, sha256, INDEX_SCHEMA, what=what, again=AGAIN)
    if any(table[name].null_count for name in INDEX_SCHEMA.names if name != "record"):
        raise ShardError(f"{what} has empty fields; {AGAIN}")
    return table


def _vox3(values: tuple[int, ...]) -> Vox3 | None:
    if len(values) != 3 or min(values) < 1:
        return None
    return (values[0], values[1], values[2])
