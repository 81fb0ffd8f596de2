"""NIfTI-1 and NIfTI-2 headers, parsed and doubted before anyone touches voxels.

In: the first bytes of a file. Out: a `VolumeHeader` that later code may believe, or a VolumeError.
Every size is computed in Python integers, so no claim can overflow or reserve memory. Nothing of
the free text (descrip, aux_file, extensions) is ever read.

What a lone header cannot prove: a changed offset or rotation when only one of sform and qform is
set (or both in the same way), a changed intensity scale, a changed type of the same width. Forms
that differ are flagged, so is any scaling; the manifest's sha256 sees the rest.

Source: nifti1.h and nifti2.h (nifti.nimh.nih.gov), field offsets in the tables below.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.study import VolumeError

HEADER_BYTES = 540
"""Bytes that `parse_header` wants to see; NIfTI-1 needs the first 348 of them only."""
SPACING_RANGE_MM = (0.1, 15.0)
MAX_ORIGIN_MM = 1e5
FORM_TOLERANCE_MM = 0.02
"""sform and qform may place a corner of the volume this far apart (float32 quaternions)."""

_MAX_OFFSET = 2**26
"""Header extensions beyond 64 MiB are no header extensions."""

# field: (NIfTI-1 offset, format, NIfTI-2 offset, format)
_FIELDS: dict[str, tuple[int, str, int, str]] = {
    "dim": (40, "8h", 16, "8q"),
    "datatype": (70, "h", 12, "h"),
    "bitpix": (72, "h", 14, "h"),
    "pixdim": (76, "8f", 104, "8d"),
    "vox_offset": (108, "f", 168, "q"),
    "scl_slope": (112, "f", 176, "d"),
    "scl_inter": (116, "f", 184, "d"),
    "xyzt_units": (123, "B", 500, "i"),
    "qform_code": (252, "h", 344, "i"),
    "sform_code": (254, "h", 348, "i"),
    "quatern": (256, "3f", 352, "3d"),
    "qoffset": (268, "3f", 376, "3d"),
    "srow": (280, "12f", 400, "12d"),
}
_NUMERIC_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_RGB_BYTES = {128: 3, 2304: 4}
_COMPLEX_BYTES = {32: 8, 1792: 16, 2048: 32}

Values = dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class VolumeHeader:
    """What the header says, checked against itself. Geometry is in the file's own axes."""

    shape: tuple[int, ...]
    """Voxels per axis; trailing axes of length 1 beyond the third are dropped."""
    spacing_mm: tuple[float, float, float]
    affine: npt.NDArray[np.float64]
    """[4, 4] voxel ijk -> RAS+ mm."""
    dtype: str
    """NumPy name of a stored voxel, byte order included; "rgb24", "rgba32", "complex" else."""
    slope: float
    inter: float
    data_offset: int
    """First voxel byte in the (uncompressed) stream."""
    num_data_bytes: int
    flags: tuple[str, ...] = ()
    """`geometry_disagreement`, `orientation_unknown`, `header_scaling`."""

    @property
    def ndim(self) -> int:
        """Number of axes left after dropping trailing ones of length 1."""
        return len(self.shape)

    @property
    def is_rgb(self) -> bool:
        """Voxels are colours."""
        return self.dtype.startswith("rgb")

    @property
    def is_complex(self) -> bool:
        """Voxels are complex numbers."""
        return self.dtype == "complex"

    @property
    def num_stream_bytes(self) -> int:
        """Length that the uncompressed stream must have."""
        return self.data_offset + self.num_data_bytes


def parse_header(head: bytes, path: Path, *, max_bytes: int) -> VolumeHeader:
    """Parse and check a header.

    Args:
        head: the first bytes of the uncompressed stream, HEADER_BYTES where there are so many.
        path: named in messages only.
        max_bytes: limit on the voxels, both as stored and as float32.

    Raises:
        VolumeError: codes truncated, unreadable_header, too_large, header_data_mismatch,
            nonfinite_affine, singular_affine, spacing_out_of_range, origin_out_of_range,
            unsupported_format.
    """
    version, order = _version(head, path)
    values = _unpack(head, version, order)
    shape = _shape(values, path)
    dtype, itemsize = _dtype(values, order, path)
    _check_size(shape, itemsize, path, max_bytes)
    slope, inter = _scaling(values, path)
    with np.errstate(over="ignore", invalid="ignore"):
        affine, flags = _geometry(values, shape, path)
    if (slope, inter) != (1.0, 0.0):
        flags = (*flags, "header_scaling")
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    return VolumeHeader(
        shape=_squeeze(shape),
        spacing_mm=(float(norms[0]), float(norms[1]), float(norms[2])),
        affine=affine,
        dtype=dtype,
        slope=slope,
        inter=inter,
        data_offset=_data_offset(values, version, path),
        num_data_bytes=math.prod(shape) * itemsize,
        flags=flags,
    )


def _unpack(head: bytes, version: int, order: str) -> Values:
    values: Values = {}
    for name, (place_1, format_1, place_2, format_2) in _FIELDS.items():
        place, form = (place_1, format_1) if version == 1 else (place_2, format_2)
        values[name] = struct.unpack_from(order + form, head, place)
    return values


def _version(head: bytes, path: Path) -> tuple[int, str]:
    if len(head) < 348:
        raise VolumeError(
            f"reading {path}: a NIfTI header has 348 bytes or more, found {len(head)}; "
            "the file is cut, copy it again",
            code="truncated",
        )
    for order in ("<", ">"):
        (size,) = struct.unpack_from(order + "i", head)
        if size == 348 and head[344:348] == b"ni1\0":
            raise VolumeError(
                f"reading {path}: header and voxels must lie in one file, found the header of a "
                ".hdr/.img pair; convert it to .nii.gz",
                code="unsupported_format",
            )
        if size == 348 and head[344:348] == b"n+1\0":
            return 1, order
        if size == 540 and head[4:12] == b"n+2\0\r\n\x1a\n" and len(head) >= 540:
            return 2, order
    raise VolumeError(
        f"reading {path}: the file must start with a NIfTI-1 or NIfTI-2 header (size field and "
        "magic), found neither; convert the image again or exclude the file",
        code="unreadable_header",
    )


def _shape(values: Values, path: Path) -> tuple[int, ...]:
    ndim, *dims = (int(n) for n in values["dim"])
    if not 1 <= ndim <= 7 or any(n < 1 for n in dims[:ndim]):
        raise VolumeError(
            f"reading {path}: dim[0] must be 1..7 and each dimension in use >= 1, found "
            f"dim = {[ndim, *dims]}; the header is damaged, export the image again",
            code="unreadable_header",
        )
    return tuple(dims[:ndim])


def _check_size(shape: tuple[int, ...], itemsize: int, path: Path, max_bytes: int) -> None:
    if math.prod(shape) * max(itemsize, 4) > max_bytes:
        raise VolumeError(
            f"reading {path}: voxels must fit in max_bytes = {max_bytes} (as stored and as "
            f"float32), header claims shape {shape} of {itemsize} bytes each; "
            "raise max_bytes if the file is really that large",
            code="too_large",
        )


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _dtype(values: Values, order: str, path: Path) -> tuple[str, int]:
    code, bits = int(values["datatype"][0]), int(values["bitpix"][0])
    if code in _NUMERIC_TYPES:
        dtype = np.dtype(order + _NUMERIC_TYPES[code])
        name, itemsize = dtype.str, dtype.itemsize
    elif code in _RGB_BYTES:
        name, itemsize = ("rgb24" if code == 128 else "rgba32"), _RGB_BYTES[code]
    elif code in _COMPLEX_BYTES:
        name, itemsize = "complex", _COMPLEX_BYTES[code]
    else:
        raise VolumeError(
            f"reading {path}: datatype must be an integer, float32 or float64 code of NIfTI, "
            f"found {code}; convert the voxels to int16 or float32",
            code="unreadable_header",
        )
    if bits != 8 * itemsize:
        raise VolumeError(
            f"reading {path}: bitpix must be {8 * itemsize} for datatype {code}, found {bits}; "
            "the header is damaged, export the image again",
            code="unreadable_header",
        )
    return name, itemsize


def _scaling(values: Values, path: Path) -> tuple[float, float]:
    slope, inter = values["scl_slope"][0], values["scl_inter"][0]
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise VolumeError(
            f"reading {path}: scl_slope and scl_inter must be finite, found {slope} and {inter}; "
            "export the image again with a valid scaling",
            code="unreadable_header",
        )
    # The standard: slope 0 means that voxels are not scaled, the intercept included.
    return (slope, inter) if slope != 0 else (1.0, 0.0)


def _data_offset(values: Values, version: int, path: Path) -> int:
    offset = values["vox_offset"][0]
    least = 352 if version == 1 else 544
    if not math.isfinite(offset) or offset != int(offset) or not least <= offset <= _MAX_OFFSET:
        raise VolumeError(
            f"reading {path}: vox_offset must be a whole number in {least}..{_MAX_OFFSET}, found "
            f"{offset}; "
            "the header is damaged, export the image again",
            code="unreadable_header",
        )
    return int(offset)


def _geometry(
    values: Values, shape: tuple[int, ...], path: Path
) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    """Choose the affine as nibabel does (sform, else qform, else pixdim) and doubt it."""
    codes = (int(values["sform_code"][0]), int(values["qform_code"][0]))
    unit = int(values["xyzt_units"][0]) & 7
    if any(not 0 <= code <= 5 for code in codes) or unit not in (0, 2):
        raise VolumeError(
            f"reading {path}: sform_code and qform_code must be 0..5 and the spatial unit mm "
            f"(2) or unset (0), found {codes} and {unit}; correct the header",
            code="unreadable_header",
        )
    sform, qform = _sform(values), _qform(values)
    flags: tuple[str, ...] = ()
    if codes[0]:
        affine = sform
        if codes[1] and not _agree(sform, qform, shape):
            flags = ("geometry_disagreement",)
    elif codes[1]:
        affine = qform
        if any(values["srow"]) and not _agree(sform, qform, shape):
            flags = ("geometry_disagreement",)
    else:
        affine, flags = _pixdim_affine(values, shape), ("orientation_unknown",)
    check_affine(affine, path)
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    if not flags and not np.allclose(norms, np.abs(values["pixdim"][1:4]), rtol=1e-3, atol=1e-4):
        flags = ("geometry_disagreement",)
    return affine, flags


def _sform(values: Values) -> npt.NDArray[np.float64]:
    return np.array([*values["srow"], 0, 0, 0, 1], dtype=np.float64).reshape(4, 4)


def _qform(values: Values) -> npt.NDArray[np.float64]:
    """Affine of the quaternion; all NaN when it is none."""
    affine = np.full((4, 4), np.nan)
    b, c, d = values["quatern"]
    left = 1.0 - (b * b + c * c + d * d)
    spacing = np.array(values["pixdim"][1:4])
    if not left > -1e-5 or not np.all(spacing > 0):
        return affine
    a = math.sqrt(max(left, 0.0))
    norm = math.sqrt(a * a + b * b + c * c + d * d)
    a, b, c, d = a / norm, b / norm, c / norm, d / norm
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    spacing[2] *= -1.0 if values["pixdim"][0] < 0 else 1.0
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = values["qoffset"]
    affine[3] = 0, 0, 0, 1
    return affine


def _pixdim_affine(values: Values, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Centre of the volume at the origin, x stored right to left (radiological), as nibabel."""
    scale = np.array(values["pixdim"][1:4]) * (-1, 1, 1)
    counts = np.array((*shape, 1, 1)[:3])
    affine = np.diag([*scale, 1.0])
    affine[:3, 3] = -scale * (counts - 1) / 2
    return affine


def corner_positions(
    shape: tuple[int, ...], affine: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return [8, 3], the RAS+ mm positions of the eight corner voxels of the first three axes."""
    last = [n - 1 for n in (*shape, 1, 1)[:3]]
    corners = np.array(
        [[i, j, k] for i in (0, last[0]) for j in (0, last[1]) for k in (0, last[2])]
    )
    return np.asarray(corners @ affine[:3, :3].T + affine[:3, 3], dtype=np.float64)


def _agree(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], shape: tuple[int, ...]
) -> bool:
    apart = np.abs(corner_positions(shape, first) - corner_positions(shape, second))
    return bool(apart.max() <= FORM_TOLERANCE_MM)


def check_affine(affine: npt.NDArray[np.float64], path: Path) -> None:
    """Refuse an affine that is not finite, not invertible, or of unbelievable spacing."""
    if not np.all(np.isfinite(affine)):
        raise VolumeError(
            f"checking {path}: the affine must be finite, found {affine[:3].tolist()}; "
            "export the image again with its orientation",
            code="nonfinite_affine",
        )
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_RANGE_MM
    if not np.all((norms >= low) & (norms <= high)):
        raise VolumeError(
            f"checking {path}: spacing must be {low}-{high} mm in every axis, found "
            f"{tuple(round(float(n), 6) for n in norms)}; correct the header or exclude the file",
            code="singular_affine" if np.any(norms == 0) else "spacing_out_of_range",
        )
    if np.abs(affine[:3, 3]).max() > MAX_ORIGIN_MM:
        raise VolumeError(
            f"checking {path}: the first voxel must lie within {MAX_ORIGIN_MM:g} mm of the "
            f"origin, found {affine[:3, 3].tolist()}; correct the header or exclude the file",
            code="origin_out_of_range",
        )
    if abs(np.linalg.det(affine[:3, :3] / norms)) < 1e-3:
        raise VolumeError(
            f"checking {path}: the affine must be invertible, found axes in one plane "
            f"{affine[:3, :3].tolist()}; correct the header or exclude the file",
            code="singular_affine",
        )
