"""Error of every predicted patch in one Triton pass, the difference written beside or over it.

A program owns one patch. It reads prediction and target once, normalises the target in registers,
and writes the error of the patch and, if asked, prediction minus target: the gradient but for a
factor per patch. `scale_rows` puts that factor in once the incoming gradient is known. Written over
the prediction's own memory the difference costs no memory at all; read from the stored codes, the
target never exists.

The difference and not the finished gradient is kept because 2 / P times a small difference falls
out of the range of float16.

Letters: N patches, P voxels per patch, V volumes.
"""

# Triton's decorator has no types, and neither do the arguments of a kernel.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from anycontrast_kernels.reference import PATCH_VARIANCE_FLOOR
from anycontrast_kernels.triton_patchify import (
    COMPILER_OPTIONS,
    compile_case,
    cut_of,
    load_zscores,
    on_device,
)

VARIANCE_FLOOR = tl.constexpr(PATCH_VARIANCE_FLOOR)


@triton.jit
def _load_row(x_NP, row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load one row: [BLOCK] float32, 0 beyond its end."""
    p = tl.arange(0, BLOCK)
    return tl.load(x_NP + row * SIZE + p, mask=p < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _compare(
    prediction, target, loss_N, difference_NP, row, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Write error and difference of one patch; prediction and target are [BLOCK] float32."""
    p = tl.arange(0, BLOCK)
    inside = p < SIZE
    if NORM:
        mean = tl.sum(tl.where(inside, target, 0.0), 0) / SIZE
        centred = tl.where(inside, target - mean, 0.0)
        variance = tl.sum(centred * centred, 0) / (SIZE - 1)
        target = centred / tl.sqrt(variance + VARIANCE_FLOOR)
    difference = tl.where(inside, prediction - target, 0.0)
    tl.store(loss_N + row, tl.sum(difference * difference, 0) / SIZE)
    if WRITE:
        difference = difference.to(difference_NP.dtype.element_ty)
        tl.store(difference_NP + row * SIZE + p, difference, mask=inside)


@triton.jit
def loss_kernel(
    prediction_NP, target_NP, loss_N, difference_NP, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Compare one patch with a given target."""
    row = tl.program_id(0).to(tl.int64)
    prediction = _load_row(prediction_NP, row, SIZE, BLOCK)
    target = _load_row(target_NP, row, SIZE, BLOCK)
    _compare(prediction, target, loss_N, difference_NP, row, SIZE, BLOCK, NORM, WRITE)


@triton.jit(do_not_specialize=["num_volumes"])
def stored_loss_kernel(
    prediction_NP, codes, start_V, shape_V3, flip_V3, intensity_V4, volume_N, grid_N3, loss_N,
    difference_NP, num_volumes,
    PATCH_X: tl.constexpr, PATCH_Y: tl.constexpr, PATCH_Z: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Compare one patch with what the stored codes say."""
    row = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = PATCH_X * PATCH_Y * PATCH_Z
    # First, so that it is on its way while the tables say where the codes lie.
    prediction = _load_row(prediction_NP, row, size, BLOCK)
    target = load_zscores(
        codes, start_V, shape_V3, flip_V3, intensity_V4, volume_N, grid_N3, num_volumes, row,
        PATCH_X, PATCH_Y, PATCH_Z, GROUP, BLOCK,
    )  # fmt: skip
    _compare(prediction, target, loss_N, difference_NP, row, size, BLOCK, NORM, WRITE)


@triton.jit
def scale_kernel(
    x_NP, factor_N, out_NP, factor_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply one row by its factor and by 2 / P."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_N + row * factor_stride).to(tl.float32) * (2.0 / SIZE)
    x = _load_row(x_NP, row, SIZE, BLOCK) * factor
    p = tl.arange(0, BLOCK)
    tl.store(out_NP + row * SIZE + p, x.to(out_NP.dtype.element_ty), mask=p < SIZE)


def loss_pass(
    prediction_NP: Tensor,
    target: Sequence[Tensor],
    patch_vox: Sequence[int],
    norm_target: bool,
    difference_NP: Tensor | None,
) -> Tensor:
    """See `loss_pass.loss_pass`; all tensors contiguous on one CUDA device."""
    num_patches, size = prediction_NP.shape
    loss_N = prediction_NP.new_empty(num_patches, dtype=torch.float32)
    if num_patches == 0:
        return loss_N
    write = difference_NP is not None
    out_NP = prediction_NP if difference_NP is None else difference_NP
    with on_device(prediction_NP):
        if len(target) == 1:
            cut = cut_of((1, 1, size))
            loss_kernel[(num_patches,)](
                prediction_NP, target[0], loss_N, out_NP, size, cut.block, norm_target, write,
                num_warps=cut.warps, **COMPILER_OPTIONS,
            )  # fmt: skip
            return loss_N
        codes_B, start_V, shape_V3, flip_V3, intensity_V4, volume_N, grid_N3 = target
        x, y, z = patch_vox
        cut = cut_of((x, y, z))
        stored_loss_kernel[(num_patches,)](
            prediction_NP, codes_B, start_V, shape_V3, flip_V3.view(torch.uint8), intensity_V4,
            volume_N, grid_N3, loss_N, out_NP, len(start_V), x, y, z, cut.group, cut.block,
            norm_target, write, num_warps=cut.warps, **COMPILER_OPTIONS,
        )  # fmt: skip
    return loss_N


def scale_rows(difference_NP: Tensor, factor_N: Tensor, out_NP: Tensor) -> None:
    """See `loss_pass.scale_rows`; matrices contiguous on one CUDA device."""
    num_patches, size = difference_NP.shape
    cut = cut_of((1, 1, size))
    if num_patches:
        with on_device(difference_NP):
            scale_kernel[(num_patches,)](
                difference_NP, factor_N, out_NP, factor_N.stride(0), size, cut.block,
                num_warps=cut.warps, **COMPILER_OPTIONS,
            )  # fmt: skip


_TRAINING = {"NORM": True, "WRITE": True}

COMPILE_CASES = [
    compile_case(loss_kernel, "*bf16", (16, 16, 16), _TRAINING),
    compile_case(stored_loss_kernel, "*bf16", (16, 16, 16), _TRAINING),
    compile_case(stored_loss_kernel, "*fp32", (8, 8, 8), _TRAINING),
    compile_case(stored_loss_kernel, "*bf16", (24, 24, 24), _TRAINING),
    compile_case(stored_loss_kernel, "*bf16", (8, 8, 5), {"NORM": False, "WRITE": False}),
    compile_case(scale_kernel, "*bf16", (16, 16, 16), {}),
]
"""What `compile_check` compiles. Matrices of one case have one type."""
