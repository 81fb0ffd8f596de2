"""The bytes of a .nii or .nii.gz file: opened, bounded, and read to the last one.

In: a path. Out: a believed header, or the voxels as stored; every foreign error becomes a
VolumeError. Size claims are held against the file before memory is reserved, a gzip stream is
read through its trailer, so that its checksum is verified.

Source: reference/reliability.md, findings 3 and 4, S4.
"""

import gzip
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.nifti_header import HEADER_BYTES, VolumeHeader, parse_header
from anycontrast_datasets.study import VolumeError

_DEFLATE_LIMIT = 1032
"""No deflate stream expands by more than this factor."""


@contextmanager
def open_stream(path: Path) -> Iterator[BufferedIOBase]:
    """Open the uncompressed stream; turn every foreign error inside into a VolumeError."""
    _check_file(path)
    try:
        with path.open("rb") as file:
            if path.name.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                    yield stream
            else:
                yield file
    except EOFError as error:
        raise VolumeError(
            f"reading {path}: the gzip stream must end with its checksum, found the end of the "
            "file first; the file is cut, copy it again",
            code="truncated",
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise VolumeError(
            f"reading {path}: the gzip stream must be whole and match its checksum, found: "
            f"{error}; the file is damaged, copy it again",
            code="gzip_corrupt",
        ) from error
    except OSError as error:
        raise VolumeError(
            f"reading {path}: the file must be readable, found: {error.strerror or error}; "
            "check its permissions and the disk",
            code="unreadable_file",
        ) from error


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise VolumeError(
            f"reading {path}: the file must exist, found: {error.strerror}; correct the path",
            code="missing_file",
        ) from error
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise VolumeError(
            f"reading {path}: only .nii and .nii.gz are read (an .hdr/.img pair can be parted); "
            "convert the image",
            code="unsupported_format",
        )
    if not stat.S_ISREG(status.st_mode):
        raise VolumeError(
            f"reading {path}: a regular file is needed, found a folder, pipe or device; "
            "correct the path",
            code="missing_file",
        )
    if status.st_size == 0:
        raise VolumeError(
            f"reading {path}: the file is empty; copy it again or exclude it", code="empty_file"
        )


def read_stream_header(stream: BufferedIOBase, path: Path, max_bytes: int) -> VolumeHeader:
    """Read the header at the start of an opened stream; hold its size claim against the file."""
    header = parse_header(_read_up_to(stream, HEADER_BYTES), path, max_bytes=max_bytes)
    size, claim = path.stat().st_size, header.num_stream_bytes
    if isinstance(stream, gzip.GzipFile):
        if claim > size * _DEFLATE_LIMIT:
            raise VolumeError(
                f"reading {path}: the header claims {claim} bytes, a gzip file of {size} bytes "
                f"cannot hold more than {size * _DEFLATE_LIMIT}; the header lies or the file is "
                "cut, export it again",
                code="header_data_mismatch",
            )
    elif size != claim:
        _refuse_length(path, claim, f"{size} bytes", "truncated" if size < claim else None)
    return header


def _refuse_length(path: Path, claim: int, found: str, code: str | None = None) -> None:
    raise VolumeError(
        f"reading {path}: header and voxels must take {claim} bytes by the header, found {found}; "
        "the header lies or the file is cut, export it again",
        code=code or "header_data_mismatch",
    )


def _read_up_to(stream: BufferedIOBase, num_bytes: int) -> bytes:
    """Read `num_bytes`, or fewer at the end of the stream only."""
    parts: list[bytes] = []
    while num_bytes > 0 and (part := stream.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def read_stream_voxels(
    stream: BufferedIOBase, header: VolumeHeader, path: Path
) -> npt.NDArray[np.generic]:
    """Read the stream to its very end, so that gzip verifies the checksum of every byte."""
    stream.seek(header.data_offset)
    voxels = np.empty(header.num_data_bytes, dtype=np.uint8)
    view = voxels.data
    filled = 0
    while filled < len(view) and (count := stream.readinto(view[filled:])):
        filled += count
    if filled < len(view):
        _refuse_length(path, header.num_stream_bytes, f"{header.data_offset + filled} bytes")
    if stream.read(1):
        _refuse_length(path, header.num_stream_bytes, "more")
    return voxels.view(header.dtype).reshape(header.shape, order="F")
