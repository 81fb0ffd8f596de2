"""The patch loss as operators of torch: one pass forward, one multiplication backward.

The forward pass leaves prediction minus target behind, in a buffer of its own or over the
prediction; the backward pass multiplies it by the incoming gradient. Both are custom operators, so
that a compiled graph sees shapes and not kernels. Inputs are trusted: `patch_loss` checks them.

Letters: N patches, P voxels per patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anycontrast_kernels import loss_pass
from anycontrast_kernels.fused import use_triton
from anycontrast_kernels.probes import LossKernels, loss_error


def patch_loss(
    prediction_NP: Tensor,
    target: Sequence[Tensor],
    patch_vox: Sequence[int],
    *,
    norm_target: bool,
    overwrite_prediction: bool,
) -> Tensor:
    """Compare every patch with its target; arguments as `loss_pass.loss_pass`.

    Nothing is written where no gradient will be asked for.

    Returns:
        [N] float32, differentiable in the prediction alone, once.
    """
    inputs = (list(target), list(patch_vox), norm_target)
    if not (torch.is_grad_enabled() and prediction_NP.requires_grad):
        loss_N: Tensor = _compare(prediction_NP, *inputs, False)[0]
    else:
        loss_N = _PatchLoss.apply(prediction_NP, *inputs, overwrite_prediction)  # type: ignore[no-untyped-call]
    return loss_N


class _PatchLoss(torch.autograd.Function):
    """Keep the difference for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        prediction_NP: Tensor,
        target: list[Tensor],
        patch_vox: list[int],
        norm_target: bool,
        overwrite: bool,
    ) -> Tensor:
        loss_N: Tensor
        if overwrite:
            loss_N = _compare_over(prediction_NP, target, patch_vox, norm_target)
            difference_NP = prediction_NP
        else:
            loss_N, difference_NP = _compare(prediction_NP, target, patch_vox, norm_target, True)
        ctx.save_for_backward(difference_NP)
        ctx.overwrite, ctx.patch_vox = overwrite, patch_vox
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (difference_NP,) = ctx.saved_tensors
        if ctx.overwrite:
            # Counts as an in-place change, so a second backward pass is refused by autograd.
            gradient_NP = difference_NP.detach()
            _scale_over(gradient_NP, grad_N, ctx.patch_vox)
        else:
            gradient_NP = _scale(difference_NP, grad_N, ctx.patch_vox)
        return gradient_NP, None, None, None, None


@torch.library.custom_op("anycontrast::patch_loss", mutates_args=())
def _compare(
    prediction_NP: Tensor,
    target: list[Tensor],
    patch_vox: list[int],
    norm_target: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss [N] and, where wanted, the difference [N, P]."""
    shape = prediction_NP.shape if differentiate else (0, 0)
    difference_NP = prediction_NP.new_empty(shape)
    kept = difference_NP if differentiate else None
    run = _kernels(prediction_NP, patch_vox)
    return run.loss_pass(prediction_NP, target, patch_vox, norm_target, kept), difference_NP


@_compare.register_fake
def _(
    prediction_NP: Tensor,
    target: list[Tensor],
    patch_vox: list[int],
    norm_target: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    loss_N = prediction_NP.new_empty(prediction_NP.shape[0], dtype=torch.float32)
    return loss_N, prediction_NP.new_empty(prediction_NP.shape if differentiate else (0, 0))


@torch.library.custom_op("anycontrast::patch_loss_over", mutates_args=("prediction_NP",))
def _compare_over(
    prediction_NP: Tensor, target: list[Tensor], patch_vox: list[int], norm_target: bool
) -> Tensor:
    """Return the loss [N]; the difference takes the prediction's place."""
    run = _kernels(prediction_NP, patch_vox)
    return run.loss_pass(prediction_NP, target, patch_vox, norm_target, prediction_NP)


@_compare_over.register_fake
def _(
    prediction_NP: Tensor, target: list[Tensor], patch_vox: list[int], norm_target: bool
) -> Tensor:
    return prediction_NP.new_empty(prediction_NP.shape[0], dtype=torch.float32)


@torch.library.custom_op("anycontrast::scale_patches", mutates_args=())
def _scale(difference_NP: Tensor, factor_N: Tensor, patch_vox: list[int]) -> Tensor:
    """Return the gradient [N, P] beside the difference."""
    gradient_NP = torch.empty_like(difference_NP)
    _kernels(difference_NP, patch_vox).scale_rows(difference_NP, factor_N, gradient_NP)
    return gradient_NP


@_scale.register_fake
def _(difference_NP: Tensor, factor_N: Tensor, patch_vox: list[int]) -> Tensor:
    return torch.empty_like(difference_NP)


@torch.library.custom_op("anycontrast::scale_patches_over", mutates_args=("difference_NP",))
def _scale_over(difference_NP: Tensor, factor_N: Tensor, patch_vox: list[int]) -> None:
    """Let the gradient take the difference's place."""
    _kernels(difference_NP, patch_vox).scale_rows(difference_NP, factor_N, difference_NP)


@_scale_over.register_fake
def _(difference_NP: Tensor, factor_N: Tensor, patch_vox: list[int]) -> None:
    return None


def _kernels(prediction_NP: Tensor, patch_vox: list[int]) -> LossKernels:
    """Return the module that does the work here; `patch_vox` is empty for a target given whole."""
    device, dtype = prediction_NP.device, prediction_NP.dtype
    sides = tuple(patch_vox) or (prediction_NP.shape[1],)

    def probe() -> float:
        from anycontrast_kernels import triton_patch_loss

        return loss_error(triton_patch_loss, sides, device, dtype)

    if use_triton("patch_mse", device, dtype, sides, probe):
        from anycontrast_kernels import triton_patch_loss

        return triton_patch_loss
    return loss_pass
