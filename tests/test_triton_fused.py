"""The fused kernels in Triton's interpreter: no GPU, so values are tested and not speed.

The interpreter must be on before a kernel is decorated, hence all checks run in one process of
their own, which this file starts with itself as the script; each check is one test here.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anycontrast_kernels import patch_loss, patchify, reference
from anycontrast_kernels.probes import LossKernels, Packed

pytest.importorskip("triton")

ATOL = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FLIPS = list(product((False, True), repeat=3))
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Register what the interpreter's process runs."""
    CHECKS[function.__name__] = function
    return function


def volumes(
    patch: tuple[int, int, int], *, whole: bool, flips: list[tuple[bool, ...]] = FLIPS
) -> Packed:
    """Two volumes, drawn in turn once per flip, and patches of all: arguments of `gather_zscores`.

    Patches are picked in no order, an odd number, the last of every axis among them and one twice;
    boxes end inside a patch unless `whole`.
    """
    generator = torch.Generator().manual_seed(sum(patch))
    grids = ((2, 3, 2), (1, 2, 3))
    cut = 0 if whole else 1
    shapes = [
        [g * p - cut * min(1, p - 1) for g, p in zip(grid, patch, strict=True)] for grid in grids
    ]
    sizes = [shape[0] * shape[1] * shape[2] for shape in shapes]
    first = 0 if whole else 3  # an odd place in the buffer
    codes = torch.randint(-3000, 3000, (first + sum(sizes),), generator=generator)
    draws = [(n % 2, flip) for n, flip in enumerate(flips)]
    picked = [
        (row, grid)
        for row, (which, _) in enumerate(draws)
        for grid in ([0, 0, 0], [n - 1 for n in grids[which]])
    ]
    picked = [picked[n] for n in torch.randperm(len(picked), generator=generator).tolist()]
    picked.append(picked[0])
    return (
        codes.to(torch.int16),
        torch.tensor([first + which * sizes[0] for which, _ in draws]),
        torch.tensor([shapes[which] for which, _ in draws]),
        torch.tensor([flip for _, flip in draws]),
        torch.tensor([[4e-4 + 1e-5 * n, 0.1 * n - 0.3, -0.9, 1.1] for n in range(len(draws))]),
        torch.tensor([row for row, _ in picked]),
        torch.tensor([grid for _, grid in picked]),
    )


@check
def zscores_of_all_flips_and_part_patches() -> None:
    from anycontrast_kernels import triton_patchify

    for patch, whole, flips in (((2, 2, 16), True, FLIPS[::3]), ((4, 2, 8), False, FLIPS)):
        target = volumes(patch, whole=whole, flips=flips)
        found = triton_patchify.gather_zscores(*target, patch)
        expected = reference.gather_zscores(*target, patch)
        assert expected.std() > 0.3
        torch.testing.assert_close(found, expected, atol=ATOL[torch.float32], rtol=0)


@check
def zscores_of_patches_that_are_no_power_of_two() -> None:
    from anycontrast_kernels import triton_patchify

    for patch in ((8, 8, 5), (3, 2, 12), (1, 1, 1)):
        target = volumes(patch, whole=False, flips=FLIPS[::7])
        for dtype in ATOL:
            found = triton_patchify.gather_zscores(*target, patch, dtype=dtype)
            assert found.dtype == dtype
            expected = reference.gather_zscores(*target, patch)
            torch.testing.assert_close(found.float(), expected, atol=ATOL[dtype], rtol=0)


@check
def codes_are_exact() -> None:
    from anycontrast_kernels import triton_patchify

    for patch, whole in (((2, 2, 16), True), ((3, 2, 6), False)):
        codes, start, shape, flip, _, volume, grid = volumes(patch, whole=whole, flips=FLIPS[::7])
        args = (codes, start, shape, flip, volume, grid, patch)
        found = triton_patchify.gather_patches(*args)
        assert torch.equal(found, reference.gather_patches(*args))


@check
def a_patch_beyond_the_box_is_code_zero_and_one_of_no_volume_is_nan() -> None:
    from anycontrast_kernels import triton_patchify

    patch = (2, 2, 4)
    codes, start, shape, flip, intensity, _, _ = volumes(patch, whole=True)
    grid = torch.tensor([[9, 0, 0], [0, -1, 0], [0, 0, 50], [0, 0, 0], [0, 0, 0]])
    volume = torch.tensor([5, 5, 5, len(start), -1])
    args = (codes, start, shape, flip, intensity, volume, grid, patch)
    found = triton_patchify.gather_zscores(*args)
    _, bias, low, high = intensity[5].tolist()
    assert torch.allclose(found[:3], torch.tensor(min(max(bias, low), high)))
    assert found[3:].isnan().all()


@check
def loss_and_gradient_of_a_given_target() -> None:
    from anycontrast_kernels import triton_patch_loss

    generator = torch.Generator().manual_seed(1)
    for (size, dtype), norm in product(zip((37, 64, 320), ATOL, strict=True), (False, True)):
        target = torch.randn(7, size, generator=generator) * 3 + 2
        prediction = torch.randn(7, size, generator=generator).to(dtype)
        compare(triton_patch_loss, prediction, [target], [], target, norm)


@check
def loss_and_gradient_of_stored_codes() -> None:
    from anycontrast_kernels import triton_patch_loss

    for patch, (dtype, norm) in product(
        ((8, 8, 5), (2, 4, 8)),
        ((torch.float32, True), (torch.float16, False), (torch.bfloat16, True)),
    ):
        target = volumes(patch, whole=False, flips=FLIPS[2::3])
        known = reference.gather_zscores(*target, patch)
        generator = torch.Generator().manual_seed(2)
        prediction = torch.randn(known.shape, generator=generator).to(dtype)
        compare(triton_patch_loss, prediction, list(target), list(patch), known, norm)


def compare(
    kernels: LossKernels,
    prediction: Tensor,
    target: list[Tensor],
    patch: list[int],
    known: Tensor,
    norm: bool,
) -> None:
    """Hold error, difference and gradient against autograd through the plain definition."""
    leaf = prediction.float().requires_grad_()
    expected = reference.patch_mse(leaf, known, norm_target=norm)
    factor = torch.linspace(-1, 2, len(leaf))
    (gradient,) = torch.autograd.grad(expected, leaf, factor)
    atol = ATOL[prediction.dtype]
    for over in (False, True):
        kept = prediction.clone() if over else torch.full_like(prediction, float("nan"))
        source = kept if over else prediction
        found = kernels.loss_pass(source, target, patch, norm, kept)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
        out = kept if over else torch.full_like(prediction, float("nan"))
        kernels.scale_rows(kept, factor, out)
        torch.testing.assert_close(out.float(), gradient, rtol=atol * 2, atol=atol * 0.1)
    untouched = prediction.clone()
    found = kernels.loss_pass(untouched, target, patch, norm, None)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(untouched, prediction)


@check
def the_checked_entries_run_the_kernels_when_ordered() -> None:
    patch = (4, 2, 5)
    target = volumes(patch, whole=False, flips=FLIPS[:2])
    known = reference.gather_zscores(*target, patch)
    assert torch.allclose(patchify.gather_zscores(*target, patch), known, atol=2e-6)
    weight = torch.randn(6, known.shape[1], generator=torch.Generator().manual_seed(0))
    x = torch.randn(len(known), 6, generator=torch.Generator().manual_seed(1))
    for norm, over in product((False, True), repeat=2):
        leaf = weight.clone().requires_grad_()
        loss = patch_loss.stored_patch_mse(
            x @ leaf, *target, patch, norm_target=norm, overwrite_prediction=over
        )
        (found,) = torch.autograd.grad(loss.sum(), leaf)
        plain = reference.patch_mse(x @ leaf, known, norm_target=norm)
        (expected,) = torch.autograd.grad(plain.sum(), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@check
def nothing_to_do_is_done() -> None:
    from anycontrast_kernels import triton_patch_loss, triton_patchify

    codes, start, shape, flip, intensity, volume, grid = volumes((2, 2, 4), whole=True)
    target = (codes, start, shape, flip, intensity, volume[:0], grid[:0])
    assert triton_patchify.gather_zscores(*target, (2, 2, 4)).shape == (0, 16)
    empty = torch.empty(0, 16)
    assert triton_patch_loss.loss_pass(empty, list(target), [2, 2, 4], True, empty).shape == (0,)
    triton_patch_loss.scale_rows(empty, torch.empty(0), empty)


def run_checks() -> Iterator[tuple[str, str]]:
    """Run every check with uninitialised memory full of NaN; yields (name, error or nothing)."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    for name, function in CHECKS.items():
        try:
            function()
            yield name, ""
        except Exception:
            yield name, traceback.format_exc()


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """What the interpreter's process says about every check."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "ANYCONTRAST_KERNELS": "triton",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", list(CHECKS))
def test_interpreted(errors: dict[str, str], name: str) -> None:
    assert not errors[name], errors[name]


def test_stored_codes_and_predictions_are_read_and_written_16_bytes_at_a_time() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anycontrast_kernels import triton_patch_loss

    kernel, types, constexprs, multiples, options = next(
        case for case in triton_patch_loss.COMPILE_CASES if case[0].arg_names[1] == "codes"
    )
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constexprs.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    # 4096 voxels in 128 threads: 32 codes and 32 predictions of 2 bytes each, 8 at a time.
    assert ptx.count("ld.global.v4.b32") == 8
    assert ptx.count("st.global.v4.b32") == 4
    assert "st.local" not in ptx


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(run_checks())))
