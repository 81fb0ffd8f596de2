"""Volume <-> patches, and stored codes -> z-scores.

The checked entry to these operations. All are memory-bound; the plain definitions of `reference`
run on every device. Patches of packed volumes are cut by `gather_cpu` where the codes are int16 on
the CPU.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anycontrast_kernels import gather_cpu, reference


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
    _check_patch(patch_vox)
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
    _check_patch(patch_vox)
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
        ValueError: an argument has another shape, they lie on different devices, or (seen on the
            CPU only) a volume lies outside `codes_B`.
    """
    volumes = (codes_B, volume_start_V, volume_shape_V3, flip_V3)
    _check_gather("gather_patches", volumes, volume_N, grid_N3, patch_vox)
    if codes_B.device.type == "cpu" and codes_B.dtype == torch.int16:
        return gather_cpu.gather_patches(*volumes, volume_N, grid_N3, patch_vox)
    return reference.gather_patches(*volumes, volume_N, grid_N3, patch_vox)


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
    volumes = (codes_B, volume_start_V, volume_shape_V3, flip_V3)
    _check_gather("gather_zscores", volumes, volume_N, grid_N3, patch_vox)
    if intensity_V4.dtype != torch.float32:
        raise TypeError(f"gather_zscores: intensity_V4 must be float32, got {intensity_V4.dtype}")
    if tuple(intensity_V4.shape) != (len(volume_start_V), 4):
        raise ValueError(
            f"gather_zscores: intensity_V4 must be [V, 4] with V {len(volume_start_V)}, "
            f"got {tuple(intensity_V4.shape)}"
        )
    if intensity_V4.device != codes_B.device:
        raise ValueError(
            f"gather_zscores: intensity_V4 must lie on {codes_B.device} like the codes, "
            f"got {intensity_V4.device}"
        )
    picked = (intensity_V4, volume_N, grid_N3, patch_vox)
    if codes_B.device.type == "cpu" and codes_B.dtype == torch.int16:
        return gather_cpu.gather_zscores(*volumes, *picked, dtype=dtype)
    return reference.gather_zscores(*volumes, *picked, dtype=dtype)


def _check_gather(
    name: str,
    volumes: tuple[Tensor, Tensor, Tensor, Tensor],
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: tuple[int, int, int],
) -> None:
    """Refuse what cannot be packed volumes and patches of them."""
    _check_patch(patch_vox)
    codes_B, start_V, shape_V3, flip_V3 = volumes
    if codes_B.dtype not in (torch.int16, torch.float32):
        raise TypeError(f"{name}: codes_B must be int16 or float32, got {codes_B.dtype}")
    num_volumes, num_patches = (x.shape[0] if x.ndim else 0 for x in (start_V, volume_N))
    for argument, tensor, dtype, shape in (
        ("volume_start_V", start_V, torch.int64, (num_volumes,)),
        ("volume_shape_V3", shape_V3, torch.int64, (num_volumes, 3)),
        ("flip_V3", flip_V3, torch.bool, (num_volumes, 3)),
        ("volume_N", volume_N, torch.int64, (num_patches,)),
        ("grid_N3", grid_N3, torch.int64, (num_patches, 3)),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {argument} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {argument} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != codes_B.device:
            raise ValueError(
                f"{name}: {argument} must lie on {codes_B.device} like the codes, "
                f"got {tensor.device}"
            )
    if codes_B.ndim != 1:
        raise ValueError(f"{name}: codes_B must be [B], got {tuple(codes_B.shape)}")
    if codes_B.device.type == "cpu":  # Looking at the values of a GPU would wait for it.
        _check_inside(name, len(codes_B), start_V, shape_V3, volume_N)


def _check_inside(
    name: str, num_codes: int, start_V: Tensor, shape_V3: Tensor, volume_N: Tensor
) -> None:
    stop_V = start_V + shape_V3.prod(dim=1)
    if len(start_V) and (int(start_V.min()) < 0 or int(stop_V.max()) > num_codes):
        raise ValueError(
            f"{name}: every volume must lie within the {num_codes} voxels of codes_B, found "
            f"voxels {int(start_V.min())} to {int(stop_V.max())}"
        )
    num_volumes = len(start_V)
    if len(volume_N) and not 0 <= int(volume_N.min()) <= int(volume_N.max()) < num_volumes:
        raise ValueError(
            f"{name}: volume_N must lie in 0 .. {num_volumes - 1}, found {int(volume_N.min())} to "
            f"{int(volume_N.max())}"
        )


def _check_patch(patch_vox: Sequence[int]) -> None:
    if len(patch_vox) != 3 or any(p < 1 for p in patch_vox):
        raise ValueError(f"patch_vox must be three sizes >= 1, got {tuple(patch_vox)}")
