"""The slices of one DICOM file: where each lies and how it was made.

In: a parsed header, classic (one slice) or enhanced (functional groups, shared and per frame).
Out: a `Frame` per slice, with None for what the header does not say.

Source: DICOM PS3.3 C.7.6.2 (plane), C.7.6.16 (functional groups).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from anycontrast_datasets.sources import dicom_values as values

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MAX_TE_MS = 10_000.0


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice, wherever it is stored. None: the header does not say."""

    position_mm: tuple[float, ...] | None
    """Centre of the first pixel, DICOM (LPS) mm."""
    orientation: tuple[float, ...] | None
    """Unit direction of a row, then of a column."""
    spacing_mm: tuple[float, ...] | None
    """Between rows, between columns."""
    te_s: float | None
    b_value: float | None


def read_frames(
    dataset: "Dataset", max_frames: int
) -> tuple[tuple[Frame, ...], tuple["Dataset | None", ...]]:
    """Return the slices of a file, and the functional groups of the first one (own, shared).

    Without functional groups the file is classic, and the groups are empty.
    """
    shared = values.first_item(dataset, "SharedFunctionalGroupsSequence")
    per_frame: Any = dataset.get("PerFrameFunctionalGroupsSequence")
    if shared is None and not per_frame:
        return (_classic_frame(dataset),), ()
    own = list(per_frame or [])[:max_frames]
    frames = tuple(_enhanced_frame((group, shared)) for group in own)
    return frames, (own[0] if own else None, shared)


def _classic_frame(dataset: "Dataset") -> Frame:
    b_value = values.believed(values.number(dataset, "DiffusionBValue"))
    return Frame(
        position_mm=values.numbers(dataset, "ImagePositionPatient", 3) or None,
        orientation=_one_of_equals(values.numbers(dataset, "ImageOrientationPatient", 6)) or None,
        spacing_mm=_one_of_equals(values.numbers(dataset, "PixelSpacing", 2)) or None,
        te_s=_seconds(values.number(dataset, "EchoTime")),
        b_value=values.private_b_value(dataset) if b_value is None else b_value,
    )


def _enhanced_frame(groups: tuple["Dataset | None", ...]) -> Frame:
    def take(group: str, keyword: str) -> tuple[float, ...]:
        item = values.group_item(groups, group)
        return () if item is None else values.numbers(item, keyword)

    position = take("PlanePositionSequence", "ImagePositionPatient")
    orientation = take("PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = take("PixelMeasuresSequence", "PixelSpacing")
    te_ms = take("MREchoSequence", "EffectiveEchoTime")
    b_value = take("MRDiffusionSequence", "DiffusionBValue")
    return Frame(
        position_mm=position if len(position) == 3 else None,
        orientation=_one_of_equals(orientation) if len(orientation) == 6 else None,
        spacing_mm=_one_of_equals(spacing) if len(spacing) == 2 else None,
        te_s=_seconds(te_ms[0] if te_ms else None),
        b_value=values.believed(b_value[0] if b_value else None),
    )


@lru_cache(maxsize=4096)
def _one_of_equals(found: tuple[float, ...]) -> tuple[float, ...]:
    """Return the first equal tuple: a million slices share a few thousand directions."""
    return found


def _seconds(value_ms: float | None) -> float | None:
    if value_ms is None or not 0 < value_ms <= _MAX_TE_MS:
        return None
    return round(value_ms / 1000.0, 6)
