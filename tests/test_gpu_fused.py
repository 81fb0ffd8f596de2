"""The fused kernels on a GPU, compiled: parity with the definitions and equal repeated runs."""

import logging
from itertools import product

import pytest
import torch
from torch import Tensor

from anycontrast_kernels import fused, patch_loss, patchify, reference
from anycontrast_kernels.probes import Packed, packed_volumes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Triton 3.9 announces a default that our launches do not leave open.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
GPU = torch.device("cuda")
PATCHES = [(16, 16, 16), (8, 8, 8), (8, 8, 5), (4, 2, 12)]
ATOL = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def volumes(patch: tuple[int, int, int], num_patches: int = 517) -> Packed:
    """Volumes of the probe, an odd number of patches of them in no order, two of no sense."""
    codes, start, shape, flip, intensity, _, _ = packed_volumes(patch, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    volume = torch.randint(0, 3, (num_patches,), generator=generator)
    grid = torch.randint(0, 2, (num_patches, 3), generator=generator)
    grid[5], grid[6] = torch.tensor([0, 7, 0]), torch.tensor([-1, 0, 0])
    made = (codes, start, shape, flip, intensity, volume, grid)
    codes, start, shape, flip, intensity, volume, grid = (x.to(GPU) for x in made)
    return codes, start, shape, flip, intensity, volume, grid


@pytest.fixture(autouse=True)
def _no_slower_path(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fused.ENVIRONMENT_VARIABLE, "triton")
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_are_the_defined_ones(patch: tuple[int, int, int]) -> None:
    codes, start, shape, flip, intensity, volume, grid = volumes(patch)
    where = (volume, grid, patch)
    found = patchify.gather_patches(codes, start, shape, flip, *where)
    assert torch.equal(found, reference.gather_patches(codes, start, shape, flip, *where))
    for dtype, atol in ATOL.items():
        args = (codes, start, shape, flip, intensity, *where)
        z = patchify.gather_zscores(*args, dtype=dtype)
        expected = reference.gather_zscores(*args)
        torch.testing.assert_close(z.float(), expected, atol=atol, rtol=0)
        assert all(torch.equal(z, patchify.gather_zscores(*args, dtype=dtype)) for _ in range(5))


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("dtype", list(ATOL))
def test_loss_and_gradient_are_the_defined_ones_every_time(
    patch: tuple[int, int, int], dtype: torch.dtype
) -> None:
    packed = volumes(patch)
    target = reference.gather_zscores(*packed, patch)
    generator = torch.Generator(GPU).manual_seed(0)
    plain = torch.randn(target.shape, generator=generator, device=GPU).to(dtype)
    factor = torch.rand(len(target), generator=generator, device=GPU)
    for norm in (False, True):
        leaf = plain.float().requires_grad_()
        expected = reference.patch_mse(leaf, target, norm_target=norm)
        (gradient,) = torch.autograd.grad(expected, leaf, factor)
        for stored, over in product((False, True), repeat=2):
            runs = [run(plain, packed, target, patch, norm, stored, over, factor) for _ in range(3)]
            for loss, found in runs:
                torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(
                    found.float(),
                    gradient,
                    rtol=2 * ATOL[dtype],
                    atol=ATOL[dtype] / target.shape[1],
                )
                assert torch.equal(loss, runs[0][0]) and torch.equal(found, runs[0][1])


def run(
    plain: Tensor,
    packed: Packed,
    target: Tensor,
    patch: tuple[int, int, int],
    norm: bool,
    stored: bool,
    over: bool,
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient through the checked entry."""
    leaf = plain.clone().requires_grad_()
    prediction = leaf * 1.0
    if stored:
        loss = patch_loss.stored_patch_mse(
            prediction, *packed, patch, norm_target=norm, overwrite_prediction=over
        )
    else:
        loss = patch_loss.patch_mse(prediction, target, norm_target=norm, overwrite_prediction=over)
    (gradient,) = torch.autograd.grad(loss, leaf, factor)
    return loss.detach(), gradient.clone()


def test_a_volume_that_does_not_exist_is_nan_and_reads_nothing() -> None:
    patch = (8, 8, 8)
    codes, start, shape, flip, intensity, volume, grid = volumes(patch)
    volume[3], volume[4] = 3, -1
    z = patchify.gather_zscores(codes, start, shape, flip, intensity, volume, grid, patch)
    assert z[3:5].isnan().all() and z[5:].isfinite().all()


def test_other_devices_are_refused_before_a_launch() -> None:
    patch = (8, 8, 8)
    codes, start, shape, flip, _, volume, grid = volumes(patch)
    with pytest.raises(ValueError, match="grid_N3 must lie on cuda"):
        patchify.gather_patches(codes, start, shape, flip, volume, grid.cpu(), patch)
    with pytest.raises(ValueError, match="one device"):
        patch_loss.patch_mse(torch.zeros(2, 8, device=GPU), torch.zeros(2, 8), norm_target=True)
