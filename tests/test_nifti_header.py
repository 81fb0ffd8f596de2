"""Headers are doubted: a false field is refused, or flagged, or changes nothing.

Two things no reader can see in a lone file with a valid checksum: another finite scaling of the
intensities (flagged `header_scaling`) and another type of the same width while all values stay
believable.
"""

import gzip
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.study import VolumeError
from anycontrast_datasets.volume import (
    LoadedVolume,
    read_header,
    read_volume,
    write_volume,
)


def _oblique() -> npt.NDArray[np.float64]:
    a, b = 0.35, -0.2
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([-0.7, 0.7, 4.0])
    affine[:3, 3] = 80.0, -60.0, 12.0
    return affine


@pytest.mark.parametrize(
    ("offset", "form", "values", "code"),
    [
        (0, "i", (347,), "unreadable_header"),
        (40, "h", (0,), "unreadable_header"),
        (40, "h", (8,), "unreadable_header"),
        (42, "h", (-9,), "unreadable_header"),
        (42, "h", (0,), "unreadable_header"),
        (40, "h", (2,), "truncated"),
        (46, "h", (8,), "truncated"),
        (70, "h", (9999,), "unreadable_header"),
        (72, "h", (8,), "unreadable_header"),
        (70, "2h", (2, 8), "header_data_mismatch"),
        (108, "f", (353.5,), "unreadable_header"),
        (108, "f", (float("nan"),), "unreadable_header"),
        (108, "f", (-352.0,), "unreadable_header"),
        (108, "f", (368.0,), "truncated"),
        (112, "f", (float("nan"),), "unreadable_header"),
        (116, "f", (float("inf"),), "unreadable_header"),
        (123, "B", (3,), "unreadable_header"),
        (254, "h", (77,), "unreadable_header"),
        (280, "f", (float("nan"),), "nonfinite_affine"),
        (292, "f", (float("inf"),), "nonfinite_affine"),
        (280, "4f", (0, 0, 0, 0), "singular_affine"),
        (292, "f", (-1e30,), "origin_out_of_range"),
        (280, "f", (1e20,), "spacing_out_of_range"),
        (280, "f", (0.01,), "spacing_out_of_range"),
        (344, "4s", (b"ni1\0",), "unsupported_format"),
    ],
)
def test_false_header_fields_are_refused_with_their_code(
    plain_nifti: Path,
    offset: int,
    form: str,
    values: tuple[float, ...],
    code: str,
    refusal_code: Callable[..., str],
) -> None:
    content = bytearray(plain_nifti.read_bytes())
    struct.pack_into("<" + form, content, offset, *values)
    plain_nifti.write_bytes(content)
    expected = {code, "header_data_mismatch"} if code == "truncated" else {code}
    assert refusal_code(plain_nifti) in expected


def test_axes_in_one_plane_are_refused(
    plain_nifti: Path, refusal_code: Callable[..., str], patch_bytes: Callable[..., Path]
) -> None:
    patch_bytes(plain_nifti, 280, "12f", 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0)
    assert refusal_code(plain_nifti) == "singular_affine"


@pytest.mark.parametrize("zoom", [0.0, float("nan"), -0.0])
def test_zero_zoom_without_orientation_is_refused(
    plain_nifti: Path,
    zoom: float,
    refusal_code: Callable[..., str],
    patch_bytes: Callable[..., Path],
) -> None:
    patch_bytes(plain_nifti, 252, "2h", 0, 0)
    patch_bytes(plain_nifti, 84, "f", zoom)
    assert refusal_code(plain_nifti) in ("singular_affine", "nonfinite_affine")


def test_broken_quaternion_is_refused_where_it_is_needed(
    plain_nifti: Path, refusal_code: Callable[..., str], patch_bytes: Callable[..., Path]
) -> None:
    patch_bytes(plain_nifti, 256, "3f", 2.0, 2.0, 2.0)
    assert read_volume(plain_nifti).flags == ("geometry_disagreement",)
    patch_bytes(plain_nifti, 254, "h", 0)
    assert refusal_code(plain_nifti) == "nonfinite_affine"


def test_sform_and_qform_that_differ_are_flagged(
    plain_nifti: Path, patch_bytes: Callable[..., Path]
) -> None:
    patch_bytes(plain_nifti, 292, "f", 41.0)
    assert "geometry_disagreement" in read_header(plain_nifti).flags
    assert "geometry_disagreement" in read_volume(plain_nifti).flags


# datatype, bitpix; scl_slope, scl_inter
_INTENSITY_BYTES = {*range(70, 74), *range(112, 120)}


def _mutate(header: bytes, rng: np.random.Generator) -> tuple[bytes, set[int]]:
    mutated = bytearray(header)
    places = {int(p) for p in rng.integers(0, 348, size=rng.integers(1, 4))}
    for place in places:
        if rng.random() < 0.5:
            mutated[place] ^= 1 << int(rng.integers(0, 8))
        else:
            mutated[place] = int(rng.integers(0, 256))
    return bytes(mutated), places


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_300_mutated_headers_are_refused_harmless_or_flagged(
    tmp_path: Path,
    suffix: str,
    same_volume: Callable[[LoadedVolume, LoadedVolume], bool],
    nifti_array: Callable[..., npt.NDArray[Any]],
) -> None:
    path = tmp_path / f"v{suffix}"
    plain = tmp_path / "original.nii"
    write_volume(plain, nifti_array("float32") - 20, _oblique())
    original, content = read_volume(plain), plain.read_bytes()
    rng = np.random.default_rng(20)
    outcomes = {"refused": 0, "harmless": 0, "flagged": 0}
    for _ in range(300):
        header, places = _mutate(content[:348], rng)
        mutated = header + content[348:]
        path.write_bytes(mutated if suffix == ".nii" else gzip.compress(mutated, 1))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                loaded = read_volume(path)
        except VolumeError as error:
            assert error.code != VolumeError.code
            outcomes["refused"] += 1
            continue
        if same_volume(loaded, original):
            outcomes["harmless"] += 1
            continue
        assert loaded.flags, f"bytes {sorted(places)} changed the result unflagged"
        if not np.array_equal(loaded.array, original.array):
            assert places & _INTENSITY_BYTES or "geometry_disagreement" in loaded.flags
        outcomes["flagged"] += 1
    assert min(outcomes.values()) > 5, outcomes
