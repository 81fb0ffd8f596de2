"""Volumes come back whole on RAS+ axes; what is no volume is refused with its reason."""

import gzip
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.study import VolumeError
from anycontrast_datasets.volume import (
    read_header,
    read_volume,
    same_grid,
    to_source_grid,
    write_volume,
)

REAL_MRI = Path(__file__).parents[2] / "shared" / "real_mri"
AFFINE = np.array([[-1.1, 0, 0, 40], [0, 0.9, 0, -30], [0, 0, 2.5, -20], [0, 0, 0, 1.0]])

# The oracle and a second writer; nibabel is not annotated throughout.
nib: Any = nibabel


# Round trips


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["float32", "int16", "uint8"])
def test_written_volume_comes_back(
    tmp_path: Path, suffix: str, dtype: str, nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    path = tmp_path / f"volume{suffix}"
    array = nifti_array(dtype)
    write_volume(path, array, AFFINE)
    header, loaded = read_header(path), read_volume(path)
    assert np.dtype(header.dtype) == np.dtype(dtype)
    assert header.shape == loaded.source_shape == (9, 8, 7)
    assert loaded.flags == ()
    assert np.array_equal(loaded.array, array[::-1].astype(np.float32))  # x ran right to left
    assert loaded.array.flags.c_contiguous
    assert loaded.array.dtype == np.float32
    assert np.allclose(loaded.source_affine, AFFINE, atol=1e-5)
    assert np.allclose(loaded.spacing_mm, (1.1, 0.9, 2.5))


def _signed_permutations() -> list[npt.NDArray[np.float64]]:
    matrices = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[order, range(3)] = signs
            matrices.append(matrix)
    return matrices


def test_all_48_orientations_reach_ras_and_go_back(
    tmp_path: Path, nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    assert len(_signed_permutations()) == 48
    stored = nifti_array("float32")
    for number, matrix in enumerate(_signed_permutations()):
        affine = np.eye(4)
        affine[:3, :3] = matrix @ np.diag([0.8, 1.0, 3.0])
        affine[:3, 3] = 5.0, -7.0, 11.0
        path = tmp_path / f"{number}.nii"
        write_volume(path, stored, affine)
        loaded = read_volume(path)
        expected = nib.as_closest_canonical(nib.Nifti1Image(stored, affine))
        assert nib.aff2axcodes(loaded.affine) == ("R", "A", "S")
        assert np.array_equal(loaded.array, np.asarray(expected.dataobj))
        assert np.allclose(loaded.affine, expected.affine, atol=1e-5)
        assert np.array_equal(to_source_grid(loaded.array, loaded), stored)


def _oblique() -> npt.NDArray[np.float64]:
    a, b = 0.35, -0.2
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([-0.7, 0.7, 4.0])
    affine[:3, 3] = 80.0, -60.0, 12.0
    return affine


def test_oblique_volume_keeps_its_place_in_the_scanner(
    tmp_path: Path, nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    path = tmp_path / "oblique.nii.gz"
    stored = nifti_array("float32")
    write_volume(path, stored, _oblique())
    loaded = read_volume(path)
    assert loaded.flags == ()
    assert np.allclose(loaded.source_affine, _oblique(), atol=1e-5)
    voxel = np.array([2, 5, 3, 1.0])
    place = np.linalg.inv(loaded.affine) @ _oblique() @ voxel
    i, j, k = np.round(place[:3]).astype(int)
    assert np.allclose(place[:3], (i, j, k), atol=1e-4)
    assert loaded.array[i, j, k] == stored[2, 5, 3]
    label = (loaded.array > 100).astype(np.uint8)
    assert np.array_equal(to_source_grid(label, loaded), (stored > 100).astype(np.uint8))


def test_sheared_affine_is_kept_by_the_writer(
    tmp_path: Path, nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    affine = AFFINE.copy()
    affine[0, 1] = 0.2
    path = tmp_path / "sheared.nii"
    write_volume(path, nifti_array(), affine)
    assert np.allclose(read_volume(path).source_affine, affine, atol=1e-5)


def test_to_source_grid_refuses_another_shape(plain_nifti: Path) -> None:
    with pytest.raises(ValueError, match="must have shape"):
        to_source_grid(np.zeros((2, 2, 2), dtype=np.uint8), read_volume(plain_nifti))


@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_foreign_files_of_both_versions_and_byte_orders(
    tmp_path: Path, kind: str, order: str, nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    path = tmp_path / "foreign.nii.gz"
    image_class = getattr(nib, kind)
    header = image_class.header_class(endianness=order)
    header.set_data_dtype(np.dtype(order + "u2"))
    image = image_class(nifti_array("uint16").reshape(9, 8, 7, 1, 1), AFFINE, header)
    image.header["descrip"] = b"Jane Doe"
    image.to_filename(path)
    assert read_volume(path).source_shape == (9, 8, 7)
    assert np.array_equal(read_volume(path).array[::-1], nifti_array("float32"))


def test_integers_are_scaled_by_the_header(
    plain_nifti: Path,
    patch_bytes: Callable[..., Path],
    nifti_array: Callable[..., npt.NDArray[Any]],
) -> None:
    patch_bytes(plain_nifti, 112, "2f", 0.5, -10.0)
    loaded = read_volume(plain_nifti)
    assert np.array_equal(loaded.array[::-1], nifti_array("float32") * 0.5 - 10.0)
    assert loaded.flags == ("header_scaling",)


def test_qform_alone_and_pixdim_alone_place_the_volume_as_nibabel_does(
    plain_nifti: Path, patch_bytes: Callable[..., Path]
) -> None:
    patch_bytes(plain_nifti, 254, "h", 0)
    assert np.allclose(read_volume(plain_nifti).source_affine, AFFINE, atol=1e-4)
    patch_bytes(plain_nifti, 252, "h", 0)
    loaded = read_volume(plain_nifti)
    assert np.allclose(loaded.source_affine, nib.load(plain_nifti).affine)
    assert loaded.flags == ("orientation_unknown",)


# The writer


def test_writer_is_deterministic_and_leaves_no_text_and_no_partial_file(
    tmp_path: Path, nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    one, two = tmp_path / "one.nii.gz", tmp_path / "two.nii.gz"
    write_volume(one, nifti_array(), AFFINE)
    time.sleep(0.01)
    write_volume(two, np.asfortranarray(nifti_array()), AFFINE)
    assert sha256_file(one) == sha256_file(two)
    assert gzip.decompress(one.read_bytes())[148:252] == bytes(104)  # descrip and aux_file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.nii.gz", "two.nii.gz"]


def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    path = tmp_path / "volume.nii"
    write_volume(path, nifti_array(), AFFINE)
    before = sha256_file(path)

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_volume(path, nifti_array("uint8"), AFFINE)
    assert sha256_file(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["volume.nii"]


@pytest.mark.parametrize(
    ("array", "affine", "code"),
    [
        (np.zeros((3, 3, 3), np.int64), AFFINE, "unsupported_format"),
        (np.zeros((3, 3), np.float32), AFFINE, "unsupported_format"),
        (np.full((3, 3, 3), np.nan, np.float32), AFFINE, "nonfinite_voxels"),
        (np.zeros((3, 3, 3), np.uint8), np.zeros((4, 4)), "singular_affine"),
        (np.zeros((3, 3, 3), np.uint8), AFFINE * np.nan, "nonfinite_affine"),
    ],
)
def test_writer_refuses_what_the_reader_would(
    tmp_path: Path, array: npt.NDArray[np.generic], affine: npt.NDArray[np.float64], code: str
) -> None:
    with pytest.raises(VolumeError) as caught:
        write_volume(tmp_path / "x.nii", array, affine)
    assert caught.value.code == code
    assert not list(tmp_path.iterdir())


# Voxels


def test_nan_voxels_are_counted(
    tmp_path: Path, nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    array = nifti_array("float32")
    array[2, 3, :] = np.nan
    array[0, 0, 0] = np.inf
    path = tmp_path / "nan.nii"
    nib.Nifti1Image(array, AFFINE).to_filename(path)
    with pytest.raises(VolumeError, match="found 8 of 504") as caught:
        read_volume(path)
    assert caught.value.code == "nonfinite_voxels"


def test_float64_beyond_float32_is_refused(
    tmp_path: Path, refusal_code: Callable[..., str], nifti_array: Callable[..., npt.NDArray[Any]]
) -> None:
    array = nifti_array("float64") * 1e300
    nib.Nifti1Image(array, AFFINE).to_filename(tmp_path / "far.nii")
    assert refusal_code(tmp_path / "far.nii") == "nonfinite_voxels"


def test_constant_volume_is_refused_unless_it_is_a_label(
    tmp_path: Path, refusal_code: Callable[..., str]
) -> None:
    path = tmp_path / "empty_label.nii.gz"
    write_volume(path, np.zeros((4, 4, 4), np.uint8), AFFINE)
    assert refusal_code(path) == "constant_volume"
    assert not read_volume(path, allow_constant=True).array.any()


def test_rgb_complex_and_4d_have_headers_but_are_no_volumes(
    tmp_path: Path, refusal_code: Callable[..., str]
) -> None:
    rgb = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    pictures = {
        "rgb_voxels": rgb,
        "complex_voxels": np.ones((4, 4, 4), np.complex64),
        "not_3d": np.ones((4, 4, 4, 2), np.int16),
    }
    for code, array in pictures.items():
        path = tmp_path / f"{code}.nii.gz"
        nib.Nifti1Image(array, AFFINE).to_filename(path)
        assert refusal_code(path) == code
        header = read_header(path)
        assert (header.is_rgb, header.is_complex, header.ndim == 4) == (
            code == "rgb_voxels",
            code == "complex_voxels",
            code == "not_3d",
        )
    nib.Nifti1Image(np.ones((4, 4), np.int16), AFFINE).to_filename(tmp_path / "flat.nii")
    assert refusal_code(tmp_path / "flat.nii") == "not_3d"


# Comparing grids


def test_same_grid_sees_a_shift_a_turn_and_a_shape() -> None:
    shape = (10, 11, 12)
    assert same_grid(shape, AFFINE, shape, AFFINE + 1e-6)
    shifted = AFFINE.copy()
    shifted[2, 3] += 0.02
    assert not same_grid(shape, AFFINE, shape, shifted)
    assert same_grid(shape, AFFINE, shape, shifted, tolerance_mm=0.1)
    turned = AFFINE.copy()
    turned[1, 0] += 0.005  # 0.045 mm at the far corner
    assert not same_grid(shape, AFFINE, shape, turned)
    assert not same_grid(shape, AFFINE, (10, 11, 13), AFFINE)


# Real files

_REFUSED_REAL = {
    "15000_DTI.nii.gz": "not_3d",
    "Mag.nii": "not_3d",
    "phase_with_nan.nii": "not_3d",
    "14_DWI_colFA.nii": "rgb_voxels",
}


def _real_files() -> list[Path]:
    return sorted(REAL_MRI.rglob("*.nii*")) if REAL_MRI.is_dir() else []


@pytest.mark.skipif(not _real_files(), reason="shared real MRI volumes are not here")
def test_real_files_read_as_nibabel_reads_them_or_are_refused() -> None:
    refused = {}
    for path in _real_files():
        try:
            loaded = read_volume(path)
        except VolumeError as error:
            refused[path.name] = error.code
            continue
        image = nib.load(path)
        assert np.allclose(loaded.source_affine, image.affine, atol=1e-4)
        canonical = nib.as_closest_canonical(image)
        assert loaded.array.shape == canonical.shape
        middle = canonical.shape[2] // 2
        expected = np.asarray(canonical.dataobj[:, :, middle], dtype=np.float32)
        assert np.array_equal(loaded.array[:, :, middle], expected), path.name
        assert "geometry_disagreement" not in loaded.flags
    assert refused == _REFUSED_REAL
