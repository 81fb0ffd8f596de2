"""NIfTI file <-> float32 array on RAS+ axes. Everything in a file is doubted until checked.

Comes in: a path. Goes out: `LoadedVolume`, or a VolumeError whose `code` goes into the ledger.
The header is parsed and its size claims are checked before any voxel is read; a gzip stream is
read whole, once, with its CRC; voxels must be finite. Only axis flips and permutations, never
resampling. Cost: one decompression; memory: the voxels as stored plus the float32 array.

Stock readers stop before the gzip trailer (270 of 300 flipped bits gave wrong voxels, unnoticed)
and reserve what a header claims (1 kB took 15 GB); hence this file.

Source: reference/reliability.md, findings 3 and 4, S4; orientation arithmetic by nibabel.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import numpy.typing as npt

from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.nifti_file import open_stream, read_stream_header, read_stream_voxels
from anycontrast_datasets.nifti_header import (
    VolumeHeader,
    check_affine,
    corner_positions,
)
from anycontrast_datasets.study import VolumeError

__all__ = [
    "DEFAULT_MAX_BYTES",
    "LoadedVolume",
    "VolumeHeader",
    "read_header",
    "read_volume",
    "same_grid",
    "to_source_grid",
    "write_volume",
]

DEFAULT_MAX_BYTES = 2 * 2**30
_WRITABLE = ("float32", "int16", "uint8")
T = TypeVar("T", bound=np.generic)

# nibabel ships types, but these parts of it are not annotated.
_orientations: Any = nib.orientations
_Header: Any = nib.Nifti1Header

_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True)
class LoadedVolume:
    """A volume in memory, on RAS+ axes."""

    array: npt.NDArray[np.float32]
    """[X, Y, Z], C order; axis 0 runs to the right, 1 to anterior, 2 to superior."""
    affine: npt.NDArray[np.float64]
    """[4, 4] index of `array` -> RAS+ mm."""
    source_shape: tuple[int, int, int]
    """Shape in the file's own axes."""
    source_affine: npt.NDArray[np.float64]
    """[4, 4] index in the file -> RAS+ mm."""
    spacing_mm: tuple[float, float, float]
    """Along the axes of `array`."""
    flags: tuple[str, ...] = ()
    """Those of the header, and `intensity_range_suspect`."""


def read_header(path: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> VolumeHeader:
    """Read and check a header; of a .nii.gz only the first kilobyte is decompressed.

    4D, RGB and complex files have a header too: look at `ndim`, `is_rgb`, `is_complex`.

    Args:
        path: a .nii or .nii.gz file.
        max_bytes: limit on the voxels, both as stored and as float32.

    Raises:
        VolumeError: see `code`; nothing else is raised for what a file contains.
    """
    with open_stream(path) as stream:
        return read_stream_header(stream, path, max_bytes)


def read_volume(
    path: Path, *, max_bytes: int = DEFAULT_MAX_BYTES, allow_constant: bool = False
) -> LoadedVolume:
    """Read a 3D volume onto RAS+ axes, having read and verified every byte of the file.

    Args:
        path: a .nii or .nii.gz file.
        max_bytes: limit on the voxels, both as stored and as float32.
        allow_constant: accept a volume of one value, as an empty label is.

    Raises:
        VolumeError: see `code`; nothing else is raised for what a file contains.
    """
    with open_stream(path) as stream:
        header = read_stream_header(stream, path, max_bytes)
        _check_kind(header, path)
        stored = read_stream_voxels(stream, header, path)
    ornt = _orientations.io_orientation(header.affine)
    array = _to_float32(_orientations.apply_orientation(stored, ornt), header)
    flags = header.flags + _check_voxels(array, header, path, allow_constant=allow_constant)
    affine = header.affine @ _orientations.inv_ornt_aff(ornt, header.shape)
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    i, j, k = header.shape
    return LoadedVolume(
        array=array,
        affine=affine,
        source_shape=(i, j, k),
        source_affine=header.affine,
        spacing_mm=(float(x), float(y), float(z)),
        flags=flags,
    )


def _check_kind(header: VolumeHeader, path: Path) -> None:
    if header.is_rgb:
        raise VolumeError(
            f"reading {path}: voxels must be single numbers, found {header.dtype}; colour maps "
            "are pictures of a derived map, use the map itself",
            code="rgb_voxels",
        )
    if header.is_complex:
        raise VolumeError(
            f"reading {path}: voxels must be real, found complex; export the magnitude",
            code="complex_voxels",
        )
    if header.dtype[1] not in "iuf":
        raise AssertionError(f"unhandled voxel type {header.dtype}")
    if header.ndim != 3:
        raise VolumeError(
            f"reading {path}: a volume has 3 dimensions, found shape {header.shape}; split the "
            "series and keep one 3D image per contrast (for diffusion the trace or a map)",
            code="not_3d",
        )


def _to_float32(stored: npt.NDArray[np.generic], header: VolumeHeader) -> npt.NDArray[np.float32]:
    """Scale in float64 plane by plane; a value beyond float32 becomes infinite and is refused."""
    array = np.empty(stored.shape, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if (header.slope, header.inter) == (1.0, 0.0):
            array[...] = stored
        else:
            for x in range(stored.shape[0]):
                array[x] = stored[x].astype(np.float64) * header.slope + header.inter
    return array


def _check_voxels(
    array: npt.NDArray[np.float32], header: VolumeHeader, path: Path, *, allow_constant: bool
) -> tuple[str, ...]:
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(array.size - np.isfinite(array).sum())
        raise VolumeError(
            f"reading {path}: every voxel must be a finite float32, found {count} of {array.size} "
            "that are NaN, infinite or too large; repair them in the source or exclude the file",
            code="nonfinite_voxels",
        )
    if low == high and not allow_constant:
        raise VolumeError(
            f"reading {path}: a volume must have contrast, found {low:g} in all {array.size} "
            "voxels; exclude the file",
            code="constant_volume",
        )
    stored = sorted(((low - header.inter) / header.slope, (high - header.inter) / header.slope))
    is_suspect = _is_range_suspect(stored[0], stored[1], np.dtype(header.dtype))
    return ("intensity_range_suspect",) if is_suspect else ()


def _is_range_suspect(low: float, high: float, dtype: np.dtype[np.generic]) -> bool:
    """Say if stored values look like another type of the same width read by mistake."""
    largest = max(abs(low), abs(high))
    if dtype.kind == "f":
        return largest > 1e12 or 0 < largest < 1e-20
    if dtype.itemsize == 2:
        return high >= 2**15 or low < -(2**14)
    return largest > 5e8


def same_grid(
    shape_a: Sequence[int],
    affine_a: npt.ArrayLike,
    shape_b: Sequence[int],
    affine_b: npt.ArrayLike,
    *,
    tolerance_mm: float = 1e-2,
) -> bool:
    """Say if two grids have equal shapes and corner voxels within `tolerance_mm` of each other."""
    shape = tuple(int(n) for n in shape_a)
    if shape != tuple(int(n) for n in shape_b):
        return False
    first = corner_positions(shape, np.asarray(affine_a, dtype=np.float64))
    second = corner_positions(shape, np.asarray(affine_b, dtype=np.float64))
    return bool(np.linalg.norm(first - second, axis=1).max() <= tolerance_mm)


def to_source_grid(array_ras: npt.NDArray[T], loaded: LoadedVolume) -> npt.NDArray[T]:
    """Undo the reorientation: from the RAS+ axes of `loaded` to the axes of its source file.

    Args:
        array_ras: [X, Y, Z] of any dtype, the shape of `loaded.array`.
        loaded: the volume whose file sets the axes; its `source_affine` goes with the result.
    """
    if array_ras.shape != loaded.array.shape:
        raise ValueError(
            f"returning to the source grid: array_ras must have shape {loaded.array.shape} like "
            f"the loaded volume, got {array_ras.shape}"
        )
    back = _orientations.ornt_transform(_RAS, _orientations.io_orientation(loaded.source_affine))
    return np.ascontiguousarray(_orientations.apply_orientation(array_ras, back))


def write_volume(path: Path, array: npt.NDArray[np.generic], affine: npt.ArrayLike) -> None:
    """Write a NIfTI-1 file with a header made from scratch: equal input gives equal bytes.

    The file appears whole or not at all. Nothing but shape, type and geometry is in the header.

    Args:
        path: ends in .nii or .nii.gz; its folder exists.
        array: [X, Y, Z] float32, int16 or uint8; the dtype is kept.
        affine: [4, 4] index -> RAS+ mm.

    Raises:
        VolumeError: an array, affine or name that `read_volume` would refuse.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    _check_writable(path, array, matrix)
    header = _Header(endianness="<")
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_qform(matrix, code=1)
    header.set_sform(matrix, code=1)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1.0, 0.0)
    header["vox_offset"] = 352
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="F")
    content = header.binaryblock + b"\0\0\0\0" + data
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, compresslevel=4, mtime=0)
    write_atomically(path, content)


def _check_writable(
    path: Path, array: npt.NDArray[np.generic], matrix: npt.NDArray[np.float64]
) -> None:
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise VolumeError(
            f"writing {path}: the name must end in .nii or .nii.gz; rename it",
            code="unsupported_format",
        )
    sizes_fit = array.ndim == 3 and all(1 <= n <= 32767 for n in array.shape)
    if not sizes_fit or array.dtype.name not in _WRITABLE:
        raise VolumeError(
            f"writing {path}: the array must have 3 axes of 1..32767 voxels and a dtype of "
            f"{_WRITABLE}, got {array.shape} {array.dtype}; cast it or cut it",
            code="unsupported_format",
        )
    if not np.all(np.isfinite(array.astype(np.float32, copy=False))):
        raise VolumeError(
            f"writing {path}: every voxel must be finite; find where NaN or infinity came from",
            code="nonfinite_voxels",
        )
    check_affine(matrix, path)
