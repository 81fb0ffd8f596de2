"""The 3 mm copy of a volume that every test of a scan shares: the object in it, its depth, its air.

In: a volume on RAS+ axes. Out: block means of about 3 mm, one original voxel per block (for
statistics that averaging would change), and the largest object. Made once per volume, 10 to 60 ms.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

WORK_SPACING_MM = 3.0
_OBJECT_LEVEL = 0.15
"""Share of the way from air to the 95th percentile of the signal where an object begins."""


@dataclass(frozen=True)
class Head:
    """The object of a picture: a head, a brain or something else."""

    array: FloatArray
    """[X, Y, Z] block means, RAS+ axes."""
    spacing_mm: npt.NDArray[np.float64]
    inside: BoolArray
    """[X, Y, Z] the largest connected object, holes filled slice by slice."""
    box: tuple[slice, ...]
    """Of the object."""
    extent_mm: npt.NDArray[np.float64]
    air: float

    @cached_property
    def depth_mm(self) -> npt.NDArray[np.float64]:
        """[X, Y, Z] distance to the surface of the object, 0 outside."""
        depth = np.zeros(self.inside.shape)
        # Within the box alone: the nearest voxel outside the object is at most one step out of it.
        box = np.pad(self.inside[self.box], 1)
        padded = ndimage.distance_transform_edt(box, sampling=self.spacing_mm)
        depth[self.box] = padded[1:-1, 1:-1, 1:-1]
        return depth

    @cached_property
    def far_outside(self) -> BoolArray:
        """[X, Y, Z] at least two voxels away from the object."""
        return np.logical_not(ndimage.binary_dilation(self.inside, iterations=2))


@dataclass(frozen=True)
class WorkCopy:
    """A coarse copy of one volume."""

    array: FloatArray
    """[X, Y, Z] block means, RAS+ axes."""
    sample: FloatArray
    """[X, Y, Z] the voxel in the middle of each block, as it is."""
    spacing_mm: npt.NDArray[np.float64]
    field_mm: npt.NDArray[np.float64]
    """Of the volume itself."""

    @cached_property
    def head(self) -> Head | None:
        """The largest object, None in an empty picture."""
        return _find_head(self.array, self.spacing_mm)


def make_work_copy(array: FloatArray, spacing_mm: tuple[float, float, float]) -> WorkCopy:
    """Average whole blocks of voxels; an incomplete block at the far end is left out.

    Args:
        array: [X, Y, Z] finite, RAS+ axes.
        spacing_mm: along the axes of `array`.
    """
    spacing = np.array(spacing_mm, dtype=np.float64)
    factors = np.maximum(1, np.round(WORK_SPACING_MM / spacing)).astype(int)
    factors = np.minimum(factors, array.shape)
    counts = [n // k for n, k in zip(array.shape, factors, strict=True)]
    kept = array[tuple(slice(0, n * k) for n, k in zip(counts, factors, strict=True))]
    blocks = [size for pair in zip(counts, factors, strict=True) for size in pair]
    small = kept.reshape(blocks).mean(axis=(1, 3, 5), dtype=np.float32)
    sample = kept[tuple(slice(k // 2, None, k) for k in factors)]
    return WorkCopy(
        array=cast(FloatArray, small),
        sample=np.ascontiguousarray(sample),
        spacing_mm=spacing * factors,
        field_mm=np.array(array.shape) * spacing,
    )


def _find_head(small: FloatArray, spacing_mm: npt.NDArray[np.float64]) -> Head | None:
    air = float(np.percentile(small, 1))
    signal = small[small > air + 0.05 * (float(np.percentile(small, 99)) - air)]
    if signal.size == 0:
        return None
    level = air + _OBJECT_LEVEL * (float(np.percentile(signal, 95)) - air)
    labels, count = ndimage.label(small > level)
    if count == 0:
        return None
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    inside = labels == largest
    box = ndimage.find_objects(inside.astype(np.uint8))[0]
    boxed = inside[box]
    for z in range(boxed.shape[2]):
        boxed[:, :, z] = ndimage.binary_fill_holes(boxed[:, :, z])
    extent = np.array(boxed.shape) * spacing_mm
    return Head(small, spacing_mm, inside, box, extent, air)
