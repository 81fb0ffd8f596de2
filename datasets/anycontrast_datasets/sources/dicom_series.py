"""From DICOM files to stacks of slices: series taken apart, doubles found, gaps found.

In: the instances of a folder, in any order. Out: `Stack`s, each one 3D image whose slices are all
there, and a refusal for every file that is in none. A series is parted by size, direction, echo,
b-value and kind of image; what then still has several images at one place is a time or direction
series (4D).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.sources.dicom_frames import Frame
from anycontrast_datasets.sources.dicom_header import Instance
from anycontrast_datasets.sources.dicom_kinds import refuse_kind

MIN_COVERAGE_MM = 50.0
"""Along the slices; a thinner slab is a piece of a head scan."""
MAX_LOCALIZER_SLICES = 12
"""Per direction, where one series has several directions."""

_SAME_PLACE_MM = 0.01
_SAME_DIRECTION = 2e-3
# Share of the slice distance that distances may vary by, and what makes a slice missing.
_UNEVEN, _GAP = 0.1, 1.5
_MAX_SIDE_STEP_MM = 1.0


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The files of one 3D image."""

    subject: str = field(repr=False)
    study_uid: str = field(repr=False)
    instances: tuple[Instance, ...]
    """By instance number, then location."""

    @property
    def locations(self) -> tuple[str, ...]:
        """The files, relative to the root."""
        return tuple(instance.location for instance in self.instances)


def find_stacks(instances: Sequence[Instance]) -> Iterator[Stack | Refusal]:
    """Yield the complete stacks in a list of files, and a refusal for every other file."""
    in_series = Counter((i.series_uid, i.acquisition) for i in instances)
    usable: list[Instance] = []
    for instance in sorted(instances, key=lambda i: i.location):
        if refusal := refuse_kind(instance):
            yield refusal
        elif not instance.subject:
            reason = "the header has neither PatientID nor PatientName"
            yield refuse(instance.location, "no_subject", reason)
        else:
            usable.append(instance)
    unique, refused = _without_doubles(usable)
    yield from refused
    by_series: dict[tuple[str, str, str], list[Instance]] = defaultdict(list)
    for instance in unique:
        by_series[instance.subject, instance.study_uid, instance.series_uid].append(instance)
    for (subject, study_uid, _), series in sorted(by_series.items()):
        stacks = _part(series)
        is_localizer = _is_localizer(stacks)
        for members in stacks:
            ordered = tuple(sorted(members, key=lambda i: (i.number or 0, i.location)))
            code, reason = _fault(ordered, in_series)
            if is_localizer:
                code, reason = "localizer", f"{len(stacks)} short stacks across each other"
            if code:
                yield from (refuse(i.location, code, reason) for i in ordered)
            else:
                yield Stack(subject=subject, study_uid=study_uid, instances=ordered)


def _without_doubles(instances: Iterable[Instance]) -> tuple[list[Instance], list[Refusal]]:
    """Keep the first of equal files; of files that share an identity but differ keep none."""
    by_uid: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        by_uid[instance.sop_uid].append(instance)
    kept: list[Instance] = []
    refused: list[Refusal] = []
    for same in by_uid.values():
        contents = {(i.subject, i.study_uid, i.series_uid, i.frames, i.pixels_sha256) for i in same}
        if len(contents) == 1:
            kept.append(same[0])
            reason = f"the same image as {same[0].location}"
            refused += [refuse(i.location, "duplicate_instance", reason) for i in same[1:]]
        else:
            reason = f"{len(same)} files of one instance UID differ in their content"
            refused += [refuse(i.location, "conflicting_instance", reason) for i in same]
    return kept, refused


def _part(series: Sequence[Instance]) -> list[list[Instance]]:
    """Part a series into stacks, in an order that does not depend on the order of files."""
    directions: list[tuple[float, ...]] = []
    parts: dict[tuple[object, ...], list[Instance]] = defaultdict(list)
    for instance in series:
        first = instance.frames[0] if instance.frames else None
        parts[_part_key(instance, first, directions)].append(instance)
    return [parts[key] for key in sorted(parts, key=repr)]


def _part_key(
    instance: Instance, frame: Frame | None, directions: list[tuple[float, ...]]
) -> tuple[object, ...]:
    size = (instance.rows, instance.columns, instance.image_type)
    if frame is None:
        return size
    spacing = tuple(round(s, 3) for s in frame.spacing_mm or ())
    direction = _index_of(frame.orientation, directions)
    return (*size, spacing, direction, *_contrast_key(frame))


def _contrast_key(frame: Frame) -> tuple[float | None, int | None]:
    te_ms = None if frame.te_s is None else round(frame.te_s * 1000.0, 1)
    return te_ms, None if frame.b_value is None else round(frame.b_value)


def _index_of(orientation: tuple[float, ...] | None, directions: list[tuple[float, ...]]) -> int:
    """Return the index of a direction among those met so far, adding it when it is new."""
    if orientation is None:
        return -1
    for index, known in enumerate(directions):
        if max(abs(a - b) for a, b in zip(orientation, known, strict=True)) < _SAME_DIRECTION:
            return index
    directions.append(orientation)
    return len(directions) - 1


def _is_localizer(stacks: Sequence[Sequence[Instance]]) -> bool:
    """Say if a series is a few slices in each of several directions."""
    frames = [[frame for i in stack for frame in i.frames] for stack in stacks]
    normals = {
        tuple(np.abs(np.round(_normal(f[0].orientation), 1)).tolist())
        for f in frames
        if f and f[0].orientation
    }
    return len(normals) > 1 and all(len(f) <= MAX_LOCALIZER_SLICES for f in frames)


def _fault(
    stack: tuple[Instance, ...], in_series: Counter[tuple[str, int | None]]
) -> tuple[str, str]:
    """Return reason code and reason when the slices are not one whole 3D image."""
    for instance in stack:
        if instance.is_enhanced and len(instance.frames) != instance.num_frames:
            found = f"{len(instance.frames)} described of {instance.num_frames} claimed"
            return "incomplete_series", f"frames of an enhanced image: {found}"
        if not instance.is_enhanced and instance.num_frames > 1:
            return "not_3d", f"{instance.num_frames} frames in a classic image"
    first = stack[0]
    expected = max((i.num_in_acquisition or 0 for i in stack), default=0)
    there = in_series[first.series_uid, first.acquisition]
    if not first.is_enhanced and expected > there:
        return "incomplete_series", f"{there} images of {expected} that the scanner made"
    if "MOSAIC" in first.image_type:
        return ("", "") if len(stack) == 1 else ("not_3d", f"{len(stack)} volumes as mosaics")
    frames = [frame for instance in stack for frame in instance.frames]
    if len({_contrast_key(frame) for frame in frames}) > 1:
        return "not_3d", "one file holds several echoes or b-values; export it as classic images"
    return _fault_of_places(frames)


def _fault_of_places(frames: Sequence[Frame]) -> tuple[str, str]:
    orientation = frames[0].orientation if frames else None
    if orientation is None or any(f.position_mm is None for f in frames):
        return "incomplete_series", "the header does not say where the slices lie"
    if any(_index_of(f.orientation, [orientation]) != 0 for f in frames):
        is_short = len(frames) <= 3 * MAX_LOCALIZER_SLICES
        return "localizer" if is_short else "not_3d", "slices in several directions in one file"
    positions = np.array([f.position_mm for f in frames], dtype=np.float64)
    normal = _normal(orientation)
    places = positions @ normal
    order = np.argsort(places, kind="stable")
    steps = np.diff(places[order])
    if np.any(steps < _SAME_PLACE_MM):
        unique = 1 + int((steps >= _SAME_PLACE_MM).sum())
        return "not_3d", f"{len(frames)} images at {unique} places: a series in time or direction"
    if len(frames) < 2:
        return "incomplete_series", "a single slice"
    step = float(np.median(steps))
    if float(steps.max()) > _GAP * step:
        return (
            "incomplete_series",
            f"a gap of {steps.max():.1f} mm between slices {step:.1f} mm apart",
        )
    if float(np.abs(steps - step).max()) > _UNEVEN * step + _SAME_PLACE_MM:
        return "incomplete_series", f"slices {steps.min():.2f} to {steps.max():.2f} mm apart"
    if _side_step(positions[order], normal) > _MAX_SIDE_STEP_MM:
        return "incomplete_series", "the slices do not lie behind each other"
    covered = step * len(frames)
    if covered < MIN_COVERAGE_MM:
        return "incomplete_series", f"{len(frames)} slices cover {covered:.0f} mm of the head"
    return "", ""


def _side_step(positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64]) -> float:
    """Return how far, in mm, a slice lies off the line through the first and the last."""
    line = positions[-1] - positions[0]
    share = (positions - positions[0]) @ normal / (line @ normal)
    return float(np.linalg.norm(positions - positions[0] - share[:, None] * line, axis=1).max())


def _normal(orientation: tuple[float, ...] | None) -> npt.NDArray[np.float64]:
    """Return the unit normal of a plane, zero when the header gives none."""
    if orientation is None:
        return np.zeros(3)
    normal = np.cross(np.array(orientation[:3]), np.array(orientation[3:]))
    length = float(np.linalg.norm(normal))
    return np.asarray(normal / length) if length > 0 else np.zeros(3)
