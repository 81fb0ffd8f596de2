"""Bring a volume from its own grid onto another, by affine alone.

In: an array on RAS+ axes with its affine, and the target grid. Out: the array on that grid.
Three paths, chosen by geometry and giving the same answer where they overlap:

- same grid: an exact copy, not one interpolated voxel;
- axes aligned (the usual case): one small matrix product per axis, whose rows hold the kernel;
- oblique: `grid_sample` in slabs, after the same low-pass along axes that lose resolution.

Values are trilinear, with a Gaussian low-pass along every axis sampled more coarsely than stored
(its width takes a box of one source voxel to a box of one target step); labels and masks take the
nearest voxel. Values are held constant past the border; who needs "outside the field of view"
resamples a mask, which is 0 there. Gives up: cubic interpolation, which costs ten times as much.

Source: the width of the low-pass is that of Cardoso et al., "Scale factor point spread function
matching", MICCAI 2015.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

SAME_GRID_VOX = 0.01
"""Two grids are one when no corner is further apart than this share of a voxel."""
SLAB_VOXELS = 2**20
"""Target voxels per slab on the oblique path: bounds its memory at about 30 MB."""

Affine64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A regular grid of voxels in scanner space."""

    shape: tuple[int, int, int]
    affine: Affine64
    """[4, 4] float64, voxel ijk (centres at integers) -> RAS+ mm."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Length of one voxel step along each axis."""
        x, y, z = (float(n) for n in np.linalg.norm(self.affine[:3, :3], axis=0))
        return (x, y, z)

    def with_spacing(self, spacing_mm: tuple[float, float, float]) -> "Grid":
        """Return a grid of the same axes, field of view and centre, with another spacing.

        An axis whose extent is no multiple of the spacing grows by less than one voxel, half of
        it on either side. An axis within 0.1 % of the wanted spacing is left as it is.
        """
        affine = self.affine.copy()
        start, shape = np.zeros(3), list(self.shape)
        for axis, (have, want) in enumerate(zip(self.spacing_mm, spacing_mm, strict=True)):
            step = want / have
            if abs(step - 1) <= 1e-3:
                continue
            shape[axis] = max(1, math.ceil(self.shape[axis] / step - 1e-3))
            start[axis] = (self.shape[axis] - 1) / 2 - (shape[axis] - 1) / 2 * step
            affine[:3, axis] *= step
        affine[:3, 3] = self.affine[:3, :3] @ start + self.affine[:3, 3]
        return Grid(shape=(shape[0], shape[1], shape[2]), affine=affine)

    def box(self, start: tuple[int, int, int], shape: tuple[int, int, int]) -> "Grid":
        """Return the grid of a box; `start` may be negative, the box may reach past the end."""
        affine = self.affine.copy()
        affine[:3, 3] = affine[:3, :3] @ np.asarray(start, dtype=np.float64) + affine[:3, 3]
        return Grid(shape=shape, affine=affine)


def step_matrix(source: Grid, target: Grid) -> Affine64:
    """Return [4, 4] float64: voxel index of `target` -> voxel index of `source`."""
    return np.linalg.solve(source.affine, target.affine).astype(np.float64)


def is_same_grid(source: Grid, target: Grid) -> bool:
    """Say whether every voxel of `target` is the same voxel of `source`."""
    if source.shape != target.shape:
        return False
    shift = step_matrix(source, target)[:3] - np.eye(4)[:3]
    return _largest_shift(shift, target.shape) <= SAME_GRID_VOX


def resample(
    array: npt.NDArray[np.float32], source: Grid, target: Grid, *, nearest: bool = False
) -> npt.NDArray[np.float32]:
    """Return `array` on the target grid.

    Args:
        array: [X, Y, Z] float32 on `source`.
        source: Grid of the array.
        target: Grid wanted.
        nearest: Take the nearest voxel, 0 outside the field of view. Otherwise trilinear with
            low-pass, the border value held outside.

    Returns:
        A new [X', Y', Z'] float32 array, C order.

    Raises:
        ValueError: If the array does not have the shape of its grid.
    """
    if array.shape != source.shape:
        raise ValueError(f"resample: the array has shape {array.shape}, its grid {source.shape}")
    if is_same_grid(source, target):
        return np.array(array, dtype=np.float32, order="C")
    array = np.require(array, dtype=np.float32, requirements=["C", "W"])
    matrix = step_matrix(source, target)
    if _is_aligned(matrix, target.shape):
        if nearest:
            return _nearest_aligned(array, matrix, target.shape)
        return _linear_aligned(torch.from_numpy(array), matrix, target.shape).numpy()
    volume = torch.from_numpy(array)
    if not nearest:
        volume = _low_pass(volume, np.linalg.norm(matrix[:3, :3], axis=1))
    return _sample_oblique(volume, matrix, target.shape, nearest=nearest).numpy()


def _largest_shift(shift: Affine64, shape: tuple[int, int, int]) -> float:
    """Return the largest |shift @ corner| over a grid; shift is [3, 4], in voxels."""
    ends = [(0, size - 1) for size in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=np.float64)
    return float(np.abs(shift @ corners.T).max())


def _is_aligned(matrix: Affine64, shape: tuple[int, int, int]) -> bool:
    turn = np.zeros((3, 4))
    turn[:, :3] = matrix[:3, :3] - np.diag(np.diag(matrix[:3, :3]))
    return _largest_shift(turn, shape) <= SAME_GRID_VOX


def _positions(matrix: Affine64, axis: int, count: int) -> npt.NDArray[np.float64]:
    steps = np.arange(count, dtype=np.float64)
    return np.asarray(matrix[axis, axis] * steps + matrix[axis, 3])


def _nearest_aligned(
    array: npt.NDArray[np.float32], matrix: Affine64, shape: tuple[int, int, int]
) -> npt.NDArray[np.float32]:
    out = array
    for axis in range(3):
        index = np.rint(_positions(matrix, axis, shape[axis])).astype(np.int64)
        inside = (index >= 0) & (index < array.shape[axis])
        out = np.take(out, np.clip(index, 0, array.shape[axis] - 1), axis=axis)
        if not inside.all():
            out[(slice(None),) * axis + (~inside,)] = 0
    return np.ascontiguousarray(out)


def _linear_aligned(source: Tensor, matrix: Affine64, shape: tuple[int, int, int]) -> Tensor:
    volume = source
    for axis in sorted(range(3), key=lambda a: shape[a] / source.shape[a]):
        positions = _positions(matrix, axis, shape[axis])
        first, count = round(float(positions[0])), source.shape[axis]
        whole_steps = np.abs(positions - first - np.arange(shape[axis])).max() <= SAME_GRID_VOX
        if whole_steps and first >= 0 and first + shape[axis] <= count:
            volume = volume.narrow(axis, first, shape[axis])
            continue
        weights = _linear_weights(positions, count)
        smooth = _gaussian_weights(count, abs(float(matrix[axis, axis])))
        volume = _apply(weights if smooth is None else weights @ smooth, volume, axis)
    if volume.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
        return volume.clone(memory_format=torch.contiguous_format)
    return volume.contiguous()


def _low_pass(volume: Tensor, steps: npt.NDArray[np.float64]) -> Tensor:
    for axis in range(3):
        smooth = _gaussian_weights(volume.shape[axis], float(steps[axis]))
        if smooth is not None:
            volume = _apply(smooth, volume, axis)
    return volume


def _linear_weights(positions: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Return [len(positions), count]: rows that interpolate linearly, constant past the ends."""
    positions = np.clip(positions, 0, count - 1)
    low = np.minimum(positions.astype(np.int64), max(count - 2, 0))
    high = np.minimum(low + 1, count - 1)
    weights = np.zeros((len(positions), count))
    rows = np.arange(len(positions))
    np.add.at(weights, (rows, low), 1 - (positions - low))
    np.add.at(weights, (rows, high), positions - low)
    return weights


def _gaussian_weights(count: int, step: float) -> npt.NDArray[np.float64] | None:
    """Return [count, count] low-pass for a sampling step in source voxels; None if not needed."""
    sigma = math.sqrt(max(step**2 - 1, 0) / (8 * math.log(2)))
    if sigma < 0.25:
        return None
    offset = np.subtract.outer(np.arange(count), np.arange(count))
    weights = np.where(np.abs(offset) <= 3 * sigma + 1, np.exp(-0.5 * (offset / sigma) ** 2), 0)
    normed: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normed


def _apply(weights: npt.NDArray[np.float64], volume: Tensor, axis: int) -> Tensor:
    """Multiply one axis of a [X, Y, Z] volume by [n_out, n_in] weights."""
    w = torch.from_numpy(weights.astype(np.float32))
    if axis == 2:
        return volume @ w.T
    if axis == 1:
        return w @ volume
    x, y, z = volume.shape
    return (w @ volume.reshape(x, y * z)).reshape(-1, y, z)


def _sample_oblique(
    volume: Tensor, matrix: Affine64, shape: tuple[int, int, int], *, nearest: bool
) -> Tensor:
    """Sample slab by slab along the first axis; `grid_sample` wants (k, j, i) in [-1, 1]."""
    size = np.array(volume.shape, dtype=np.float64)
    unit = (2 * matrix[:3] / size[:, None])[::-1].copy()
    unit[:, 3] += (1 / size - 1)[::-1]
    u = torch.from_numpy(unit)
    plane = (
        torch.arange(shape[1], dtype=torch.float64)[:, None, None] * u[:, 1]
        + torch.arange(shape[2], dtype=torch.float64)[None, :, None] * u[:, 2]
    ).to(torch.float32)
    out = torch.empty(shape, dtype=torch.float32)
    slab = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    for first in range(0, shape[0], slab):
        i = torch.arange(first, min(first + slab, shape[0]), dtype=torch.float64)
        shift = (i[:, None] * u[:, 0] + u[:, 3]).to(torch.float32)
        out[first : first + slab] = F.grid_sample(
            volume[None, None],
            (plane[None] + shift[:, None, None])[None],
            mode="nearest" if nearest else "bilinear",
            padding_mode="zeros" if nearest else "border",
            align_corners=False,
        )[0, 0]
    return out
