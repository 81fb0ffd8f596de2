import numpy as np
import pytest
import torch

from anycontrast_kernels import fused, loss_pass, reference
from anycontrast_kernels.patch_loss import (
    denormalize_patches,
    normalize_patches,
    patch_mse,
    stored_patch_mse,
)
from anycontrast_kernels.patchify import gather_zscores
from anycontrast_kernels.probes import loss_error, packed_volumes


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 24, generator=generator) * 3 + 2
    return torch.randn(5, 24, generator=generator), target


def test_plain_error_is_the_mean_square_of_each_patch() -> None:
    prediction, target = draw()
    expected = ((prediction.numpy() - target.numpy()) ** 2).mean(axis=1)
    found = patch_mse(prediction, target, norm_target=False)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_normalised_error_uses_the_unbiased_variance_plus_1e_6() -> None:
    prediction, target = draw()
    t = target.double().numpy()
    normalised = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, ddof=1, keepdims=True) + 1e-6)
    expected = ((prediction.double().numpy() - normalised) ** 2).mean(axis=1)
    np.testing.assert_allclose(
        patch_mse(prediction, target, norm_target=True).numpy(), expected, rtol=1e-5
    )
    np.testing.assert_allclose(normalize_patches(target).numpy(), normalised, atol=1e-5)


def test_normalised_target_does_not_see_brightness_or_contrast() -> None:
    prediction, target = draw()
    found = patch_mse(prediction, 5.0 * target - 7.0, norm_target=True)
    torch.testing.assert_close(
        found, patch_mse(prediction, target, norm_target=True), rtol=1e-4, atol=1e-5
    )


def test_a_constant_patch_stays_finite_and_normalises_to_zero() -> None:
    target = torch.full((2, 24), -1.5)
    assert torch.equal(normalize_patches(target), torch.zeros(2, 24))
    assert bool(patch_mse(torch.zeros(2, 24), target, norm_target=True).isfinite().all())


def test_denormalising_undoes_normalising() -> None:
    _, target = draw()
    torch.testing.assert_close(denormalize_patches(normalize_patches(target), target), target)


def test_half_precision_predictions_are_compared_in_float32() -> None:
    prediction, target = draw()
    half = prediction.bfloat16()
    found = patch_mse(half, target, norm_target=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, patch_mse(half.float(), target, norm_target=False))


def test_gradient_is_twice_the_difference_over_the_voxels() -> None:
    prediction, target = draw()
    prediction.requires_grad_()
    torch.autograd.backward(patch_mse(prediction, target, norm_target=False).sum())
    torch.testing.assert_close(prediction.grad, 2 * (prediction.detach() - target) / 24)


def test_bad_arguments_are_named() -> None:
    prediction, target = draw()
    with pytest.raises(TypeError, match="prediction_NP must be floating"):
        patch_mse(prediction.long(), target, norm_target=False)
    with pytest.raises(TypeError, match="target_NP must be floating"):
        patch_mse(prediction, target.short(), norm_target=False)
    with pytest.raises(ValueError, match="one shape"):
        patch_mse(prediction[:4], target, norm_target=False)
    with pytest.raises(ValueError, match="one device"):
        patch_mse(prediction.to("meta"), target, norm_target=False)
    with pytest.raises(ValueError, match=r"target_NP must be \[N, P\]"):
        patch_mse(prediction[0], target[0], norm_target=False)
    with pytest.raises(ValueError, match="2 voxels or more"):
        patch_mse(prediction[:, :1], target[:, :1], norm_target=True)
    with pytest.raises(ValueError, match="one shape"):
        denormalize_patches(prediction[:4], target)


PATCH = (2, 3, 4)


def weights_gradient(
    norm_target: bool, overwrite: bool, *, stored: bool, repeat: int = 1
) -> torch.Tensor:
    """Gradient of a layer that predicts patches of packed volumes, by the loss of their errors."""
    packed = packed_volumes(PATCH, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 24, generator=generator).requires_grad_()
    prediction = torch.randn(6, 5, generator=generator) @ weight
    if stored:
        loss = stored_patch_mse(
            prediction, *packed, PATCH, norm_target=norm_target, overwrite_prediction=overwrite
        )
    else:
        target = gather_zscores(*packed, PATCH)
        loss = patch_mse(
            prediction, target, norm_target=norm_target, overwrite_prediction=overwrite
        )
    for _ in range(repeat):
        weight.grad = None
        torch.autograd.backward(loss, torch.linspace(0.5, 2, 6), retain_graph=repeat > 1)
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("norm_target", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_gradient_is_that_of_the_definition_beside_and_over_the_prediction(
    norm_target: bool, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_pass, "CPU_PIECE_VOX", 2 * 24)  # two patches at a time
    packed = packed_volumes(PATCH, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 24, generator=generator).requires_grad_()
    prediction = torch.randn(6, 5, generator=generator) @ weight
    expected = reference.patch_mse(
        prediction, reference.gather_zscores(*packed, PATCH), norm_target=norm_target
    )
    torch.autograd.backward(expected, torch.linspace(0.5, 2, 6))
    for overwrite in (False, True):
        found = weights_gradient(norm_target, overwrite, stored=stored)
        torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-5)


def test_a_prediction_is_lost_only_where_that_was_ordered_and_a_gradient_is_due() -> None:
    _, target = draw()
    weight = torch.randn(3, 24, requires_grad=True)
    prediction = torch.randn(5, 3) @ weight
    before = prediction.detach().clone()
    patch_mse(prediction, target, norm_target=True)
    with torch.no_grad():
        patch_mse(prediction, target, norm_target=True, overwrite_prediction=True)
    assert torch.equal(prediction, before)
    patch_mse(prediction, target, norm_target=True, overwrite_prediction=True)
    torch.testing.assert_close(prediction.detach(), before - normalize_patches(target))


def test_the_backward_pass_over_a_prediction_runs_once_and_the_other_as_often_as_wanted() -> None:
    once = weights_gradient(True, False, stored=True)
    assert torch.equal(weights_gradient(True, False, stored=True, repeat=2), once)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weights_gradient(True, True, stored=True, repeat=2)


def test_a_prediction_that_its_maker_needs_back_cannot_be_overwritten_unnoticed() -> None:
    _, target = draw()
    prediction = torch.randn(5, 24, requires_grad=True).tanh()
    loss = patch_mse(prediction, target, norm_target=False, overwrite_prediction=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [(24,), PATCH])
def test_the_plain_pass_agrees_with_the_definition(
    dtype: torch.dtype, patch: tuple[int, ...]
) -> None:
    error = loss_error(loss_pass, patch, torch.device("cpu"), dtype)
    assert error <= fused.PROBE_TOLERANCE[dtype]


# Torch's own tracer instantiates the class it warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_step_has_no_graph_break() -> None:
    packed = packed_volumes(PATCH, torch.device("cpu"))
    x = torch.randn(6, 5)

    def step(weight: torch.Tensor, overwrite: bool) -> torch.Tensor:
        loss = stored_patch_mse(
            x @ weight, *packed, PATCH, norm_target=True, overwrite_prediction=overwrite
        )
        return loss.sum()

    weight = torch.randn(5, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(step(weight, False), weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for overwrite in (False, True):
        (found,) = torch.autograd.grad(compiled(weight, overwrite), weight)
        torch.testing.assert_close(found, expected)


def test_bad_layouts_and_stored_targets_are_named() -> None:
    prediction, target = draw()
    with pytest.raises(ValueError, match=r"prediction_NP must be contiguous.*\(1, 5\)"):
        patch_mse(prediction.T.contiguous().T, target, norm_target=False)
    with pytest.raises(ValueError, match="target_NP must be contiguous"):
        patch_mse(prediction, target.T.contiguous().T, norm_target=False)
    with pytest.raises(ValueError, match="target_NP must not require a gradient"):
        patch_mse(prediction, target.requires_grad_(), norm_target=False)
    leaf = prediction.clone().requires_grad_()
    with pytest.raises(ValueError, match="prediction_NP is a leaf"):
        patch_mse(leaf, target.detach(), norm_target=False, overwrite_prediction=True)
    packed = packed_volumes(PATCH, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"prediction_NP must be \(6, 24\)"):
        stored_patch_mse(prediction, *packed, PATCH, norm_target=True)
    with pytest.raises(TypeError, match="codes_B must be int16"):
        stored_patch_mse(
            torch.zeros(6, 24), packed[0].float(), *packed[1:], PATCH, norm_target=True
        )
    with pytest.raises(ValueError, match="must lie on cpu"):
        stored_patch_mse(torch.zeros(6, 24, device="meta"), *packed, PATCH, norm_target=True)
    with pytest.raises(ValueError, match="2 voxels or more"):
        stored_patch_mse(torch.zeros(6, 1), *packed, (1, 1, 1), norm_target=True)
    with pytest.raises(ValueError, match="grid_N3 must be contiguous"):
        grid = packed[6].T.contiguous().T
        stored_patch_mse(torch.zeros(6, 24), *packed[:6], grid, PATCH, norm_target=True)
