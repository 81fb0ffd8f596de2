"""Parquet files that notice damage: every column carries a hash, checked when it is read.

In: Arrow tables, batch by batch, so that a million rows need no more memory than one batch. Out: a
file written whole or not at all. A reader names the columns it wants; only those are decoded and
only their hashes are compared, on top of the checksums Parquet keeps per page. The hash of a column
follows its content alone, not batches, row groups, compression or the library that wrote it; the
fingerprint of a file is the SHA-256 over the hashes of all columns.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from anycontrast_datasets.disk import FULL
from anycontrast_datasets.files import sync_path
from anycontrast_datasets.manifest_schema import SCHEMA_VERSION
from anycontrast_datasets.study import ManifestError

ROW_GROUP = 16384
"""Rows; what one `ManifestTable.study` decodes."""

_VERSION_KEY = b"anycontrast.schema_version"
_FINGERPRINT_KEY = b"anycontrast.fingerprint"
_COLUMNS_KEY = b"anycontrast.columns"


@dataclass
class ColumnHashes:
    """Running hashes of the columns of a table that arrives in batches.

    A nested column is hashed level by level: which values are missing, how long every list or text
    is, and the values themselves, each in a stream of its own.
    """

    schema: pa.Schema
    _streams: dict[str, Any] = field(default_factory=dict)
    _leaves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of a leaf -> the streams from the root down to it."""

    def update(self, table: pa.Table) -> None:
        """Add rows; `table` has the schema's columns, or some of them."""
        for name in table.column_names:
            column = self.schema.field(name)
            chunks = table.column(name).chunks or [pa.array([], table.schema.field(name).type)]
            for chunk in chunks:
                self._feed(chunk, column, name, ())

    def digests(self) -> dict[str, str]:
        """Return the hash of every leaf, 32 hexadecimal digits; leaves are named `volumes.face`."""
        done = {name: stream.digest() for name, stream in self._streams.items()}
        return {
            leaf: xxhash.xxh3_128_hexdigest(b"".join(done[name] for name in names))
            for leaf, names in sorted(self._leaves.items())
        }

    def _feed(self, array: pa.Array, column: pa.Field, name: str, above: tuple[str, ...]) -> None:
        kind = array.type
        if column.nullable:
            above = self._add(f"{name}?", pc.cast(array.is_valid(), pa.uint8()), above)
        if pa.types.is_list(kind):
            above = self._add(f"{name}#", array.value_lengths().fill_null(0), above)
            self._feed(array.flatten(), column.type.value_field, name, above)
        elif pa.types.is_struct(kind):
            for child, values in zip(kind, array.flatten(), strict=True):
                inner = column.type.field(child.name)
                self._feed(values, inner, f"{name}.{child.name}", above)
        elif pa.types.is_string(kind):
            array = array.fill_null("") if array.null_count else array
            above = self._add(f"{name}@", pc.binary_length(array), above)
            self._leaves[name] = self._add_bytes(f"{name}=", _text_bytes(array), above)
        else:
            array = array.cast(pa.uint8()) if pa.types.is_boolean(kind) else array
            array = array.fill_null(0) if array.null_count else array
            self._leaves[name] = self._add(f"{name}=", array, above)

    def _add(self, name: str, array: pa.Array, above: tuple[str, ...]) -> tuple[str, ...]:
        return self._add_bytes(name, array.to_numpy(zero_copy_only=False), above)

    def _add_bytes(self, name: str, data: Any, above: tuple[str, ...]) -> tuple[str, ...]:
        if name not in self._streams:
            self._streams[name] = xxhash.xxh3_128()
        self._streams[name].update(data)
        return (*above, name)


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """Return one hash over the hashes of all columns."""
    text = json.dumps([SCHEMA_VERSION, sorted(digests.items())], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_table(
    batches: Iterable[pa.Table],
    schema: pa.Schema,
    path: Path,
    *,
    mode: int = 0o644,
    fingerprint: str | None = None,
) -> str:
    """Write batches of rows as one file, whole or not at all; return the fingerprint it carries.

    Args:
        batches: Tables of `schema`, in the order of the file.
        schema: Columns.
        path: File; replaced if it exists.
        mode: Permissions.
        fingerprint: What to store instead of the file's own, to say which manifest it belongs to.

    Raises:
        ManifestError: Code `disk_full`; what was there before is kept.
    """
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    hashes = ColumnHashes(schema)
    hashes.update(schema.empty_table())
    stored = schema.with_metadata({_VERSION_KEY: str(SCHEMA_VERSION)})
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        with pq.ParquetWriter(
            temporary, stored, compression="zstd", write_page_checksum=True
        ) as writer:
            for batch in batches:
                hashes.update(batch)
                rows = batch.replace_schema_metadata(stored.metadata)
                writer.write_table(rows, row_group_size=ROW_GROUP)
            digests = hashes.digests()
            fingerprint = fingerprint_of(digests) if fingerprint is None else fingerprint
            writer.add_key_value_metadata(
                {
                    _FINGERPRINT_KEY.decode(): fingerprint,
                    _COLUMNS_KEY.decode(): json.dumps(digests, separators=(",", ":")),
                }
            )
        sync_path(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ManifestError(
            f"writing {path}: no room on the disk ({error.strerror}); make room or raise the "
            "quota, then scan again",
            code="disk_full",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return fingerprint


class VerifiedFile:
    """A file that `write_table` wrote, opened without decoding a row.

    Raises:
        ManifestError: missing, not Parquet, without or of another schema version, other columns.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        metadata = _metadata(path)
        _check_version(path, metadata)
        self.fingerprint = _text(metadata, _FINGERPRINT_KEY)
        self._file = pq.ParquetFile(path, page_checksum_verification=True)
        if not self._file.schema_arrow.equals(schema, check_metadata=False):
            raise ManifestError(
                f"reading {path}: columns differ from schema {SCHEMA_VERSION}; scan again"
            )
        try:
            self._digests: dict[str, str] = dict(json.loads(_text(metadata, _COLUMNS_KEY)))
        except (ValueError, TypeError) as error:
            raise self._changed("its column hashes are gone") from error

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return int(self._file.metadata.num_rows)

    def check_fingerprint(self) -> None:
        """Check that the fingerprint is the one of the columns' hashes.

        Raises:
            ManifestError: it is not.
        """
        if fingerprint_of(self._digests) != self.fingerprint:
            raise self._changed("the fingerprint")

    def read(self, leaves: Sequence[str] | None = None) -> pa.Table:
        """Read and verify columns.

        Args:
            leaves: Names like `study_id` and `volumes.shape`; None for all.

        Raises:
            ManifestError: damaged, or changed since it was written.
        """
        hashes = ColumnHashes(self.schema)
        try:
            columns = None if leaves is None else [self._parquet_path(leaf) for leaf in leaves]
            table = self._file.read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        hashes.update(table)
        for leaf, digest in hashes.digests().items():
            if self._digests.get(leaf) != digest:
                raise self._changed(f"column {leaf}")
        return table

    def read_rows(self, row: int) -> tuple[pa.Table, int]:
        """Read the row group that holds a row, checked by its page checksums; and its first row."""
        first = 0
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            if row < first + count:
                try:
                    return self._file.read_row_group(group), first
                except (pa.ArrowException, OSError) as error:
                    raise self._damaged(error) from error
            first += count
        raise IndexError(f"{self.path}: no row {row}, it has {first}")

    def _parquet_path(self, leaf: str) -> str:
        """Name a leaf as Parquet does: `volumes.shape` is `volumes.list.element.shape`."""
        top, _, rest = leaf.partition(".")
        is_list = pa.types.is_list(self.schema.field(top).type)
        return f"{top}.list.element.{rest}" if is_list and rest else leaf

    def _damaged(self, error: Exception) -> ManifestError:
        reason = " ".join(str(error).split())
        return ManifestError(f"reading {self.path}: damaged ({reason}); scan again")

    def _changed(self, what: str) -> ManifestError:
        return ManifestError(
            f"reading {self.path}: the rows were changed after writing ({what}); scan again"
        )


def read_fingerprint(path: Path) -> str:
    """Return the fingerprint a file carries.

    Raises:
        ManifestError: missing, not Parquet, or without or of another schema version.
    """
    metadata = _metadata(path)
    _check_version(path, metadata)
    return _text(metadata, _FINGERPRINT_KEY)


def _metadata(path: Path) -> Mapping[bytes, bytes]:
    if not path.is_file():
        raise ManifestError(f"reading the manifest: no file at {path}; run the scan first")
    try:
        return pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ManifestError(f"reading {path}: not a Parquet file ({reason}); scan again") from error


def _check_version(path: Path, metadata: Mapping[bytes, bytes]) -> None:
    version = _text(metadata, _VERSION_KEY)
    if not version.isdigit():
        raise ManifestError(f"reading {path}: it carries no schema version; it is not from a scan")
    if int(version) != SCHEMA_VERSION:
        remedy = "upgrade anycontrast" if int(version) > SCHEMA_VERSION else "scan again"
        raise ManifestError(
            f"reading {path}: schema version must be {SCHEMA_VERSION}, found {version}; {remedy}"
        )


def _text(metadata: Mapping[bytes, bytes], key: bytes) -> str:
    return metadata.get(key, b"").decode("ascii", "replace")


def _text_bytes(array: pa.Array) -> memoryview:
    """Return the characters of all texts, one after the other."""
    _, offsets, data = array.buffers()
    if data is None or len(array) == 0:
        return memoryview(b"")
    places = memoryview(offsets).cast("i")
    return memoryview(data)[places[array.offset] : places[array.offset + len(array)]]
