"""Write one shard: an ordinary ustar file of prepared studies, and the row of every member.

The same studies in the same order give the same bytes: no time, no user, one mode, one block size.
The file grows under a temporary name and gets its own only when it is complete and on disk. A study
is written whole or not at all, `study.json` last, so a study without it is torn.
"""

import hashlib
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Self

from anycontrast_datasets.files import sync_path
from anycontrast_datasets.record_json import record_to_json
from anycontrast_datasets.store.codec import CodecName, Codes, checksum, encode
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
    """

    def __init__(self, path: Path, *, codec: CodecName = "zstd", level: int = 5) -> None:
        self.path = path
        self.rows: list[MemberRow] = []
        self._codec: CodecName = codec
        self._level = level
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._digest = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> Self:
        self._file = self._temporary.open("wb")
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
            self._add_voxels(key, contrast, f"{key}.{contrast.lower()}.i16b2", codes)
        if arrays.label is not None:
            self._add_voxels(key, LABEL_MEMBER, f"{key}.label.u8b2", arrays.label)
        text = record_to_json(record)
        self._add_member(
            key, RECORD_MEMBER, f"{key}.{RECORD_MEMBER}", text.encode(), (), "json", text
        )

    def commit(self) -> str:
        """Close the archive, make it durable, give it its name; return its sha256."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._offset + end) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        sync_path(self.path.parent)
        return self._digest.hexdigest()

    def _add_voxels(self, key: str, contrast: str, member: str, voxels: Codes) -> None:
        payload = encode(voxels, name=self._codec, level=self._level)
        self._add_member(key, contrast, member, payload, voxels.shape, voxels.dtype.name, None)

    def _add_member(
        self,
        key: str,
        contrast: str,
        member: str,
        payload: bytes,
        shape: tuple[int, ...],
        dtype: str,
        record: str | None,
    ) -> None:
        header = tarfile.TarInfo(member)
        header.size, header.mode = len(payload), 0o644
        self._write(header.tobuf(format=tarfile.USTAR_FORMAT))
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
        self._file.write(content)
        self._digest.update(content)
        self._offset += len(content)
