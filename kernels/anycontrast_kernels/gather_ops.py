"""Cutting patches out of packed volumes as operators of torch: what is refused, and who does it.

Int16 codes go through one custom operator, opaque to a compiled graph: a Triton kernel on CUDA,
`gather_cpu` on the CPU, the plain definition elsewhere. Codes in float32 keep the plain definition
everywhere, because a gradient may be asked of them.

Letters: N patches, P voxels per patch, V volumes, B voxels of all volumes.
"""

import math

import torch
from torch import Tensor

from anycontrast_kernels import gather_cpu, reference
from anycontrast_kernels.fused import use_triton
from anycontrast_kernels.probes import gather_error

PatchVox = tuple[int, int, int]


@torch.library.custom_op("anycontrast::gather_patches", mutates_args=())
def gather_patches(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: list[int],
) -> Tensor:
    """See `reference.gather_patches`; int16 codes."""
    sides = _sides(patch_vox)
    patches = (codes_B, volume_start_V, volume_shape_V3, flip_V3, volume_N, grid_N3, sides)
    device = codes_B.device
    if use_triton(
        "gather_patches",
        device,
        torch.int16,
        sides,
        lambda: gather_error(sides, device, torch.int16),
    ):
        from anycontrast_kernels import triton_patchify

        return triton_patchify.gather_patches(*patches)
    if device.type == "cpu":
        return gather_cpu.gather_patches(*patches)
    return reference.gather_patches(*patches)


@gather_patches.register_fake
def _(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: list[int],
) -> Tensor:
    return codes_B.new_empty(volume_N.shape[0], math.prod(patch_vox))


@torch.library.custom_op("anycontrast::gather_zscores", mutates_args=())
def gather_zscores(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    intensity_V4: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.gather_zscores`; int16 codes."""
    sides = _sides(patch_vox)
    volumes = (codes_B, volume_start_V, volume_shape_V3, flip_V3, intensity_V4)
    picked = (volume_N, grid_N3, sides)
    device = codes_B.device
    if use_triton(
        "gather_zscores", device, dtype, sides, lambda: gather_error(sides, device, dtype)
    ):
        from anycontrast_kernels import triton_patchify

        return triton_patchify.gather_zscores(*volumes, *picked, dtype=dtype)
    if device.type == "cpu":
        return gather_cpu.gather_zscores(*volumes, *picked, dtype=dtype)
    return reference.gather_zscores(*volumes, *picked, dtype=dtype)


@gather_zscores.register_fake
def _(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    intensity_V4: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return codes_B.new_empty(volume_N.shape[0], math.prod(patch_vox), dtype=dtype)


def _sides(patch_vox: list[int]) -> PatchVox:
    x, y, z = patch_vox
    return x, y, z


def check_packed(
    name: str,
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    intensity_V4: Tensor | None = None,
) -> None:
    """Refuse what cannot be packed volumes and patches of them, see `patchify.gather_zscores`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: another shape, another device, not contiguous, or (on the CPU, where looking
            does not wait for a device) a volume outside `codes_B` or a row that does not exist.
    """
    if codes_B.dtype not in (torch.int16, torch.float32):
        raise TypeError(f"{name}: codes_B must be int16 or float32, got {codes_B.dtype}")
    if codes_B.ndim != 1:
        raise ValueError(f"{name}: codes_B must be [B], got {tuple(codes_B.shape)}")
    v, n = (x.shape[0] if x.ndim else 0 for x in (volume_start_V, volume_N))
    table = [
        ("codes_B", codes_B, codes_B.dtype, "[B]", tuple(codes_B.shape)),
        ("volume_start_V", volume_start_V, torch.int64, "[V]", (v,)),
        ("volume_shape_V3", volume_shape_V3, torch.int64, "[V, 3]", (v, 3)),
        ("flip_V3", flip_V3, torch.bool, "[V, 3]", (v, 3)),
        ("volume_N", volume_N, torch.int64, "[N]", (n,)),
        ("grid_N3", grid_N3, torch.int64, "[N, 3]", (n, 3)),
    ]
    if intensity_V4 is not None:
        table.append(("intensity_V4", intensity_V4, torch.float32, "[V, 4]", (v, 4)))
    for argument, tensor, dtype, letters, shape in table:
        what = f"{name}: {argument}"
        if tensor.dtype != dtype:
            raise TypeError(f"{what} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{what} must be {shape}, {letters}, got {tuple(tensor.shape)}")
        if tensor.device != codes_B.device:
            raise ValueError(
                f"{what} must lie on {codes_B.device} like the codes, got {tensor.device}"
            )
        check_contiguous(what, tensor)
    if codes_B.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_inside(name, len(codes_B), volume_start_V, volume_shape_V3, volume_N)


def check_contiguous(what: str, tensor: Tensor) -> None:
    """Refuse a tensor whose elements do not follow one another in C order.

    Raises:
        ValueError: it is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"{what} must be contiguous, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; call .contiguous()"
        )


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
