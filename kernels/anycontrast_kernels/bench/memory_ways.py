"""The memory-bound kernels and plain PyTorch beside them: loss and patches.

Letters: N patches, P voxels per patch, V volumes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anycontrast_kernels import reference
from anycontrast_kernels.patch_loss import patch_mse
from anycontrast_kernels.patchify import gather_zscores

PATCH_VOX = (16, 16, 16)


class MemoryCase(NamedTuple):
    """One operation: what does it, and how many bytes it cannot avoid to move."""

    name: str
    way: str
    num_bytes: float
    call: Callable[[], object]


def memory_cases(device: torch.device, dtype: torch.dtype, num_patches: int) -> list[MemoryCase]:
    """Return loss (forward, and with its gradient) and patches, by our entry and plainly."""
    return [*_loss_cases(device, dtype, num_patches), *_patch_cases(device, dtype, num_patches)]


def _loss_cases(device: torch.device, dtype: torch.dtype, num_patches: int) -> list[MemoryCase]:
    size = num_patches * PATCH_VOX[0] ** 3
    prediction, target = (
        torch.randn((num_patches, PATCH_VOX[0] ** 3), device=device).to(dtype) for _ in range(2)
    )
    prediction.requires_grad_()
    grad_N = torch.full((num_patches,), 1.0 / num_patches, device=device)

    def step(loss: Callable[..., Tensor]) -> Callable[[], object]:
        def call() -> object:
            loss_N = loss(prediction, target, norm_target=True)
            return torch.autograd.grad(loss_N, prediction, grad_N)

        return call

    def forward(loss: Callable[..., Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return loss(prediction, target, norm_target=True)

        return call

    ways = {"ours": patch_mse, "plain PyTorch": reference.patch_mse}
    # Prediction and target are read; with the gradient, one matrix more is written at least.
    return [
        MemoryCase(name, way, matrices * size * dtype.itemsize, make(loss))
        for name, matrices, make in (("loss", 2, forward), ("loss and gradient", 3, step))
        for way, loss in ways.items()
    ]


def _patch_cases(device: torch.device, dtype: torch.dtype, num_patches: int) -> list[MemoryCase]:
    """Whole cubic volumes, one in two mirrored, patches in random order."""
    side = 8
    num_volumes = max(1, num_patches // side**3)
    shape_V3 = torch.tensor([[side * p for p in PATCH_VOX]] * num_volumes)
    voxels = int(shape_V3[0].prod())
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_volumes * side**3, generator=generator)[:num_patches]
    axis = torch.arange(side)
    grid = torch.cartesian_prod(axis, axis, axis).repeat(num_volumes, 1)[order]
    arguments = [
        x.to(device)
        for x in (
            torch.randint(0, 4095, (num_volumes * voxels,), dtype=torch.int16),
            torch.arange(num_volumes) * voxels,
            shape_V3,
            torch.arange(num_volumes)[:, None].expand(-1, 3).remainder(2).bool().contiguous(),
            torch.tensor([[0.002, -4.0, -3.0, 3.0]] * num_volumes),
            order // side**3,
            grid.contiguous(),
        )
    ]
    moved = len(order) * PATCH_VOX[0] ** 3 * (2 + dtype.itemsize)

    def call(way: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: way(*arguments, PATCH_VOX, dtype=dtype)

    ways = {"ours": gather_zscores, "plain PyTorch": reference.gather_zscores}
    return [MemoryCase("patches", way, moved, call(cut)) for way, cut in ways.items()]
