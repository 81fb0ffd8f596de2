"""The two files beside the shards: `index.parquet` (where every member lies) and `dataset.json`.

`index.parquet` has one row per member, studies in manifest order, members of a study in the order
of the tar, `study.json` last; its row carries the record itself, so opening a store reads no tar.
`dataset.json` is written last and is the commit: without it there is no data set. It says what was
made of what (fingerprints, counts, configuration, refusals) and names no path and no person.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anycontrast_datasets.store.byte_source import ByteSource
from anycontrast_datasets.study import ShardError

SCHEMA_VERSION = 2
"""1 had a fingerprint that depended on the layout."""
KIND = "volume"
"""Of a store whose `dataset.json` names none."""
INDEX_NAME = "index.parquet"
DATASET_NAME = "dataset.json"
RECORD_MEMBER = "study.json"
LABEL_MEMBER = "label"
KEY_PATTERN = re.compile(r"[a-z0-9_-]{1,64}")
"""Study ids that may become a member name: webdataset cuts a key at the first dot."""
MAX_DATASET_BYTES = 64 * 2**20
MAX_INDEX_BYTES = 4 * 2**30
"""Limits on tables that come from outside; a million studies need a quarter of them."""
AGAIN = "run `anycontrast shard` again"

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("study_id", pa.string()),
        ("contrast", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("xxh3_64", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("dtype", pa.string()),
        ("record", pa.string()),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)


@dataclass(frozen=True, kw_only=True)
class MemberRow:
    """Where one member of a shard lies."""

    shard: str
    study_id: str
    contrast: str
    """Vocabulary name, "label", or "study.json" for the record."""
    offset: int
    """First byte of the payload in the tar."""
    bytes: int
    xxh3_64: str
    """16 hexadecimal digits."""
    shape: tuple[int, ...]
    """Voxels; empty for the record."""
    dtype: str
    """`int16`, `uint8`, or `json`."""
    record: str | None = None
    """The record's text; only on its own row."""


def member_to_dict(row: MemberRow) -> dict[str, Any]:
    """Return a JSON-ready copy."""
    return {**asdict(row), "shape": list(row.shape)}


def member_from_dict(values: Mapping[str, Any]) -> MemberRow:
    """Inverse of `member_to_dict`."""
    return MemberRow(**{**values, "shape": tuple(values["shape"])})


def index_bytes(rows: Sequence[MemberRow]) -> bytes:
    """Return the rows as a Parquet file."""
    table = pa.Table.from_pylist([member_to_dict(row) for row in rows], schema=INDEX_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_dataset(source: ByteSource) -> dict[str, Any]:
    """Read `dataset.json` of a store of any kind; the schema is checked for volume stores only.

    Raises:
        ShardError: If it is missing, damaged, or a volume store of another schema.
    """
    where = f"{source.shown}/{DATASET_NAME}"
    try:
        content = source.read_all(DATASET_NAME, MAX_DATASET_BYTES)
    except FileNotFoundError:
        raise ShardError(
            f"opening shards: {source.shown} must hold {DATASET_NAME}, which is written last, and "
            f"does not; {AGAIN} (finished shards are kept), or point at the folder it wrote"
        ) from None
    try:
        values = json.loads(content)
        if values.get("kind", KIND) != KIND:
            return dict(values)
        version = int(values["schema_version"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"opening shards: {where} is damaged ({error}); {AGAIN}") from error
    if version > SCHEMA_VERSION:
        raise ShardError(
            f"opening shards: {where} has schema version {version}, newer than {SCHEMA_VERSION}, "
            f"the newest this installation reads; upgrade anycontrast or {AGAIN}"
        )
    if version < SCHEMA_VERSION:
        raise ShardError(
            f"opening shards: {where} has schema version {version}, from before {SCHEMA_VERSION}, "
            f"the only one this installation reads; {AGAIN}"
        )
    return dict(values)


def read_index(source: ByteSource, sha256: str) -> pa.Table:
    """Read `index.parquet` as a table with the columns of `INDEX_SCHEMA`.

    Args:
        source: Where the store lies.
        sha256: Of the index, from `dataset.json`.

    Raises:
        ShardError: If it is missing or is not the index that was written.
    """
    what = f"opening shards: the index {source.shown}/{INDEX_NAME}"
    return read_hashed_table(source, sha256, INDEX_SCHEMA, what=what, again=AGAIN)


def read_hashed_table(
    source: ByteSource, sha256: str, schema: pa.Schema, *, what: str, again: str
) -> pa.Table:
    """Read `index.parquet` of a store of any kind, if it is the one that was written.

    Args:
        source: Where the store lies.
        sha256: Of the index, from `dataset.json`.
        schema: Columns to read.
        what: Begins every message: what is being done, and with which file.
        again: Ends every message: what makes the index anew.

    Raises:
        ShardError: If it is missing, another one, or not a table of these columns.
    """
    try:
        content = source.read_all(INDEX_NAME, MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise ShardError(f"{what} is missing; {again}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ShardError(f"{what} must have sha256 {sha256[:16]}, found {found[:16]}; {again}")
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        num_bytes = sum(group.total_byte_size for group in groups)
        if num_bytes > MAX_INDEX_BYTES:
            raise ValueError(f"it unpacks to {num_bytes} bytes")
        return file.read(columns=schema.names).cast(schema).combine_chunks()
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        raise ShardError(f"{what} is not one of ours ({error}); {again}") from error


def sha256_json(values: object) -> str:
    """Return sha256 of plain values: equal values, equal hash."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
