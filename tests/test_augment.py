"""Flips and crops move every contrast and the label together and keep track of where they lie."""

import numpy as np
import pytest

from anycontrast_datasets.augment import (
    StudyView,
    augment_study,
    choose_contrasts,
    crop_study,
    flip_study,
)
from anycontrast_datasets.order import study_rng
from anycontrast_datasets.study import StudyArrays, StudyRecord, VolumeRecord

Voxel = tuple[int, int, int]

CONTRASTS = ("T1w", "FLAIR", "DWI")
IDENTITY = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def make_study() -> StudyArrays:
    """A study with one bright voxel, in every contrast and in the label, and distinct codes."""
    shape, marker = (9, 12, 7), (2, 9, 5)
    volumes = tuple(
        VolumeRecord(
            contrast=name,
            scale=1.0,
            offset=0.0,
            p0_5=0.0,
            p99_5=10.0,
            mean=5.0,
            std=2.0,
            num_foreground=1,
            occupancy="",
            source_spacing_mm=(1.0, 1.0, 1.0),
        )
        for name in CONTRASTS
    )
    record = StudyRecord(
        study_id="s",
        dataset="d",
        subject_id="p",
        session_id="1",
        split="train",
        shape=shape,
        spacing_mm=(1.0, 2.0, 3.0),
        affine=IDENTITY,
        volumes=volumes,
        has_label=True,
    )
    size = int(np.prod(shape))
    codes = {
        name: np.arange(1, size + 1, dtype=np.int16).reshape(shape) + np.int16(1000 * n)
        for n, name in enumerate(CONTRASTS)
    }
    label = np.zeros(shape, dtype=np.uint8)
    label[marker] = 3
    for array in codes.values():
        array[marker] = 9999
    return StudyArrays(record, codes, label)


def stored_index(view: StudyView, voxel: Voxel, flipped_axes: set[int]) -> tuple[int, ...]:
    """Where an array voxel of a view lies in the stored, unflipped box."""
    full = view.arrays.record.shape
    index = [o + v for o, v in zip(view.origin_vox, voxel, strict=True)]
    return tuple(
        full[a] - 1 - i if a in flipped_axes else i for a, i in zip(range(3), index, strict=True)
    )


@pytest.mark.parametrize("crop", [None, (4, 5, 6), (9, 12, 7), (16, 4, 8), (16, 16, 16)])
@pytest.mark.parametrize("draw", range(12))
def test_label_stays_with_the_image_through_flip_and_crop(crop: Voxel | None, draw: int) -> None:
    rng = study_rng(draw, 0, "s", "augment")
    view = augment_study(
        make_study(), rng, flip_axes=(0, 1, 2), crop_vox=crop, foreground_crop_fraction=1.0
    )
    assert view.arrays.label is not None
    marked = np.argwhere(view.arrays.label == 3)
    assert len(marked) == 1
    for codes in view.arrays.codes.values():
        assert codes.shape == view.arrays.label.shape == (crop or (9, 12, 7))
        assert np.array_equal(np.argwhere(codes == 9999), marked)


@pytest.mark.parametrize("draw", range(8))
def test_origin_says_where_in_the_stored_box_a_crop_lies(draw: int) -> None:
    study = make_study()
    rng = study_rng(draw, 0, "s", "augment")
    view = crop_study(StudyView(study), (4, 16, 3), rng)
    x, y, z = view.origin_vox
    assert y == -2
    crop = view.arrays.codes["T1w"]
    assert np.array_equal(crop[:, 2:14], study.codes["T1w"][x : x + 4, :, z : z + 3])
    assert not crop[:, :2].any()
    assert not crop[:, 14:].any()


def test_flip_of_a_crop_mirrors_its_place_about_the_box_centre() -> None:
    study = make_study()
    part = {name: codes[1:5, 2:10, 0:7] for name, codes in study.codes.items()}
    view = StudyView(StudyArrays(study.record, part), (1, 2, 0))

    # Seed 2 draws two numbers below 1/2, so that both axes are flipped.
    flipped = flip_study(view, (0, 1), np.random.default_rng(2))
    assert flipped.origin_vox == (9 - 1 - 4, 12 - 2 - 8, 0)
    for voxel in [(0, 0, 0), (3, 7, 6), (1, 2, 3)]:
        at = stored_index(flipped, voxel, {0, 1})
        assert flipped.arrays.codes["FLAIR"][voxel] == study.codes["FLAIR"][at]


def test_flips_and_inner_crops_are_views_and_leave_the_study_alone() -> None:
    study = make_study()
    before = {name: codes.copy() for name, codes in study.codes.items()}
    for draw in range(8):
        rng = study_rng(draw, 0, "s", "augment")
        view = augment_study(study, rng, flip_axes=(0, 1, 2), crop_vox=(4, 4, 4))
        assert all(np.shares_memory(view.arrays.codes[n], study.codes[n]) for n in CONTRASTS)
    assert all(np.array_equal(before[n], study.codes[n]) for n in CONTRASTS)


def test_each_named_axis_is_flipped_about_half_the_time_and_no_other() -> None:
    first = []
    for draw in range(400):
        view = flip_study(StudyView(make_study()), (0, 2), study_rng(draw, 0, "s", "augment"))
        codes = view.arrays.codes["T1w"]
        first.append((codes.strides[0] < 0, codes.strides[1] < 0, codes.strides[2] < 0))
    share = np.mean(first, axis=0)
    assert share[1] == 0
    assert abs(share[[0, 2]] - 0.5).max() < 0.1


def test_random_crops_reach_both_ends_of_the_box() -> None:
    starts = {
        crop_study(StudyView(make_study()), (8, 12, 5), study_rng(d, 0, "s", "augment")).origin_vox
        for d in range(100)
    }
    assert starts == {(x, 0, z) for x in (0, 1) for z in (0, 1, 2)}


def test_foreground_crop_of_an_unlabelled_study_is_a_random_crop() -> None:
    study = make_study()
    for label in (np.zeros((9, 12, 7), dtype=np.uint8), None):
        bare = StudyArrays(study.record, study.codes, label)
        rng = study_rng(0, 0, "s", "augment")
        view = crop_study(StudyView(bare), (4, 4, 4), rng, foreground_crop_fraction=1.0)
        assert view.shape == (4, 4, 4)


def test_chosen_contrasts_are_non_empty_ordered_subsets_of_every_kind() -> None:
    drawn = {choose_contrasts(CONTRASTS, study_rng(d, 0, "s", "contrasts")) for d in range(300)}
    assert all(subset == tuple(c for c in CONTRASTS if c in subset) for subset in drawn)
    assert len(drawn) == 7
    assert () not in drawn
