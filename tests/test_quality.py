"""Quality numbers and flags: percentiles, noise, emptiness, ghosts."""

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.quality import Quality, measure_quality
from anycontrast_datasets.work_copy import make_work_copy

FloatArray = npt.NDArray[np.float32]
SHAPE = (70, 84, 60)


def picture(sigma: float = 10.0) -> FloatArray:
    """An ellipsoid with structure, with the noise of a magnitude image."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    radius = np.sqrt(sum((axis / 0.62) ** 2 for axis in axes))
    image = np.where(radius < 1, 500 + 200 * np.sin(9 * axes[0]) * np.cos(8 * axes[1]), 0.0)
    noise = np.random.default_rng(0).normal(0, sigma, (2, *SHAPE))
    magnitude: FloatArray = np.hypot(image + noise[0], noise[1]).astype(np.float32)
    return magnitude


def moved(array: FloatArray, axis: int = 1) -> FloatArray:
    """The same with phase errors in a third of the lines of k-space along one axis."""
    rng = np.random.default_rng(1)
    count = array.shape[axis]
    errors = rng.normal(0, 2.0, count) * (rng.random(count) < 0.33)
    turned = np.exp(-2j * np.pi * np.fft.fftfreq(count) * errors)
    shape = [count if k == axis else 1 for k in range(3)]
    lines = np.fft.fft(array, axis=axis) * turned.reshape(shape)
    return np.abs(np.fft.ifft(lines, axis=axis)).astype(np.float32)


def measure(array: FloatArray) -> Quality:
    return measure_quality(make_work_copy(array, (3.0, 3.0, 3.0)))


@pytest.mark.parametrize("sigma", [5.0, 20.0])
def test_noise_of_a_magnitude_image_is_found(sigma: float) -> None:
    found = measure(picture(sigma)).noise_sigma
    assert found == pytest.approx(sigma, rel=0.05)


def test_noise_of_a_signed_image_is_found_and_a_blank_background_has_none() -> None:
    signed = picture(0.0) + np.random.default_rng(2).normal(0, 15, SHAPE).astype(np.float32)
    assert measure(signed).noise_sigma == pytest.approx(15, rel=0.05)
    assert measure(picture(0.0)).noise_sigma is None


def test_percentiles_are_those_of_the_foreground() -> None:
    found = measure(picture()).intensity
    assert found is not None
    low, middle, high = found
    assert 200 < low < middle < high < 800
    assert measure(picture() * 10).intensity == pytest.approx((10 * low, 10 * middle, 10 * high))


@pytest.mark.parametrize("axis", [0, 1])
def test_ghosts_of_motion_are_flagged_and_plain_noise_is_not(axis: int) -> None:
    assert measure(picture()).flags == ()
    assert measure(picture(40.0)).flags == ()
    assert measure(moved(picture(), axis)).flags == ("motion_like",)


def test_a_nearly_empty_picture_is_flagged() -> None:
    array = np.zeros(SHAPE, dtype=np.float32)
    assert measure(array) == Quality(flags=("nearly_empty",))
    array[30:34, 30:34, 30:34] = 100.0
    assert "nearly_empty" in measure(array).flags
