"""Error and difference of every patch in plain PyTorch, a few patches at a time.

What is computed on the way stays in the processor's cache, and the difference may be written over
the prediction: the step then needs one [N, P] matrix where the plain expression keeps four. A
target given as stored codes is cut a few patches at a time too and never exists as a whole.

Letters: N patches, P voxels per patch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anycontrast_kernels import gather_cpu, reference

CPU_PIECE_VOX = 2**18
"""Voxels compared at a time: 1 MB in float32."""
DEVICE_PIECE_VOX = 2**22
"""The same on an accelerator, where every launch costs time."""


@torch.no_grad()
def loss_pass(
    prediction_NP: Tensor,
    target: Sequence[Tensor],
    patch_vox: Sequence[int],
    norm_target: bool,
    difference_NP: Tensor | None,
) -> Tensor:
    """Compare every patch with its target; inputs are trusted (`patch_loss` checks them).

    Args:
        prediction_NP: [N, P] floating.
        target: the patches [N, P] floating alone, or the seven tensors of
            `patchify.gather_zscores`.
        patch_vox: voxels of a patch along i, j, k; not looked at where the patches are given.
        norm_target: give each target mean 0 and deviation 1 first.
        difference_NP: where prediction minus target is written, [N, P] in the dtype of the
            prediction; may be the prediction itself. None: it is not wanted.

    Returns:
        [N] float32, mean squared error of every patch.
    """
    num_patches, size = prediction_NP.shape
    loss_N = prediction_NP.new_empty(num_patches, dtype=torch.float32)
    is_cpu = prediction_NP.device.type == "cpu"
    step = max((CPU_PIECE_VOX if is_cpu else DEVICE_PIECE_VOX) // max(size, 1), 1)
    for first in range(0, num_patches, step):
        rows = slice(first, first + step)
        target_nP = _target_rows(target, patch_vox, rows)
        if norm_target:
            target_nP = _normalize(target_nP)
        found_nP = prediction_NP[rows].float()
        if difference_NP is not None and difference_NP.dtype == torch.float32:
            difference_nP = torch.sub(found_nP, target_nP, out=difference_NP[rows])
        else:
            difference_nP = found_nP - target_nP
            if difference_NP is not None:
                difference_NP[rows] = difference_nP
        loss_N[rows] = torch.linalg.vector_norm(difference_nP, dim=1).square_().div_(size)
    return loss_N


@torch.no_grad()
def scale_rows(difference_NP: Tensor, factor_N: Tensor, out_NP: Tensor) -> None:
    """Finish the gradient: difference * factor * 2 / P.

    Args:
        difference_NP: [N, P] as `loss_pass` wrote it.
        factor_N: [N] float32, gradient of the caller's loss by the error of each patch.
        out_NP: where the gradient is written; may be `difference_NP`.
    """
    factor_N1 = (factor_N * (2.0 / difference_NP.shape[1])).unsqueeze(1)
    torch.mul(difference_NP, factor_N1, out=out_NP)


def _normalize(target_nP: Tensor) -> Tensor:
    """Do what `reference.normalize_patches` does, many times faster than `var_mean` on a CPU."""
    centred_nP = target_nP - target_nP.mean(dim=1, keepdim=True)
    norm_n1 = torch.linalg.vector_norm(centred_nP, dim=1, keepdim=True)
    variance_n1 = norm_n1.square_().div_(target_nP.shape[1] - 1)
    return centred_nP.mul_(variance_n1.add_(reference.PATCH_VARIANCE_FLOOR).rsqrt_())


def _target_rows(target: Sequence[Tensor], patch_vox: Sequence[int], rows: slice) -> Tensor:
    """Some rows of the target in float32."""
    if len(target) == 1:
        return target[0][rows].float()
    codes_B, start_V, shape_V3, flip_V3, intensity_V4, volume_N, grid_N3 = target
    x, y, z = patch_vox
    gather = gather_cpu.gather_zscores if codes_B.device.type == "cpu" else reference.gather_zscores
    return gather(
        codes_B, start_V, shape_V3, flip_V3, intensity_V4, volume_N[rows], grid_N3[rows], (x, y, z)
    )
