"""Parts of a study: some contrasts, a crop clipped to the box, any patches of a padded grid.

Pure functions on arrays; every store uses them, so that a crop or a patch means the same in each.
Letters: N patches asked for, P voxels per patch, L patches of the grid, R runs along k in a patch.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.study import ShardError, StudyArrays, StudyRecord

Vox3 = tuple[int, int, int]


def wanted_contrasts(record: StudyRecord, contrasts: Sequence[str] | None) -> list[str]:
    """Return the contrasts to read in stored order; None asks for every one.

    Raises:
        ShardError: Of code `missing_contrast`, if the study has not all of them, or none is asked
            for.
    """
    names = set(record.contrasts if contrasts is None else contrasts)
    if not names or not names <= set(record.contrasts):
        raise ShardError(
            f"study {record.study_id}: has {list(record.contrasts)}, asked for {sorted(names)}; "
            "ask for contrasts of its record",
            code="missing_contrast",
        )
    return [name for name in record.contrasts if name in names]


def with_only(record: StudyRecord, contrasts: Collection[str]) -> StudyRecord:
    """Return the record as it is for some of its contrasts."""
    if len(contrasts) == len(record.volumes):
        return record
    return replace(record, volumes=tuple(v for v in record.volumes if v.contrast in contrasts))


def clip_box(
    shape: Sequence[int], start_vox: Sequence[int], size_vox: Sequence[int]
) -> tuple[Vox3, Vox3]:
    """Return first and end voxel of the part of a box that lies inside a grid.

    Args:
        shape: Voxels of the grid.
        start_vox: First voxel asked for; may be negative.
        size_vox: Voxels asked for, each >= 1; may reach beyond the grid.

    Raises:
        ValueError: If not three numbers were given, a size is < 1, or nothing lies inside.
    """
    if not len(shape) == len(start_vox) == len(size_vox) == 3 or min(size_vox) < 1:
        raise ValueError(
            f"crop: start and size need three numbers, every size >= 1, got start {start_vox} "
            f"and size {size_vox}"
        )
    first = [max(int(a), 0) for a in start_vox]
    end = [min(int(a) + int(n), s) for a, n, s in zip(start_vox, size_vox, shape, strict=True)]
    if any(b <= a for a, b in zip(first, end, strict=True)):
        raise ValueError(
            f"crop: must overlap the grid of {tuple(shape)} voxels, start {tuple(start_vox)} with "
            f"size {tuple(size_vox)} lies outside"
        )
    return (first[0], first[1], first[2]), (end[0], end[1], end[2])


def crop_arrays(
    arrays: StudyArrays, start_vox: Sequence[int], size_vox: Sequence[int]
) -> StudyArrays:
    """Cut a box out of every array of a study.

    Args:
        arrays: Whole study.
        start_vox: First voxel along i, j, k; may be negative.
        size_vox: Voxels along i, j, k; may reach beyond the study's box.

    Returns:
        Contiguous copies of exactly the part inside the study's box. The record stays that of the
        whole box.

    Raises:
        ValueError: If the crop is malformed or lies outside, see `clip_box`.
    """
    first, end = clip_box(arrays.record.shape, start_vox, size_vox)
    box = tuple(slice(a, b) for a, b in zip(first, end, strict=True))
    label = None if arrays.label is None else arrays.label[box].copy()
    codes = {name: codes[box].copy() for name, codes in arrays.codes.items()}
    return StudyArrays(record=arrays.record, codes=codes, label=label)


def patch_grid(shape: Sequence[int], patch_vox: Sequence[int]) -> Vox3:
    """Return patches along each axis of a grid that is padded up to whole patches.

    Raises:
        ValueError: If `patch_vox` is not three positive numbers.
    """
    if len(patch_vox) != 3 or min(patch_vox) < 1:
        raise ValueError(f"patches: patch_vox must be three numbers >= 1, got {tuple(patch_vox)}")
    x, y, z = (-(-n // p) for n, p in zip(shape, patch_vox, strict=True))
    return (x, y, z)


def check_patches(
    shape: Sequence[int], patch_vox: Sequence[int], index_N: npt.NDArray[np.int64]
) -> Vox3:
    """Return the patch grid after checking that every index lies in it.

    Raises:
        ValueError: If an index is not in 0 .. L - 1, or the indices are no vector.
    """
    grid = patch_grid(shape, patch_vox)
    num_patches = math.prod(grid)
    if index_N.ndim != 1 or (
        index_N.size and not 0 <= index_N.min() <= index_N.max() < num_patches
    ):
        raise ValueError(
            f"patches: indices must be a vector of 0 .. {num_patches - 1} for a grid of {grid}, "
            f"got shape {index_N.shape}"
            + (f" and {index_N.min()} .. {index_N.max()}" if index_N.size else "")
        )
    return grid


def gather_patches(
    codes_XYZ: npt.NDArray[np.int16],
    patch_vox: Vox3,
    index_N: npt.NDArray[np.int64],
    out: npt.NDArray[np.int16] | None = None,
) -> npt.NDArray[np.int16]:
    """Copy patches out of a volume in one pass of runs along k.

    Args:
        codes_XYZ: [X, Y, Z] int16; padded at the far ends with code 0 up to whole patches.
        patch_vox: Voxels of a patch along i, j, k.
        index_N: [N] flat C-order indices into the patch grid, in any order.
        out: [N, P] C-contiguous int16 to write to; a new array if None.

    Returns:
        [N, P] int16, voxels of a patch in C order.

    Raises:
        ValueError: If an index lies outside the grid.
    """
    grid = check_patches(codes_XYZ.shape, patch_vox, index_N)
    padded_shape = tuple(g * p for g, p in zip(grid, patch_vox, strict=True))
    if codes_XYZ.shape == padded_shape:
        codes_XYZ = np.ascontiguousarray(codes_XYZ)
    else:
        padded = np.zeros(padded_shape, dtype=np.int16)
        padded[tuple(slice(n) for n in codes_XYZ.shape)] = codes_XYZ
        codes_XYZ = padded
    if out is None:
        out = np.empty((len(index_N), math.prod(patch_vox)), dtype=np.int16)
    first_L, inner_R = run_index(codes_XYZ.shape, patch_vox)
    run = np.dtype(("V", 2 * patch_vox[2]))
    runs_NR = first_L[index_N][:, None] + inner_R
    # The indices are in range by construction; `raise` would buffer the whole output.
    codes_XYZ.view(run).reshape(-1).take(runs_NR, out=out.view(run), mode="clip")
    return out


@lru_cache(maxsize=64)
def run_index(
    shape: tuple[int, ...], patch_vox: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number the runs of a grid of whole patches: first run of every patch [L], and within [R]."""
    x, y, z = (n // p for n, p in zip(shape, patch_vox, strict=True))
    rows = np.arange(x * patch_vox[0] * y * patch_vox[1] * z)
    rows = rows.reshape(x, patch_vox[0], y, patch_vox[1], z)
    first_L = np.ascontiguousarray(rows[:, 0, :, 0, :]).reshape(-1)
    inner_R = np.ascontiguousarray(rows[0, :, 0, :, 0]).reshape(-1)
    return first_L, inner_R
