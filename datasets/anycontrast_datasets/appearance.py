"""What a picture itself says about its contrast and content: cheap, deterministic tests.

In: a volume on RAS+ axes and the contrast it is said to be. Out: flags, and a contrast where the
picture contradicts or confirms the name. About 0.05 s a volume, on a 3 mm copy.

The tests are built to stay silent when in doubt. They know: T2w or FLAIR, by the brightness of
cerebrospinal fluid deep in the head (asked of a volume that is said to be one of the two and, for
bright fluid only, of one that is said to be T1w); a field of view that holds no brain; a uniform
round test object; a computed tomography (uniform soft tissue in a brighter shell, relative to air).
They do not know: T1w from T1wCE, body parts of a large field of view, a windowed computed
tomography without its air level.

Thresholds: set on the shared real volumes, with the nearest real value of either side beside each.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.work_copy import FloatArray, Head, WorkCopy, make_work_copy

_SMALL_FIELD_MM = 100.0
"""Two axes below this hold no brain; smallest real head 120 mm, largest crop 60 mm."""
_THIN_FIELD_MM = 40.0
"""One axis below this holds no brain; smallest real slab 90 mm."""

_CSF_BRIGHT = 0.9
"""95th percentile over median, minus 1, deep in the head, lesser side: T2w 1.41-1.73,
b0 1.00."""
_CSF_BRIGHT_OVER_DARK = 2.5
"""Bright over dark tail: T2w 3.1-6.8, b0 2.6."""
_CSF_BRIGHT_FLAIR = 0.55
"""The same as _CSF_BRIGHT, greater side: FLAIR 0.24-0.36."""
_CSF_DARK_FLAIR = 0.35
"""1 minus 5th percentile over median: FLAIR 0.50-0.87."""
_DEPTH_BELOW_TOP_MM = 60.0
_CENTRAL_HALF_AXES_MM = (25.0, 45.0, 20.0)
"""An ellipsoid about the lateral ventricles, with white matter around them."""
_MIN_CENTRAL_VOXELS = 200
_SURFACE_MM = 6.0

_UNIFORM_IQR = 0.10
"""Interquartile range over median of the core: test object 0.05, brains 0.14-0.94."""
_ROUND_RATIO = 0.94
"""Width over length in the axial plane: test object 0.98, heads 0.74-0.88."""
_CT_SPREAD = 0.20
"""5th to 95th percentile over median of the core, air = 0: CT 0.11, brains 0.54-2.74."""
_CT_SHELL = 1.2
"""95th percentile of the shell over the median of the core."""


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """What the picture says."""

    flags: tuple[str, ...] = ()
    """Of `field_of_view_small`, `not_a_brain`, `ct_like`."""
    contrast: str | None = None
    """T2w or FLAIR when the test was asked and sure, None otherwise. A T1w that is said to be T2w
    looks like a FLAIR to this test: its evidence is dark fluid, nothing more."""
    evidence: tuple[str, ...] = ()
    """One clause with the numbers per flag and contrast."""


def check_appearance(
    array: FloatArray,
    affine: npt.NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    contrast: str | None,
    copy: WorkCopy | None = None,
) -> Appearance:
    """Test a picture.

    Args:
        array: [X, Y, Z] finite, RAS+ axes, as `read_volume` gives it.
        affine: [4, 4] index -> RAS+ mm; only its axes matter, the origin of a file may be anywhere.
        spacing_mm: along the axes of `array`.
        contrast: vocabulary name that the volume is said to be, None when nobody says.
        copy: of the array, where there is one already.
    """
    field_mm = np.array(array.shape) * np.array(spacing_mm)
    if np.sum(field_mm < _SMALL_FIELD_MM) >= 2 or field_mm.min() < _THIN_FIELD_MM:
        sizes = " x ".join(f"{size:.0f}" for size in field_mm)
        clause = f"picture: field of view {sizes} mm holds no brain"
        return Appearance(flags=("field_of_view_small",), evidence=(clause,))
    head = (copy or make_work_copy(array, spacing_mm)).head
    if head is None:
        return Appearance()
    flags, evidence = _test_uniformity(head, field_mm)
    if flags or contrast not in ("T2w", "FLAIR", "T1w", "T1wCE"):
        return Appearance(flags=flags, evidence=evidence)
    seen, clauses = _test_csf(head)
    if seen == "FLAIR" and contrast not in ("T2w", "FLAIR"):
        return Appearance()  # the fluid of a T1w is dark too
    return Appearance(contrast=seen, evidence=clauses)


def _test_uniformity(
    head: Head, field_mm: npt.NDArray[np.float64]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    deepest = float(head.depth_mm.max())
    core = head.array[head.depth_mm > 0.6 * deepest] - head.air
    shell = head.array[(head.depth_mm > 0) & (head.depth_mm < 0.3 * deepest)] - head.air
    low, q1, middle, q3, high = (float(q) for q in np.percentile(core, [5, 25, 50, 75, 95]))
    if middle <= 0 or shell.size == 0 or np.any(head.extent_mm[:2] < _SMALL_FIELD_MM):
        return (), ()
    spread, bright = (high - low) / middle, float(np.percentile(shell, 95)) / middle
    if spread < _CT_SPREAD and bright > _CT_SHELL:
        clause = (
            f"picture: uniform core (spread {spread:.2f}) in a shell {bright:.1f} times brighter"
        )
        return ("ct_like",), (clause,)
    width, length = np.sort(head.extent_mm[:2])
    fills_field = bool(np.all(head.extent_mm[:2] > 0.97 * field_mm[:2]))
    if (q3 - q1) / middle < _UNIFORM_IQR and width / length > _ROUND_RATIO and not fills_field:
        clause = (
            f"picture: uniform (interquartile {(q3 - q1) / middle:.2f} of the median) and round "
            f"(width/length {width / length:.2f}), like a test object"
        )
        return ("not_a_brain",), (clause,)
    return (), ()


def _test_csf(head: Head) -> tuple[str | None, tuple[str, ...]]:
    """Tell T2w from FLAIR by the bright and the dark tail around the ventricles.

    T2w wants its bright tail on both sides and well above the dark one, so that a one-sided bright
    lesion of a FLAIR, whose ventricles are dark, does not pass for fluid.
    """
    left, right = _central_voxels(head)
    if min(left.size, right.size) < _MIN_CENTRAL_VOXELS / 2:
        return None, ()
    low, middle = (float(q) for q in np.percentile(np.concatenate([left, right]), [5, 50]))
    if middle <= 0:
        return None, ()
    sides = [float(np.percentile(side, 95)) / middle - 1 for side in (left, right)]
    dark = 1 - low / middle
    numbers = f"deep bright tails {sides[0]:.2f} and {sides[1]:.2f}, dark tail {dark:.2f}"
    if min(sides) > max(_CSF_BRIGHT, _CSF_BRIGHT_OVER_DARK * dark):
        return "T2w", (f"picture: fluid brighter than brain as in T2w ({numbers})",)
    if max(sides) < _CSF_BRIGHT_FLAIR and dark > _CSF_DARK_FLAIR:
        return "FLAIR", (f"picture: fluid darker than brain as in FLAIR ({numbers})",)
    return None, ()


def _central_voxels(head: Head) -> tuple[FloatArray, FloatArray]:
    """Return the voxels about the ventricles, left and right, minus air.

    They lie 60 mm below the top of the head; voxels at its surface, and in open fissures of a
    stripped brain, are left out.
    """
    top = int(np.argwhere(head.inside.any(axis=(0, 1))).max())
    heights = (np.arange(head.inside.shape[2]) - top) * head.spacing_mm[2] + _DEPTH_BELOW_TOP_MM
    slab = head.inside[:, :, np.abs(heights) <= 15.0]
    if not slab.any():
        return np.empty(0, dtype=np.float32), np.empty(0, dtype=np.float32)
    centre = np.argwhere(slab).mean(axis=0)
    distances = [
        (np.arange(head.inside.shape[0]) - centre[0]) * head.spacing_mm[0],
        (np.arange(head.inside.shape[1]) - centre[1]) * head.spacing_mm[1],
        heights,
    ]
    x, y, z = (d / a for d, a in zip(distances, _CENTRAL_HALF_AXES_MM, strict=True))
    near = x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None, :] ** 2 < 1
    near &= head.depth_mm > _SURFACE_MM
    image = head.array - np.float32(head.air)
    left = x < 0
    return image[left][near[left]], image[~left][near[~left]]
