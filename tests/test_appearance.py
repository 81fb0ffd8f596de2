"""Pictures are told apart by what they show; a brain is never refused for its looks."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from anycontrast_datasets.appearance import Appearance, check_appearance
from anycontrast_datasets.contrast import guess_from_name
from anycontrast_datasets.volume import read_volume

REAL_MRI = Path(__file__).parents[2] / "shared" / "real_mri"
FloatArray = npt.NDArray[np.float32]

# Relative signal of fluid, grey and white matter.
SIGNALS = {
    "T1w": (0.25, 0.65, 1.0),
    "T2w": (2.2, 1.0, 0.75),
    "PDw": (1.05, 1.0, 0.85),
    "FLAIR": (0.2, 1.0, 0.8),
    "DWI": (0.3, 1.0, 0.9),
    "ADC": (3.0, 0.85, 0.75),
    "T2starw": (1.5, 1.0, 0.85),
    "FA": (0.05, 0.2, 0.6),
    "CBF": (0.1, 1.0, 0.4),
}


def _ellipsoid(
    shape: tuple[int, int, int], spacing: float, half_axes: tuple[float, float, float]
) -> npt.NDArray[np.float64]:
    """1 on the surface, 0 in the centre."""
    axes = np.meshgrid(*[(np.arange(n) - n / 2) * spacing for n in shape], indexing="ij")
    x, y, z = (axis / half for axis, half in zip(axes, half_axes, strict=True))
    return np.asarray(np.sqrt(x**2 + y**2 + z**2))


@lru_cache
def _brain(contrast: str, spacing: float = 3.0, lesion: float | None = None) -> FloatArray:
    """A smooth head-less brain of 135 x 165 x 125 mm: ventricles, white core, folded grey rim."""
    shape = tuple(round(size / spacing) for size in (180, 210, 180))
    rim = _ellipsoid(shape, spacing, (67, 82, 62))  # type: ignore[arg-type]
    ventricles = _ellipsoid(shape, spacing, (16, 36, 14)) < 1  # type: ignore[arg-type]
    folds = np.random.default_rng(3).standard_normal(shape)
    folds = ndimage.gaussian_filter(folds, 5.0 / spacing)
    fluid, grey, white = SIGNALS[contrast]
    image = np.where(rim > 0.8 + 0.4 * folds / folds.std() * 0.3, grey, white)
    image = np.where((rim > 0.93) | ventricles, fluid, image)
    if lesion is not None:
        inside = _ellipsoid(shape, spacing, (28, 40, 30)) < 1  # type: ignore[arg-type]
        image[np.roll(inside, round(-35 / spacing), axis=0)] = lesion
    image = np.where(rim < 1, image, 0.0)
    image = ndimage.gaussian_filter(image, 2.0 / spacing)
    noise = np.random.default_rng(4).standard_normal(shape) * 0.03
    return (700 * np.abs(image + noise)).astype(np.float32)


def _check(array: FloatArray, contrast: str | None, spacing: float = 3.0) -> Appearance:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    return check_appearance(array, affine, (spacing,) * 3, contrast)


@pytest.mark.parametrize("contrast", sorted(SIGNALS))
def test_no_contrast_of_a_made_up_brain_is_refused(contrast: str) -> None:
    assert _check(_brain(contrast), contrast).flags == ()


@pytest.mark.parametrize("spacing", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("said", ["T2w", "FLAIR"])
@pytest.mark.parametrize("shown", ["T2w", "FLAIR"])
def test_fluid_tells_t2w_from_flair_whatever_is_said(shown: str, said: str, spacing: float) -> None:
    seen = _check(_brain(shown, spacing), said, spacing)
    assert seen.contrast == shown
    assert len(seen.evidence) == 1


def test_a_bright_lesion_does_not_turn_a_flair_into_t2w() -> None:
    for brightness in (1.5, 2.0, 3.0):
        assert _check(_brain("FLAIR", lesion=brightness), "FLAIR").contrast != "T2w"


@pytest.mark.parametrize("said", [None, "ADC", "PDw", "unknown"])
def test_fluid_is_not_asked_about_other_contrasts(said: str | None) -> None:
    assert _check(_brain("T2w"), said) == Appearance()


@pytest.mark.parametrize("said", ["T1w", "T1wCE"])
def test_bright_fluid_speaks_against_t1w_and_dark_fluid_says_nothing(said: str) -> None:
    assert _check(_brain("T2w"), said).contrast == "T2w"
    for shown in ("T1w", "FLAIR", "PDw"):
        assert _check(_brain(shown), said) == Appearance()


def test_scale_and_offset_of_intensities_do_not_matter() -> None:
    brain = _brain("FLAIR")
    reference = _check(brain, "T2w")
    assert reference.contrast == "FLAIR"
    assert _check(brain * np.float32(1e-4), "T2w").contrast == "FLAIR"
    assert _check(brain - np.float32(500), "T2w").contrast == "FLAIR"


def test_result_is_deterministic_and_leaves_the_array_alone() -> None:
    brain = _brain("T2w")
    before = brain.copy()
    assert _check(brain, "T2w") == _check(brain, "T2w")
    assert np.array_equal(brain, before)


def test_round_test_object_is_no_brain() -> None:
    radius = _ellipsoid((60, 60, 40), 3.0, (80, 80, 80))
    sphere = ndimage.gaussian_filter(np.where(radius < 1, 1000.0, 0.0), 0.5).astype(np.float32)
    assert _check(sphere, "T1w").flags == ("not_a_brain",)


def test_hounsfield_units_of_a_head_look_like_ct() -> None:
    rim = _ellipsoid((66, 76, 66), 3.0, (75, 90, 80))
    head = np.where(rim < 0.9, 35.0, np.where(rim < 1, 1100.0, -1000.0))
    head[_ellipsoid((66, 76, 66), 3.0, (16, 36, 14)) < 1] = 5.0
    noise = np.random.default_rng(5).standard_normal(head.shape) * 8
    assert _check((head + noise).astype(np.float32), None).flags == ("ct_like",)


def test_small_crops_and_thin_slabs_hold_no_brain() -> None:
    brain = _brain("T2w")
    assert _check(brain[:30, :30], "T2w").flags == ("field_of_view_small",)
    assert _check(brain[:, :, 20:32], "T2w").flags == ("field_of_view_small",)
    assert _check(brain[:, :, 12:48], "T2w").flags == ()


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_empty_pictures_say_nothing(value: float) -> None:
    flat = np.full((60, 60, 60), value, dtype=np.float32)
    assert _check(flat, "T2w") == Appearance()
    flat[30, 30, 30] += 1
    assert _check(flat, "T2w").contrast is None


# Real volumes: folder/name -> (flags, contrast seen when asked)
_BRAIN = ((), None)
_EXPECTED: dict[str, tuple[tuple[str, ...], str | None]] = {
    "openms_cross/patient19/T1.nii.gz": _BRAIN,
    "openms_cross/patient19/T1POST.nii.gz": _BRAIN,
    "openms_cross/patient19/T2.nii.gz": ((), "T2w"),
    "openms_cross/patient19/FLAIR.nii.gz": ((), "FLAIR"),
    "openms_long/patient12/study1_T1W.nii.gz": _BRAIN,
    "openms_long/patient12/study1_T2W.nii.gz": ((), "T2w"),
    "openms_long/patient12/study1_FLAIR.nii.gz": ((), "FLAIR"),
    "openms_long/patient20/study2_T1W.nii.gz": _BRAIN,
    "openms_long/patient20/study2_FLAIR.nii.gz": ((), "FLAIR"),
    "openms_long/patient01/study1_T1W.nii.gz": _BRAIN,
    "openms_long/patient01/study1_FLAIR.nii.gz": ((), "FLAIR"),
    "isles22/sub-strokecase0009/sub-strokecase0009_ses-0001_adc.nii.gz": _BRAIN,
    "isles22/sub-strokecase0009/sub-strokecase0009_ses-0001_dwi.nii.gz": _BRAIN,
    "isles22/sub-strokecase0009/sub-strokecase0009_ses-0001_flair.nii.gz": ((), "FLAIR"),
    "cstar_stroke/T1.nii.gz": _BRAIN,
    "cstar_stroke/T2.nii.gz": ((), "T2w"),
    "cstar_stroke/FLAIR.nii.gz": ((), "FLAIR"),
    "xa30/12_DWI_trace.nii": _BRAIN,
    "xa30/13_DWI_FA.nii": _BRAIN,
    "xa30/16_DWI_b0.nii": _BRAIN,
    "xa30/28_asl.nii": _BRAIN,
    "xa30/8_gre_e1.nii": _BRAIN,
    "xa30/9_gre_phase.nii": _BRAIN,
    "torchio/t2.nii.gz": ((), "FLAIR"),  # named t2
    "negatives/phantom_T1W_TSE.nii.gz": (("not_a_brain",), None),
    "negatives/scct.nii": (("ct_like",), None),
    "negatives/spine_t2.nii.gz": (("field_of_view_small",), None),
}


@pytest.mark.skipif(not REAL_MRI.is_dir(), reason="shared real MRI volumes are not here")
@pytest.mark.parametrize("name", sorted(_EXPECTED))
def test_real_volumes_look_like_what_they_are(name: str) -> None:
    loaded = read_volume(REAL_MRI / name)
    said = guess_from_name(name).contrast
    seen = check_appearance(loaded.array, loaded.affine, loaded.spacing_mm, said)
    assert (seen.flags, seen.contrast) == _EXPECTED[name]
    assert bool(seen.evidence) == bool(seen.flags or seen.contrast)
