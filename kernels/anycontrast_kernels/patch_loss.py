"""Reconstruction error of every patch: the checked entry.

The plain definition of `reference` runs on every device; it reads prediction and target once and
keeps their difference for the backward pass.
"""

from torch import Tensor

from anycontrast_kernels import reference


def patch_mse(prediction_NP: Tensor, target_NP: Tensor, *, norm_target: bool) -> Tensor:
    """Mean squared error of every patch, in float32 whatever the inputs are.

    Args:
        prediction_NP: [N, P] floating.
        target_NP: [N, P] floating, voxels as z-scores.
        norm_target: compare with the patch normalised to mean 0 and deviation 1.

    Returns:
        [N] float32; averaging is left to the caller, who knows the global count.

    Raises:
        TypeError: an argument is not floating.
        ValueError: shapes or devices differ, or a one-voxel patch is to be normalised.

    Source: He et al., "Masked autoencoders are scalable vision learners", arXiv 2111.06377
        (`norm_pix_loss`).
    """
    _check_floating("patch_mse", "prediction_NP", prediction_NP)
    _check_target("patch_mse", target_NP, norm_target)
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
    return reference.patch_mse(prediction_NP, target_NP, norm_target=norm_target)


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
