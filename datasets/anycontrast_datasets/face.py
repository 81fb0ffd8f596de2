"""Does a volume show a face? A detector for the facial skin surface, and what headers say of it.

In: the 3 mm copy of a volume, words of its name and sidecar. Out: one of `FACE_STATES` with the
evidence. The detector follows the front of the head from the brow down: a nose stands out from the
cheeks over a height of centimetres, or the surface goes on below the brow without falling back. A
removed face falls back by 4 to 8 cm there, a stripped brain by 4 to 10 cm.

Measured on the shared real volumes: both faces found (T1w at 2 mm, FLAIR of 5.5 mm slices), and 104
of 108 copies of them that were pitched, turned or rolled by up to 12 degrees, cut from below and
made noisy; none in the 13 defaced or stripped volumes and their 702 such copies. A field that ends
above the nose shows no face.

Source: reference/reliability.md, P4.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.work_copy import BoolArray, Head, WorkCopy

FACE_CONTRASTS = ("T1w", "T1wCE", "T2w", "PDw", "FLAIR", "GRE", "SWI", "T2starw", "unknown")
"""Contrasts in which a face can be recognised; diffusion and maps are not among them."""

_NO_FACE_FIELD_MM = 40.0
"""A field with an axis below this holds no face to recognise."""
_HEAD_MM = 100.0
"""An object with two axes below this is not looked at as a head."""
_FILLED_FRONT = 0.8
"""Share of the lines from front to back that meet the object at the end of the field."""
_NOSE_MM = 14.0
"""Nose over cheeks: real noses 14 to 32, defaced remnants reach it over 12 mm of height only."""
_NOSE_BEHIND_BROW_MM = 25.0
_NOSE_HEIGHT_MM = 13.0
"""Height over which a nose stands out: real 28 to 40; defaced at most 12."""
_NOSE_DEPTH_MM = (98.0, 185.0)
"""Below the vertex."""
_SURFACE_MM = 16.0
"""A surface that falls back by no more than this down to the end of the field is a face."""
_SURFACE_END_MM = (118.0, 150.0)
"""Below the vertex: a field that ends above says nothing; the surface is judged down to the
second at most."""
_BROW_DEPTH_MM = (15.0, 95.0)
_HEAD_RADIUS_MM = 85.0
_BRAIN_MM = (146.0, 178.0)
"""Width and length: real brains at most 138 x 162, heads at least 150 x 193."""
_SKULL_DIP = 0.9
"""Dark bone between scalp and brain, over the scalp: real heads 0.17 to 0.87; brains 1 and more."""
_CLEAN_BACKGROUND = 0.01
"""Share of background voxels that are not the one background value; real stripped: 0."""

_REFACED = re.compile(r"(?<![a-z])(?:mri_?)?reface(?:d)?(?![a-z])")
_DEFACED = re.compile(r"(?<![a-z])(?:(?:py)?deface(?:d)?|quickshear|facemask(?:ed)?)(?![a-z])")
_STRIPPED = re.compile(
    r"(?<![a-z])(?:skull_?strip(?:ped)?|stripped|bet|brain(?:_?only|extracted)?|synthstrip)(?![a-z])"
)
_CLEANED_FEATURES_CODE = "113102"
"""DICOM PS3.16 CID 7050: Clean Recognizable Visual Features Option."""


@dataclass(frozen=True, kw_only=True)
class FaceFinding:
    """What is known of a face in one volume."""

    state: str
    """One of `FACE_STATES`."""
    evidence: str = ""
    """One clause with the numbers; empty where nothing was measured."""


def detect_face(copy: WorkCopy) -> FaceFinding:
    """Look for a facial surface.

    Args:
        copy: of a volume on RAS+ axes.

    Returns:
        `present`; `defaced` when no facial surface is in the field; `stripped` when there is no
        skull either; `unknown` when there is no head-sized object to look at.
    """
    if copy.field_mm.min() < _NO_FACE_FIELD_MM:
        return FaceFinding(state="defaced", evidence="face: the field is too small for one")
    head = copy.head
    if head is not None and _fills_front(head):
        return FaceFinding(state="defaced", evidence="face: no air in front, no surface seen")
    if head is None or np.sum(head.extent_mm < _HEAD_MM) >= 2:
        return FaceFinding(state="unknown", evidence="face: no head-sized object found")
    nose_mm, falls_back_mm, end_mm = _measure_front(head)
    numbers = (
        f"nose over {nose_mm:.0f} mm of height, surface falls back {falls_back_mm:.0f} mm, field "
        f"ends {end_mm:.0f} mm below the vertex"
    )
    surface_goes_on = end_mm >= _SURFACE_END_MM[0] and falls_back_mm <= _SURFACE_MM
    if nose_mm >= _NOSE_HEIGHT_MM or surface_goes_on:
        return FaceFinding(state="present", evidence=f"face: {numbers}")
    state = "stripped" if _is_stripped(head, copy) else "defaced"
    return FaceFinding(state=state, evidence=f"no face: {numbers}")


def stated_face(name: str, sidecar: Mapping[str, object]) -> str | None:
    """Return the face state that a file name or sidecar claims, None when they claim none."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower().rsplit("/", 1)[-1])
    parts = [
        *(str(sidecar.get(key, "")) for key in ("DeidentificationMethod", "ImageComments")),
        *(("defaced",) if sidecar.get("Defaced") is True else ()),
        *(("stripped",) if sidecar.get("SkullStripped") is True else ()),
    ]
    text = f"{words} {re.sub(r'[^a-z0-9]+', '_', ' '.join(parts).lower())}"
    if _REFACED.search(text.replace("_", " ")) or _REFACED.search(text):
        return "refaced"
    codes = str(sidecar.get("DeidentificationMethodCodeSequence", ""))
    if _DEFACED.search(text.replace("_", " ")) or _CLEANED_FEATURES_CODE in codes:
        return "defaced"
    return "stripped" if _STRIPPED.search(text.replace("_", " ")) else None


def decide_face(measured: FaceFinding, stated: str | None) -> FaceFinding:
    """Join what was measured and what is claimed.

    A claim settles an unknown and tells refaced from present; it does not talk a measured face
    away, because a failed defacing keeps its name.
    """
    if stated is None or measured.state in ("stripped", "defaced"):
        return measured
    if measured.state == "present" and stated != "refaced":
        return measured
    evidence = "; ".join(part for part in (measured.evidence, f"stated {stated}") if part)
    return FaceFinding(state=stated, evidence=evidence)


def _fills_front(head: Head) -> bool:
    """Say if nearly everywhere the object reaches the front end of the field."""
    columns = head.inside.any(axis=1)
    at_end = head.inside[:, -1, :]
    return float(at_end.sum()) >= _FILLED_FRONT * float(columns.sum())


def _measure_front(head: Head) -> tuple[float, float, float]:
    """Return height of the nose, retreat of the surface at the field's end, and that end, in mm."""
    inside, (dx, dy, dz) = head.inside, head.spacing_mm
    heights = np.flatnonzero(inside.any(axis=(0, 1)))
    top = int(heights.max())
    below = (top - np.arange(inside.shape[2])) * dz + _cut_cap_mm(head, top)
    rows = np.flatnonzero((below > 0) & inside.any(axis=(0, 1)))
    upper = inside[:, :, max(0, top - round(60 / dz)) : top + 1]
    middle = float(np.argwhere(upper)[:, 0].mean())
    front = _front_mm(inside, dy)
    centre = _row_max(front, middle, 12.0 / dx)
    brow_rows = rows[(below[rows] >= _BROW_DEPTH_MM[0]) & (below[rows] <= _BROW_DEPTH_MM[1])]
    if brow_rows.size == 0:
        return 0.0, float("inf"), float(below[rows].max())
    brow = float(np.nanmax(centre[brow_rows]))
    nose = np.zeros(inside.shape[2], dtype=bool)
    for z in rows[(below[rows] >= _NOSE_DEPTH_MM[0]) & (below[rows] <= _NOSE_DEPTH_MM[1])]:
        stands_out = _stands_out(front[:, z], middle, dx)
        nose[z] = stands_out >= _NOSE_MM and brow - centre[z] <= _NOSE_BEHIND_BROW_MM
    end = float(below[rows].max())
    judged = min(end, _SURFACE_END_MM[1])
    last = rows[(below[rows] >= judged - 10.0) & (below[rows] <= judged)]
    falls_back = np.nan_to_num(brow - centre[last], nan=np.inf)
    return _longest_run(nose) * dz, float(falls_back.max()), end


def _cut_cap_mm(head: Head, top: int) -> float:
    """Height of the part of the head that lies above the field, from the area of the cut."""
    dx, dy, _ = head.spacing_mm
    radius_squared = float(head.inside[:, :, top].sum()) * dx * dy / np.pi
    if top < head.inside.shape[2] - 1:
        return 0.0
    return _HEAD_RADIUS_MM - float(np.sqrt(max(0.0, _HEAD_RADIUS_MM**2 - radius_squared)))


def _front_mm(inside: BoolArray, dy: float) -> npt.NDArray[np.float64]:
    """[X, Z] place of the frontmost voxel of the object, NaN where there is none."""
    last = inside.shape[1] - 1 - np.argmax(inside[:, ::-1, :], axis=1)
    return np.where(inside.any(axis=1), last * dy, np.nan)


def _row_max(
    front: npt.NDArray[np.float64], middle: float, half_width: float
) -> npt.NDArray[np.float64]:
    """[Z] frontmost place within `half_width` voxels of the midline."""
    low, high = round(middle - half_width), round(middle + half_width) + 1
    part = np.where(np.isnan(front), -np.inf, front)[max(0, low) : high]
    best = part.max(axis=0)
    return np.where(np.isinf(best), np.nan, best)


def _stands_out(front: npt.NDArray[np.float64], middle: float, dx: float) -> float:
    """How far the frontmost place near the midline lies before both cheeks, in mm."""
    filled = np.where(np.isnan(front), -np.inf, front)
    near = np.abs(np.arange(len(front)) - middle) * dx <= 25.0
    if not np.isfinite(filled[near]).any():
        return 0.0
    tip = int(np.argmax(np.where(near, filled, -np.inf)))
    away = (np.arange(len(front)) - tip) * dx
    cheeks = [filled[(side * away >= 24) & (side * away <= 40)] for side in (-1, 1)]
    if min(cheek.size for cheek in cheeks) == 0:
        return 0.0
    highest = max(float(cheek.max()) for cheek in cheeks)
    return float(filled[tip]) - highest if np.isfinite(highest) else 0.0


def _longest_run(values: npt.NDArray[np.bool_]) -> int:
    longest = run = 0
    for value in values:
        run = run + 1 if value else 0
        longest = max(longest, run)
    return longest


def _is_stripped(head: Head, copy: WorkCopy) -> bool:
    """A clean background, and the size of a brain or no dark bone under a brighter scalp."""
    outside = copy.sample[head.far_outside]
    if outside.size and float((outside != np.median(outside)).mean()) > _CLEAN_BACKGROUND:
        return False
    if np.all(head.extent_mm[:2] < _BRAIN_MM):
        return True
    top = int(np.flatnonzero(head.inside.any(axis=(0, 1))).max())
    dz = float(head.spacing_mm[2])
    upper = slice(max(0, top - round(70 / dz)), max(1, top - round(15 / dz)))
    depth, image = head.depth_mm[:, :, upper], head.array[:, :, upper] - head.air
    shells = [image[(depth > low) & (depth <= low + 3.5)] for low in (0.0, 3.5, 7.0, 10.5)]
    medians = [float(np.median(shell)) for shell in shells if shell.size]
    if len(medians) < len(shells):
        return False
    return min(medians[k] / max(medians[:k]) for k in (1, 2, 3)) >= _SKULL_DIP
