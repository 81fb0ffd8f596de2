"""Small cases on which a fused kernel is held against the plain definition before it is trusted.

Letters: N patches, P voxels per patch, V volumes, B voxels of all volumes.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from anycontrast_kernels import reference

PatchVox = tuple[int, int, int]
Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Arguments of `patchify.gather_zscores` up to the patch."""


class LossKernels(Protocol):
    """What `loss_pass` and `triton_patch_loss` offer."""

    def loss_pass(
        self,
        prediction_NP: Tensor,
        target: list[Tensor],
        patch_vox: list[int],
        norm_target: bool,
        difference_NP: Tensor | None,
    ) -> Tensor:
        """See `loss_pass.loss_pass`."""
        ...

    def scale_rows(self, difference_NP: Tensor, factor_N: Tensor, out_NP: Tensor) -> None:
        """See `loss_pass.scale_rows`."""
        ...


def packed_volumes(patch_vox: PatchVox, device: torch.device) -> Packed:
    """Make three volumes and six patches of them: the seven tensors of `gather_zscores`.

    One volume of whole patches is seen twice, once mirrored; the other ends inside its patches and
    is mirrored along every axis. The draws leave the global generator alone.
    """
    whole = tuple(2 * side for side in patch_vox)
    part = tuple(max(2 * side - 1, 1) for side in patch_vox)
    sizes = [math.prod(whole), math.prod(part)]
    generator = torch.Generator().manual_seed(0)
    made = (
        torch.randint(-2000, 2000, (sum(sizes),), generator=generator, dtype=torch.int16),
        torch.tensor([0, sizes[0], 0]),
        torch.tensor([whole, part, whole]),
        torch.tensor([[False] * 3, [True] * 3, [True, False, True]]),
        torch.tensor([[1e-3, 0.25, -1.5, 1.5], [8e-4, -0.5, -2.0, 1.0], [1e-3, 0.0, -1.0, 2.0]]),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.tensor([[0, 0, 0], [1, 1, 1]]).repeat(3, 1),
    )
    codes, start, shape, flip, intensity, volume, grid = (tensor.to(device) for tensor in made)
    return codes, start, shape, flip, intensity, volume, grid


def gather_error(patch_vox: PatchVox, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of the Triton gather kernels; of codes where `dtype` is int16."""
    from anycontrast_kernels import triton_patchify

    codes, start, shape, flip, intensity, volume, grid = packed_volumes(patch_vox, device)
    if dtype == torch.int16:
        patches = (codes, start, shape, flip, volume, grid, patch_vox)
        found = triton_patchify.gather_patches(*patches)
        expected = reference.gather_patches(*patches)
    else:
        scores = (codes, start, shape, flip, intensity, volume, grid, patch_vox)
        found = triton_patchify.gather_zscores(*scores, dtype=dtype)
        expected = reference.gather_zscores(*scores)
    return float((found.float() - expected.float()).abs().max())


def loss_error(
    kernels: LossKernels,
    patch_vox: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Largest error of loss, difference and gradient; the target is stored if it has 3 sides."""
    size = math.prod(patch_vox)
    generator = torch.Generator().manual_seed(0)
    prediction_NP = torch.randn(6, size, generator=generator).to(device, dtype)
    factor_N = torch.rand(6, generator=generator).to(device)
    if len(patch_vox) == 3:
        sides = (patch_vox[0], patch_vox[1], patch_vox[2])
        packed = packed_volumes(sides, device)
        target, target_NP = list(packed), reference.gather_zscores(*packed, sides)
    else:
        target_NP = torch.randn(6, size, generator=generator).to(device)
        target = [target_NP]
    errors = []
    for norm_target in (False, True)[: 2 if size > 1 else 1]:
        known_NP = reference.normalize_patches(target_NP) if norm_target else target_NP
        expected_NP = prediction_NP.float() - known_NP
        kept_NP, gradient_NP = prediction_NP.clone(), torch.empty_like(prediction_NP)
        loss_N = kernels.loss_pass(kept_NP, target, list(patch_vox), norm_target, kept_NP)
        kernels.scale_rows(kept_NP, factor_N * (size / 2), gradient_NP)
        errors += [
            loss_N - expected_NP.square().mean(dim=1),
            kept_NP.float() - expected_NP,
            gradient_NP.float() - expected_NP * factor_N.unsqueeze(1),
        ]
    return float(torch.stack([error.abs().max() for error in errors]).max())
