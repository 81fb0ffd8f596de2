"""Patches from stored volumes in one Triton pass: pick, flip, cut and map to z-scores.

A program makes one patch. It reads the patch's voxels from the stored int16 codes and writes them
in patch order; nothing else of the volume is touched and nothing lies between. The voxels are read
in groups of up to 8 neighbours of one line, 16 bytes at a time where the volume's first voxel and
its lines are aligned (asked at run time, volume by volume). A volume mirrored along its last axis
is read in the same groups, which are turned round in registers.

Letters: N patches, P voxels per patch, V volumes, B stored voxels.
"""

# Triton's decorator has no types, and neither do the arguments of a kernel.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

COMPILER_OPTIONS = {"enable_fp_fusion": True}
"""A multiply and an add become one instruction, whatever Triton's version does by default."""

VOXELS_PER_WARP = 1024
MAX_GROUP = 8
"""Codes of one load: 8 x 2 bytes are the widest there is."""


@triton.jit
def _reverse_groups(x, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Turn every `GROUP` neighbours round: [BLOCK] -> [BLOCK]."""
    groups = tl.reshape(x, [BLOCK // GROUP, GROUP])
    return tl.reshape(tl.flip(groups, 1), [BLOCK])


@triton.jit
def _load_lines(
    codes, start, first_x, first_y, grid_z, step_x, step_y, is_flipped_z, size_y, size_z,
    i, j, group, within, keep, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Load voxels of a patch, every group of `GROUP` neighbours along k in stored order."""
    first_z = tl.where(is_flipped_z, size_z - grid_z * DEPTH - GROUP, grid_z * DEPTH)
    step_z = tl.where(is_flipped_z, -1, 1)
    z = step_z * group * GROUP + within
    lines = (step_x * i * size_y + step_y * j) * size_z
    base = start + (first_x.to(tl.int64) * size_y + first_y) * size_z + first_z
    keep = keep & (first_z + z >= 0) & (first_z + z < size_z)
    return tl.load(codes + base + (lines + z), mask=keep, other=0)


@triton.jit
def load_patch(
    codes, start_V, shape_V3, flip_V3, grid_N3, row, volume, is_known,
    PATCH_X: tl.constexpr, PATCH_Y: tl.constexpr, PATCH_Z: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load one patch as it is seen: [BLOCK] int16, 0 beyond the box."""
    p = tl.arange(0, BLOCK)
    i = p // (PATCH_Y * PATCH_Z)
    j = p // PATCH_Z % PATCH_Y
    group = p // GROUP % (PATCH_Z // GROUP)
    within = p % GROUP
    start = tl.load(start_V + volume)
    # Sides and steps within a patch fit 32 bits; only the place in the whole buffer takes 64.
    size_x = tl.where(is_known, tl.load(shape_V3 + 3 * volume).to(tl.int32), 0)
    size_y = tl.load(shape_V3 + 3 * volume + 1).to(tl.int32)
    size_z = tl.load(shape_V3 + 3 * volume + 2).to(tl.int32)
    is_flipped_x = tl.load(flip_V3 + 3 * volume) != 0
    is_flipped_y = tl.load(flip_V3 + 3 * volume + 1) != 0
    is_flipped_z = tl.load(flip_V3 + 3 * volume + 2) != 0
    seen_x = tl.load(grid_N3 + 3 * row).to(tl.int32) * PATCH_X
    seen_y = tl.load(grid_N3 + 3 * row + 1).to(tl.int32) * PATCH_Y
    grid_z = tl.load(grid_N3 + 3 * row + 2).to(tl.int32)

    x = seen_x + i
    y = seen_y + j
    keep = (p < PATCH_X * PATCH_Y * PATCH_Z) & (x >= 0) & (x < size_x) & (y >= 0) & (y < size_y)
    first_x = tl.where(is_flipped_x, size_x - 1 - seen_x, seen_x)
    first_y = tl.where(is_flipped_y, size_y - 1 - seen_y, seen_y)
    step_x = tl.where(is_flipped_x, -1, 1)
    step_y = tl.where(is_flipped_y, -1, 1)

    if (start % GROUP == 0) & (size_z % GROUP == 0):
        # The same numbers, written so that the compiler knows them to be multiples.
        voxels = _load_lines(
            codes, start // GROUP * GROUP, first_x, first_y, grid_z, step_x, step_y, is_flipped_z,
            size_y, size_z // GROUP * GROUP, i, j, group, within, keep, PATCH_Z, GROUP,
        )  # fmt: skip
    else:
        voxels = _load_lines(
            codes, start, first_x, first_y, grid_z, step_x, step_y, is_flipped_z,
            size_y, size_z, i, j, group, within, keep, PATCH_Z, GROUP,
        )  # fmt: skip
    if GROUP > 1:
        voxels = tl.where(is_flipped_z, _reverse_groups(voxels, GROUP, BLOCK), voxels)
    return voxels


@triton.jit
def load_zscores(
    codes, start_V, shape_V3, flip_V3, intensity_V4, volume_N, grid_N3, num_volumes, row,
    PATCH_X: tl.constexpr, PATCH_Y: tl.constexpr, PATCH_Z: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load one patch as z-scores: [BLOCK] float32; NaN for a volume that does not exist."""
    volume = tl.load(volume_N + row)
    is_known = (volume >= 0) & (volume < num_volumes)
    gain = tl.load(intensity_V4 + 4 * volume, mask=is_known, other=float("nan"))
    bias = tl.load(intensity_V4 + 4 * volume + 1, mask=is_known, other=float("nan"))
    low = tl.load(intensity_V4 + 4 * volume + 2, mask=is_known, other=float("nan"))
    high = tl.load(intensity_V4 + 4 * volume + 3, mask=is_known, other=float("nan"))
    voxels = load_patch(
        codes, start_V, shape_V3, flip_V3, grid_N3, row, tl.where(is_known, volume, 0), is_known,
        PATCH_X, PATCH_Y, PATCH_Z, GROUP, BLOCK,
    )  # fmt: skip
    return tl.minimum(tl.maximum(voxels.to(tl.float32) * gain + bias, low), high)


@triton.jit(do_not_specialize=["num_volumes"])
def patches_kernel(
    codes, start_V, shape_V3, flip_V3, volume_N, grid_N3, out_NP, num_volumes,
    PATCH_X: tl.constexpr, PATCH_Y: tl.constexpr, PATCH_Z: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one patch of codes."""
    row = tl.program_id(0).to(tl.int64)
    volume = tl.load(volume_N + row)
    is_known = (volume >= 0) & (volume < num_volumes)
    voxels = load_patch(
        codes, start_V, shape_V3, flip_V3, grid_N3, row, tl.where(is_known, volume, 0), is_known,
        PATCH_X, PATCH_Y, PATCH_Z, GROUP, BLOCK,
    )  # fmt: skip
    p = tl.arange(0, BLOCK)
    num_voxels: tl.constexpr = PATCH_X * PATCH_Y * PATCH_Z
    tl.store(out_NP + row * num_voxels + p, voxels, mask=p < num_voxels)


@triton.jit(do_not_specialize=["num_volumes"])
def zscores_kernel(
    codes, start_V, shape_V3, flip_V3, intensity_V4, volume_N, grid_N3, out_NP, num_volumes,
    PATCH_X: tl.constexpr, PATCH_Y: tl.constexpr, PATCH_Z: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one patch of z-scores."""
    row = tl.program_id(0).to(tl.int64)
    z = load_zscores(
        codes, start_V, shape_V3, flip_V3, intensity_V4, volume_N, grid_N3, num_volumes, row,
        PATCH_X, PATCH_Y, PATCH_Z, GROUP, BLOCK,
    )  # fmt: skip
    p = tl.arange(0, BLOCK)
    num_voxels: tl.constexpr = PATCH_X * PATCH_Y * PATCH_Z
    z = z.to(out_NP.dtype.element_ty)
    tl.store(out_NP + row * num_voxels + p, z, mask=p < num_voxels)


class Cut(NamedTuple):
    """How a patch is spread over one program: constants of the kernels and warps."""

    block: int
    """Voxels of a patch, rounded up to a power of two."""
    group: int
    """Neighbouring codes of one load."""
    warps: int


def cut_of(patch_vox: tuple[int, int, int]) -> Cut:
    """Return how a program holds a patch of this size."""
    block = triton.next_power_of_2(math.prod(patch_vox))
    depth = patch_vox[2]
    group = min(MAX_GROUP, depth & -depth)  # the largest power of two that divides the side
    return Cut(block, group, min(max(block // VOXELS_PER_WARP, 1), 16))


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def gather_patches(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: tuple[int, int, int],
) -> Tensor:
    """See `reference.gather_patches`; int16 codes, all tensors contiguous on one CUDA device."""
    num_patches = len(volume_N)
    out_NP = codes_B.new_empty(num_patches, math.prod(patch_vox))
    cut = cut_of(patch_vox)
    if num_patches:
        with on_device(codes_B):
            patches_kernel[(num_patches,)](
                codes_B, volume_start_V, volume_shape_V3, flip_V3.view(torch.uint8), volume_N,
                grid_N3, out_NP, len(volume_start_V), *patch_vox, cut.group, cut.block,
                num_warps=cut.warps, **COMPILER_OPTIONS,
            )  # fmt: skip
    return out_NP


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
    """See `reference.gather_zscores`; int16 codes, all tensors contiguous on one CUDA device.

    A patch of a volume that does not exist is NaN.
    """
    num_patches = len(volume_N)
    out_NP = codes_B.new_empty(num_patches, math.prod(patch_vox), dtype=dtype)
    cut = cut_of(patch_vox)
    if num_patches:
        with on_device(codes_B):
            zscores_kernel[(num_patches,)](
                codes_B, volume_start_V, volume_shape_V3, flip_V3.view(torch.uint8), intensity_V4,
                volume_N, grid_N3, out_NP, len(volume_start_V), *patch_vox, cut.group, cut.block,
                num_warps=cut.warps, **COMPILER_OPTIONS,
            )  # fmt: skip
    return out_NP


CompileCase = tuple[Any, dict[str, str], dict[str, object], list[str], dict[str, object]]

TYPES = {
    "codes": "*i16",
    "start_V": "*i64",
    "shape_V3": "*i64",
    "flip_V3": "*u8",
    "intensity_V4": "*fp32",
    "volume_N": "*i64",
    "grid_N3": "*i64",
    "loss_N": "*fp32",
    "factor_N": "*fp32",
    "num_volumes": "i32",
    "factor_stride": "i32",
}
"""Of the kernels' arguments; what is not named here is [N, P] and of the case's type."""


def compile_case(
    kernel: Any, dtype: str, patch_vox: tuple[int, int, int], constants: Mapping[str, object]
) -> CompileCase:
    """Describe to `compile_check` how a kernel is launched for one type and patch."""
    cut = cut_of(patch_vox)
    x, y, z = patch_vox
    known: dict[str, object] = {"PATCH_X": x, "PATCH_Y": y, "PATCH_Z": z, "SIZE": x * y * z}
    known |= {"GROUP": cut.group, "BLOCK": cut.block, **constants}
    names: list[str] = kernel.arg_names
    types = {name: TYPES.get(name, dtype) for name in names if not name.isupper()}
    constexprs = {name: known[name] for name in names if name.isupper()}
    multiples = [name for name, kind in types.items() if kind.startswith("*")]
    return kernel, types, constexprs, multiples, {"num_warps": cut.warps, **COMPILER_OPTIONS}


COMPILE_CASES = [
    compile_case(patches_kernel, "*i16", (16, 16, 16), {}),
    compile_case(zscores_kernel, "*bf16", (16, 16, 16), {}),
    compile_case(zscores_kernel, "*fp32", (16, 16, 16), {}),
    compile_case(zscores_kernel, "*bf16", (8, 8, 8), {}),
    compile_case(zscores_kernel, "*fp32", (8, 8, 5), {}),
]
"""What `compile_check` compiles."""
