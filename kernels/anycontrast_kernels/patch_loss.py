"""Reconstruction error of every patch: the checked entry.

One pass over prediction and target gives error and gradient: a Triton kernel on CUDA
(`triton_patch_loss`), plain PyTorch a few patches at a time elsewhere (`loss_pass`); `reference`
defines both. The target is data: no gradient goes into it.
"""

import math

import torch
from torch import Tensor

from anycontrast_kernels import gather_ops, reference
from anycontrast_kernels.loss_ops import patch_loss
from anycontrast_kernels.patchify import check_patch


def patch_mse(
    prediction_NP: Tensor,
    target_NP: Tensor,
    *,
    norm_target: bool,
    overwrite_prediction: bool = False,
) -> Tensor:
    """Mean squared error of every patch, in float32 whatever the inputs are.

    Args:
        prediction_NP: [N, P] floating, contiguous.
        target_NP: [N, P] floating, contiguous, voxels as z-scores; takes no gradient.
        norm_target: compare with the patch normalised to mean 0 and deviation 1.
        overwrite_prediction: where a gradient will be asked for, keep it in the prediction's own
            memory. Saves an [N, P] matrix twice over; the prediction is lost, and the backward
            pass can run once. Autograd refuses the backward pass where the operation that made
            the prediction needs it back.

    Returns:
        [N] float32; averaging is left to the caller, who knows the global count.

    Raises:
        TypeError: an argument is not floating.
        ValueError: shapes or devices differ, an argument is not contiguous, the target asks for a
            gradient, a one-voxel patch is to be normalised, or a leaf is to be overwritten.

    Source: He et al., "Masked autoencoders are scalable vision learners", arXiv 2111.06377
        (`norm_pix_loss`).
    """
    _check_prediction("patch_mse", prediction_NP, overwrite_prediction)
    _check_target("patch_mse", target_NP, norm_target)
    if target_NP.requires_grad:
        raise ValueError("patch_mse: target_NP must not require a gradient; detach it")
    if prediction_NP.shape != target_NP.shape:
        raise ValueError(
            "patch_mse: prediction_NP and target_NP must have one shape, got "
            f"{tuple(prediction_NP.shape)} and {tuple(target_NP.shape)}"
        )
    if prediction_NP.device != target_NP.device:
        raise ValueError(
            "patch_mse: prediction_NP and target_NP must lie on one device, got "
            f"{prediction_NP.device} and {target_NP.device}"
        )
    gather_ops.check_contiguous("patch_mse: prediction_NP", prediction_NP)
    gather_ops.check_contiguous("patch_mse: target_NP", target_NP)
    return patch_loss(
        prediction_NP,
        [target_NP],
        [],
        norm_target=norm_target,
        overwrite_prediction=overwrite_prediction,
    )


def stored_patch_mse(
    prediction_NP: Tensor,
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    intensity_V4: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: tuple[int, int, int],
    *,
    norm_target: bool,
    overwrite_prediction: bool = False,
) -> Tensor:
    """Compare predictions with patches of packed volumes; the target is never made as a whole.

    The same as `patch_mse` on what `patchify.gather_zscores` returns for the other arguments.

    Args:
        prediction_NP: [N, P] floating, contiguous.
        codes_B: [B] int16, as all that follows up to `patch_vox` like in `gather_zscores`.
        volume_start_V: [V] int64.
        volume_shape_V3: [V, 3] int64.
        flip_V3: [V, 3] bool.
        intensity_V4: [V, 4] float32.
        volume_N: [N] int64.
        grid_N3: [N, 3] int64.
        patch_vox: voxels of a patch along i, j, k.
        norm_target: as `patch_mse`.
        overwrite_prediction: as `patch_mse`.

    Returns:
        [N] float32.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: as `patch_mse` and `patchify.gather_patches`.
    """
    name = "stored_patch_mse"
    _check_prediction(name, prediction_NP, overwrite_prediction)
    if codes_B.dtype != torch.int16:
        raise TypeError(f"{name}: codes_B must be int16, got {codes_B.dtype}")
    check_patch(patch_vox)
    volumes = (codes_B, volume_start_V, volume_shape_V3, flip_V3)
    gather_ops.check_packed(name, *volumes, volume_N, grid_N3, intensity_V4)
    expected = (len(volume_N), math.prod(patch_vox))
    if tuple(prediction_NP.shape) != expected:
        raise ValueError(
            f"{name}: prediction_NP must be {expected} for volume_N and patch_vox "
            f"{tuple(patch_vox)}, got {tuple(prediction_NP.shape)}"
        )
    if prediction_NP.device != codes_B.device:
        raise ValueError(
            f"{name}: prediction_NP must lie on {codes_B.device} like the codes, "
            f"got {prediction_NP.device}"
        )
    if norm_target and expected[1] < 2:
        raise ValueError(f"{name}: a patch needs 2 voxels or more to be normalised")
    gather_ops.check_contiguous(f"{name}: prediction_NP", prediction_NP)
    return patch_loss(
        prediction_NP,
        [*volumes, intensity_V4, volume_N, grid_N3],
        list(patch_vox),
        norm_target=norm_target,
        overwrite_prediction=overwrite_prediction,
    )


def normalize_patches(target_NP: Tensor) -> Tensor:
    """Give every patch mean 0 and deviation 1; the deviation is sqrt(unbiased variance + 1e-6).

    Args:
        target_NP: [N, P] floating, P >= 2.

    Returns:
        [N, P] float32.

    Raises:
        TypeError: `target_NP` is not floating.
        ValueError: it is not [N, P] with P >= 2.
    """
    _check_target("normalize_patches", target_NP, True)
    return reference.normalize_patches(target_NP)


def denormalize_patches(prediction_NP: Tensor, target_NP: Tensor) -> Tensor:
    """Undo `normalize_patches` with the true mean and deviation of `target_NP`.

    Args:
        prediction_NP: [N, P] floating, in units of normalised patches.
        target_NP: [N, P] floating, the patches whose moments are put back.

    Returns:
        [N, P] float32, z-scores.

    Raises:
        TypeError: an argument is not floating.
        ValueError: shapes differ or P < 2.
    """
    _check_floating("denormalize_patches", "prediction_NP", prediction_NP)
    _check_target("denormalize_patches", target_NP, True)
    if prediction_NP.shape != target_NP.shape:
        raise ValueError(
            "denormalize_patches: prediction_NP and target_NP must have one shape, got "
            f"{tuple(prediction_NP.shape)} and {tuple(target_NP.shape)}"
        )
    mean_N1, deviation_N1 = reference.patch_moments(target_NP)
    return prediction_NP.float() * deviation_N1 + mean_N1


def _check_floating(operation: str, name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{operation}: {name} must be floating, got {value.dtype}")


def _check_prediction(operation: str, prediction_NP: Tensor, overwrite: bool) -> None:
    _check_floating(operation, "prediction_NP", prediction_NP)
    if overwrite and prediction_NP.requires_grad and prediction_NP.is_leaf:
        raise ValueError(
            f"{operation}: overwrite_prediction needs the result of an operation, "
            "prediction_NP is a leaf whose value would be lost"
        )


def _check_target(operation: str, target_NP: Tensor, norm_target: bool) -> None:
    _check_floating(operation, "target_NP", target_NP)
    if target_NP.ndim != 2:
        raise ValueError(
            f"{operation}: target_NP must be [N, P], got shape {tuple(target_NP.shape)}"
        )
    if norm_target and target_NP.shape[1] < 2:
        raise ValueError(
            f"{operation}: a patch needs 2 voxels or more to be normalised, "
            f"got target_NP of shape {tuple(target_NP.shape)}"
        )
