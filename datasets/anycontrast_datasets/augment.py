"""Crop, flip and contrast dropout: functions of (study, rng).

In: a prepared study and a generator that depends on (seed, epoch, study id) alone. Out: a
`StudyView`, the arrays plus where they lie in the stored box. Every contrast and the label get the
same flip and the same crop. Flips and crops are NumPy views; only a crop that reaches over the
edge of the box copies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.study import StudyArrays

_Voxel = TypeVar("_Voxel", bound=np.generic)


@dataclass(frozen=True)
class StudyView:
    """Arrays that may be a part of their study's stored box."""

    arrays: StudyArrays
    """`record.shape` stays that of the whole stored box; the arrays may be smaller or larger."""
    origin_vox: tuple[int, int, int] = (0, 0, 0)
    """Voxel of the (flipped) stored box at array index 0; negative where the crop was padded."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the arrays along i, j, k."""
        x, y, z = next(iter(self.arrays.codes.values())).shape
        return x, y, z


def augment_study(
    arrays: StudyArrays,
    rng: np.random.Generator,
    *,
    flip_axes: Sequence[int] = (),
    crop_vox: tuple[int, int, int] | None = None,
    foreground_crop_fraction: float = 0.0,
) -> StudyView:
    """Flip a study at random, then cut a random crop of fixed size.

    Args:
        arrays: A whole prepared study.
        rng: Generator of this study in this epoch, see `order.study_rng`.
        flip_axes: Axes (0 left-right, 1 back-front, 2 down-up) each flipped with probability 1/2.
        crop_vox: Voxels of the crop along i, j, k; None keeps the whole box.
        foreground_crop_fraction: Probability that the crop is centred on a labelled voxel.
    """
    view = flip_study(StudyView(arrays), flip_axes, rng)
    if crop_vox is None:
        return view
    return crop_study(view, crop_vox, rng, foreground_crop_fraction=foreground_crop_fraction)


def flip_study(view: StudyView, axes: Sequence[int], rng: np.random.Generator) -> StudyView:
    """Flip each of `axes` with probability 1/2; positions are mirrored about the box centre."""
    return mirror_study(view, choose_flips(axes, rng))


def mirror_study(view: StudyView, axes: Sequence[int]) -> StudyView:
    """Flip all of `axes`; positions are mirrored about the box centre."""
    if not axes:
        return view
    origin = list(view.origin_vox)
    for axis in axes:
        origin[axis] = view.arrays.record.shape[axis] - origin[axis] - view.shape[axis]
    step = tuple(slice(None, None, -1 if axis in axes else None) for axis in range(3))
    arrays = _map_arrays(view.arrays, lambda array: array[step])
    return StudyView(arrays, (origin[0], origin[1], origin[2]))


def choose_flips(axes: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """Draw the axes to flip, each of `axes` with probability 1/2."""
    return tuple(axis for axis in axes if rng.random() < 0.5)


def crop_study(
    view: StudyView,
    crop_vox: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    foreground_crop_fraction: float = 0.0,
) -> StudyView:
    """Cut a crop of exactly `crop_vox`, at random or around a random labelled voxel.

    An axis shorter than the crop is padded with 0 at both ends. A study without a labelled voxel
    is always cropped at random.
    """
    centre = None
    if rng.random() < foreground_crop_fraction and view.arrays.label is not None:
        centre = _labelled_voxel(view.arrays.label, rng)
    start = _crop_start(view.shape, crop_vox, rng, centre)
    return cut_study(view, [o + s for o, s in zip(view.origin_vox, start, strict=True)], crop_vox)


def choose_crop(
    shape: Sequence[int], crop_vox: tuple[int, int, int], rng: np.random.Generator
) -> tuple[int, int, int]:
    """Draw the first voxel of a random crop, as `crop_study` does for a whole box of `shape`."""
    rng.random()  # where `crop_study` asks whether to look at the label
    return _crop_start(shape, crop_vox, rng, None)


def cut_study(
    view: StudyView, origin_vox: Sequence[int], size_vox: tuple[int, int, int]
) -> StudyView:
    """Cut exactly `size_vox` from voxel `origin_vox` of the box on, 0 where the view ends."""
    start = [o - v for o, v in zip(origin_vox, view.origin_vox, strict=True)]
    arrays = _map_arrays(view.arrays, lambda array: _window(array, start, size_vox))
    return StudyView(arrays, (origin_vox[0], origin_vox[1], origin_vox[2]))


def choose_contrasts(contrasts: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """Draw a non-empty subset: its size uniform over 1 .. n, then its members; order is kept."""
    size = int(rng.integers(1, len(contrasts) + 1))
    chosen = rng.choice(len(contrasts), size=size, replace=False)
    return tuple(contrasts[i] for i in sorted(chosen))


def _crop_start(
    shape: Sequence[int],
    crop_vox: tuple[int, int, int],
    rng: np.random.Generator,
    centre: Sequence[int] | None,
) -> tuple[int, int, int]:
    start = []
    for axis, (size, crop) in enumerate(zip(shape, crop_vox, strict=True)):
        if size <= crop:
            start.append(-((crop - size) // 2))
        elif centre is None:
            start.append(int(rng.integers(0, size - crop + 1)))
        else:
            start.append(min(max(centre[axis] - crop // 2, 0), size - crop))
    return start[0], start[1], start[2]


def _labelled_voxel(
    label: npt.NDArray[np.uint8], rng: np.random.Generator
) -> tuple[int, ...] | None:
    labelled = np.flatnonzero(label)
    if len(labelled) == 0:
        return None
    voxel = np.unravel_index(labelled[rng.integers(len(labelled))], label.shape)
    return tuple(int(i) for i in voxel)


def _window(
    array: npt.NDArray[_Voxel], start: Sequence[int], size: tuple[int, int, int]
) -> npt.NDArray[_Voxel]:
    inside = tuple(
        slice(max(s, 0), min(s + n, length))
        for s, n, length in zip(start, size, array.shape, strict=True)
    )
    part = array[inside]
    if part.shape == size:
        return part
    padded = np.zeros(size, dtype=array.dtype)
    target = tuple(
        slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(start, part.shape, strict=True)
    )
    padded[target] = part
    return padded


def _map_arrays(
    arrays: StudyArrays, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> StudyArrays:
    return StudyArrays(
        record=arrays.record,
        codes={name: change(codes) for name, codes in arrays.codes.items()},
        label=None if arrays.label is None else change(arrays.label),
    )
