import numpy as np
import pytest
import torch

from anycontrast_kernels.patch_loss import denormalize_patches, normalize_patches, patch_mse


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
