"""Crops and patches of a study, for every store."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.store.partial import clip_box, crop_arrays, gather_patches, patch_grid
from anycontrast_datasets.study import StudyArrays

SHAPE = (9, 8, 7)


@pytest.fixture
def codes() -> npt.NDArray[np.int16]:
    return np.random.default_rng(0).integers(0, 4096, SHAPE).astype(np.int16)


@pytest.mark.parametrize(
    ("start", "size", "inside"),
    [
        ((0, 0, 0), SHAPE, np.s_[:, :, :]),
        ((2, 3, 4), (4, 4, 2), np.s_[2:6, 3:7, 4:6]),
        ((-3, 5, 0), (5, 9, 1), np.s_[:2, 5:, :1]),
        ((8, 7, 6), (1, 1, 1), np.s_[8:, 7:, 6:]),
    ],
)
def test_crop_is_the_part_inside_the_box(
    study_of: Callable[..., StudyArrays],
    codes: npt.NDArray[np.int16],
    start: tuple[int, int, int],
    size: tuple[int, int, int],
    inside: tuple[slice, slice, slice],
) -> None:
    label = (codes > 2000).astype(np.uint8)
    arrays = study_of({"T1w": codes, "ADC": codes + 1}, label=label)
    crop = crop_arrays(arrays, start, size)
    assert crop.record == arrays.record
    np.testing.assert_array_equal(crop.codes["T1w"], codes[inside])
    np.testing.assert_array_equal(crop.codes["ADC"], codes[inside] + 1)
    assert crop.label is not None
    np.testing.assert_array_equal(crop.label, label[inside])
    crop.codes["T1w"][:] = -1
    assert codes.min() >= 0, "a crop is a copy"


@pytest.mark.parametrize(
    ("start", "size"),
    [((9, 0, 0), (1, 1, 1)), ((-2, 0, 0), (2, 8, 7)), ((0, 0, 0), (0, 1, 1)), ((0, 0), (1, 1))],
)
def test_crop_outside_or_empty_is_refused(start: tuple[int, ...], size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="crop: "):
        clip_box(SHAPE, start, size)


@pytest.mark.parametrize("patch", [(3, 4, 7), (4, 4, 4), (16, 16, 16), (1, 1, 1)])
def test_patches_equal_slices_of_the_padded_grid(
    codes: npt.NDArray[np.int16], patch: tuple[int, int, int]
) -> None:
    grid = patch_grid(SHAPE, patch)
    padded = np.zeros([g * p for g, p in zip(grid, patch, strict=True)], dtype=np.int16)
    padded[:9, :8, :7] = codes
    num_patches = int(np.prod(grid))
    index = np.random.default_rng(1).permutation(num_patches)[: max(num_patches // 2, 1)]
    patches = gather_patches(codes, patch, index)
    assert patches.shape == (len(index), np.prod(patch)) and patches.dtype == np.int16
    for row, flat in zip(patches, index, strict=True):
        at = np.unravel_index(flat, grid)
        part = padded[tuple(slice(a * p, a * p + p) for a, p in zip(at, patch, strict=True))]
        np.testing.assert_array_equal(row, part.ravel())


def test_patches_of_a_view_and_into_a_given_array(codes: npt.NDArray[np.int16]) -> None:
    index = np.array([3, 0, 3])
    whole = gather_patches(np.ascontiguousarray(codes[::-1]), (3, 2, 7), index)
    out = np.empty_like(whole)
    assert gather_patches(codes[::-1], (3, 2, 7), index, out) is out
    np.testing.assert_array_equal(out, whole)
    assert gather_patches(codes, (3, 2, 7), np.array([], dtype=np.int64)).shape == (0, 42)


@pytest.mark.parametrize("index", [[-1], [12], [[0]]])
def test_patch_outside_the_grid_is_refused(codes: npt.NDArray[np.int16], index: list[int]) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 11"):
        gather_patches(codes, (3, 2, 7), np.array(index))


def test_patch_of_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_vox"):
        patch_grid(SHAPE, (4, 0, 4))
