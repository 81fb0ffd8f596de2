"""Write one shard: an ordinary ustar file of prepared studies, and the row of every member.

The same studies in the same order give the same bytes: no time, no user, one mode, one block size.
The file grows under a temporary name and gets its own only when it is complete and on disk. A study
is written whole or not at all, `study.json` last, so a study without it is torn.
"""

import hashlib
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from anycontrast_datasets.disk import full_disk_named
from anycontrast_datasets.files import sync_path
from anycontrast_datasets.record_json import record_to_json
from anycontrast_datasets.store.codec import (
    DEFAULT_CODEC,
    DEFAULT_LEVEL,
    CodecName,
    Codes,
    checksum,
    encode,
)
from anycontrast_datasets.store.volume_index import (
    KEY_PATTERN,
    LABEL_MEMBER,
    RECORD_MEMBER,
    MemberRow,
)
from anycontrast_datasets.study import ShardError, StudyArrays


class ShardWriter:
    """Context manager; `commit()` inside it gives the file its name, leaving without it does not.

    Args:
        path: Final name, `shard-000000.tar`.
        codec: Compressor of the voxels.
        level: Of the compressor, 1..9.

    Raises:
        ShardError: From any method that writes, code `disk_full`.
    """

    def __init__(
        self, path: Path, *, codec: CodecName = DEFAULT_CODEC, level: int = DEFAULT_LEVEL
    ) -> None:
        self.path = path
        self.rows: list[MemberRow] = []
        self._codec: CodecName = codec
        self._level = level
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._digest = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> Self:
        self._file = self._temporary.open("wb", buffering=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, arrays: StudyArrays) -> None:
        """Append one study.

        Raises:
            ShardError: If its id cannot be a member name, or two contrasts share one.
        """
        record = arrays.record
        key = record.study_id
        if not KEY_PATTERN.fullmatch(key):
            raise ShardError(
                f"study {key!r}: an id must match {KEY_PATTERN.pattern} to be a shard key; "
                "rename it in the source or use pseudonyms",
                code="bad_study_id",
            )
        names = [contrast.lower() for contrast in record.contrasts]
        assert len({*names, LABEL_MEMBER, "study"}) == len(names) + 2, names
        for contrast in record.contrasts:
            codes = arrays.codes[contrast]
            assert codes.shape == record.shape, (codes.shape, record.shape)
            self._add_voxels(key, contrast, codes)
        if arrays.label is not None:
            self._add_voxels(key, LABEL_MEMBER, arrays.label)
        text = record_to_json(record)
        self._add_member(key, RECORD_MEMBER, text.encode(), (), "json", text)

    def add_stored(self, rows: Sequence[MemberRow], payloads: Sequence[bytes]) -> None:
        """Append a study as another shard holds it: the bytes that `add` would write again.

        Args:
            rows: Every member of the study, in order, the record last.
            payloads: Their bytes, already compared with the rows' checksums.
        """
        for row, payload in zip(rows, payloads, strict=True):
            assert len(payload) == row.bytes, row
            self._add_member(row.study_id, row.contrast, payload, row.shape, row.dtype, row.record)

    def finish(self) -> str:
        """End the archive and make its bytes durable, still unnamed; return its sha256."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._offset + end) % tarfile.RECORDSIZE))
        with full_disk_named(self.path, self._offset):
            os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def publish(self) -> None:
        """Give the finished archive its name, in place of any earlier one."""
        assert self._file.closed, "finish() comes first"
        self._temporary.replace(self.path)
        sync_path(self.path.parent)

    def commit(self) -> str:
        """Finish and publish; return the sha256."""
        sha256 = self.finish()
        self.publish()
        return sha256

    @property
    def num_bytes(self) -> int:
        """Size of the archive so far."""
        return self._offset

    def _add_voxels(self, key: str, contrast: str, voxels: Codes) -> None:
        payload = encode(voxels, name=self._codec, level=self._level)
        self._add_member(key, contrast, payload, voxels.shape, voxels.dtype.name, None)

    def _add_member(
        self,
        key: str,
        contrast: str,
        payload: bytes,
        shape: tuple[int, ...],
        dtype: str,
        record: str | None,
    ) -> None:
        self._write(member_header(key, contrast, len(payload)))
        row = MemberRow(
            shard=self.path.name,
            study_id=key,
            contrast=contrast,
            offset=self._offset,
            bytes=len(payload),
            xxh3_64=checksum(payload),
            shape=shape,
            dtype=dtype,
            record=record,
        )
        self._write(payload)
        self._write(bytes(-len(payload) % tarfile.BLOCKSIZE))
        self.rows.append(row)

    def _write(self, content: bytes) -> None:
        with full_disk_named(self.path, len(content)):
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._digest.update(content)
        self._offset += len(content)


def member_header(key: str, contrast: str, num_bytes: int) -> bytes:
    """Return the tar header that stands before a member, always the same bytes."""
    header = tarfile.TarInfo(_member_name(key, contrast))
    header.size, header.mode = num_bytes, 0o644
    return header.tobuf(format=tarfile.USTAR_FORMAT)


def _member_name(key: str, contrast: str) -> str:
    if contrast == RECORD_MEMBER:
        return f"{key}.{RECORD_MEMBER}"
    kind = "u8b2" if contrast == LABEL_MEMBER else "i16b2"
    return f"{key}.{contrast.lower()}.{kind}"
