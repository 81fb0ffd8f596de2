"""Volume <-> patches, and stored codes -> z-scores.

The checked entry to these operations. All are memory-bound; the plain definitions of `reference`
run on every device. Patches of packed volumes are cut by what `gather_ops` picks for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anycontrast_kernels import gather_ops, reference


def patchify(volume_XYZ: Tensor, patch_vox: tuple[int, int, int]) -> Tensor:
    """Cut a volume into patches; patches and the voxels inside one are in C order of (i, j, k).

    Args:
        volume_XYZ: [X, Y, Z], any dtype, each side a multiple of the patch.
        patch_vox: voxels of a patch along i, j, k; need not be a cube.

    Returns:
        [T, P], T patches of the grid, P voxels each.

    Raises:
        ValueError: `volume_XYZ` is not 3D, or a side is no multiple of the patch.
    """
    check_patch(patch_vox)
    shape = tuple(volume_XYZ.shape)
    if len(shape) != 3:
        raise ValueError(f"patchify: volume_XYZ must be [X, Y, Z], got shape {shape}")
    if any(n % p for n, p in zip(shape, patch_vox, strict=True)):
        raise ValueError(
            f"patchify: every side of volume_XYZ must be a multiple of patch_vox {patch_vox}, "
            f"got {shape}; pad the volume first"
        )
    return reference.patchify(volume_XYZ, patch_vox)


def unpatchify(
    patches_TP: Tensor, grid: tuple[int, int, int], patch_vox: tuple[int, int, int]
) -> Tensor:
    """Put patches back together: the inverse of `patchify`.

    Args:
        patches_TP: [T, P], every patch of the grid in C order.
        grid: patches along each axis.
        patch_vox: voxels of a patch along i, j, k.

    Returns:
        [X, Y, Z].

    Raises:
        ValueError: `patches_TP` is not [product of grid, product of patch_vox].
    """
    check_patch(patch_vox)
    expected = (math.prod(grid), math.prod(patch_vox))
    if tuple(patches_TP.shape) != expected:
        raise ValueError(
            f"unpatchify: patches_TP must be {expected} for grid {tuple(grid)} and patch_vox "
            f"{tuple(patch_vox)}, got {tuple(patches_TP.shape)}"
        )
    return reference.unpatchify(patches_TP, grid, patch_vox)


def intensity_map(codes_TP: Tensor, volume_T: Tensor, intensity_V4: Tensor) -> Tensor:
    """Turn stored codes into z-scores: clip(code * gain + bias, low, high), each volume its own.

    Args:
        codes_TP: [T, P] int16 as stored, or float32 codes (differentiable).
        volume_T: [T] int64, row of `intensity_V4`.
        intensity_V4: [V, 4] float32, (gain, bias, low, high).

    Returns:
        [T, P] float32.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: an argument has another shape, or they lie on different devices.
    """
    if codes_TP.dtype not in (torch.int16, torch.float32):
        raise TypeError(f"intensity_map: codes_TP must be int16 or float32, got {codes_TP.dtype}")
    if volume_T.dtype != torch.int64:
        raise TypeError(f"intensity_map: volume_T must be int64, got {volume_T.dtype}")
    if intensity_V4.dtype != torch.float32:
        raise TypeError(f"intensity_map: intensity_V4 must be float32, got {intensity_V4.dtype}")
    if codes_TP.ndim != 2 or tuple(volume_T.shape) != (codes_TP.shape[0],):
        raise ValueError(
            "intensity_map: codes_TP must be [T, P] and volume_T [T], "
            f"got {tuple(codes_TP.shape)} and {tuple(volume_T.shape)}"
        )
    if intensity_V4.ndim != 2 or intensity_V4.shape[1] != 4:
        raise ValueError(
            f"intensity_map: intensity_V4 must be [V, 4], got {tuple(intensity_V4.shape)}"
        )
    if not codes_TP.device == volume_T.device == intensity_V4.device:
        raise ValueError(
            "intensity_map: codes_TP, volume_T and intensity_V4 must lie on one device, got "
            f"{codes_TP.device}, {volume_T.device}, {intensity_V4.device}"
        )
    return reference.intensity_map(codes_TP, volume_T, intensity_V4)


def gather_patches(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: tuple[int, int, int],
) -> Tensor:
    """Cut patches out of packed volumes; see `reference.gather_patches` for what is cut.

    Args:
        codes_B: [B] int16, the volumes one after the other; float32 codes take a gradient.
        volume_start_V: [V] int64, first voxel of each volume.
        volume_shape_V3: [V, 3] int64, voxels of each volume along i, j, k.
        flip_V3: [V, 3] bool, axes along which the volume is seen mirrored.
        volume_N: [N] int64, volume of each patch.
        grid_N3: [N, 3] int64, index of each patch in its volume's grid as seen.
        patch_vox: voxels of a patch along i, j, k.

    Returns:
        [N, P] in the dtype of `codes_B`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: an argument has another shape or is not contiguous, they lie on different
            devices, or (seen on the CPU only) a volume lies outside `codes_B`.
    """
    check_patch(patch_vox)
    patches = (codes_B, volume_start_V, volume_shape_V3, flip_V3, volume_N, grid_N3)
    gather_ops.check_packed("gather_patches", *patches)
    if codes_B.dtype != torch.int16:
        return reference.gather_patches(*patches, patch_vox)
    codes_NP: Tensor = gather_ops.gather_patches(*patches, list(patch_vox))
    return codes_NP


def gather_zscores(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    intensity_V4: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cut patches out of packed volumes as z-scores: flip, patchify and intensity map in one.

    Args:
        codes_B: [B] int16, as for `gather_patches`, like all that is not said here. Only float32
            codes take a gradient.
        volume_start_V: [V] int64.
        volume_shape_V3: [V, 3] int64.
        flip_V3: [V, 3] bool.
        intensity_V4: [V, 4] float32, (gain, bias, low, high).
        volume_N: [N] int64.
        grid_N3: [N, 3] int64.
        patch_vox: voxels of a patch along i, j, k.
        dtype: of the result; computed in float32.

    Returns:
        [N, P].

    Raises:
        TypeError: an argument has another dtype.
        ValueError: as `gather_patches`.
    """
    check_patch(patch_vox)
    if not dtype.is_floating_point:
        raise TypeError(f"gather_zscores: dtype must be floating, got {dtype}")
    volumes = (codes_B, volume_start_V, volume_shape_V3, flip_V3)
    gather_ops.check_packed("gather_zscores", *volumes, volume_N, grid_N3, intensity_V4)
    picked = (intensity_V4, volume_N, grid_N3)
    if codes_B.dtype != torch.int16:
        return reference.gather_zscores(*volumes, *picked, patch_vox, dtype=dtype)
    x_NP: Tensor = gather_ops.gather_zscores(*volumes, *picked, list(patch_vox), dtype)
    return x_NP


def check_patch(patch_vox: Sequence[int]) -> None:
    """Refuse what is no patch size.

    Raises:
        ValueError: not three sides, or a side < 1.
    """
    if len(patch_vox) != 3 or any(p < 1 for p in patch_vox):
        raise ValueError(f"patch_vox must be three sizes >= 1, got {tuple(patch_vox)}")
