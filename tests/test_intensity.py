"""Foreground, percentiles, codes and occupancy: what the fast paths must not change."""

import base64
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.foreground import foreground_mask
from anycontrast_datasets.intensity import (
    MAX_CODE,
    MIN_CODES,
    CodedVolume,
    encode,
    noise_sigma,
    pack_occupancy,
    tail_percentiles,
    unpack_occupancy,
)
from anycontrast_datasets.store.codec import encode as encode_frame
from anycontrast_datasets.study import ShardError

SHAPE = (40, 41, 43)
RNG = np.random.default_rng(5)
SAMPLES = {
    "normal": RNG.normal(300, 40, size=200_003),
    "whole numbers": RNG.integers(0, 40, size=100_000),
    "heavy tail": RNG.lognormal(0, 3, size=150_001),
    "mostly one value": np.r_[np.zeros(300_000), RNG.normal(size=1000)],
    "sorted": np.arange(100_000)[::-1],
    "periodic as the sample": np.tile([0.0] * 7 + [1e4], 60_000),
    "few": RNG.normal(size=9),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_percentiles_are_those_of_a_full_sort(name: str) -> None:
    values = SAMPLES[name].astype(np.float32)
    percents = (0.0, 0.5, 30.0, 70.0, 99.5, 99.95, 100.0)
    expected = np.percentile(values.astype(np.float64), percents)
    assert tail_percentiles(values, percents) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("codes_per_noise", [None, 16.0, 100.0])
@pytest.mark.parametrize("gain", [1e-3, 1.0, 1e6])
def test_codes_are_the_nearest_and_the_statistics_are_exact(
    gain: float, codes_per_noise: float | None
) -> None:
    values = (SAMPLES["normal"][: int(np.prod(SHAPE))].reshape(SHAPE) * gain).astype(np.float32)
    mask = RNG.random(SHAPE) < 0.6
    coded = encode(values, mask, "T1w", codes_per_noise)
    inside = values[mask].astype(np.float64)
    clipped = np.clip(inside, coded.p0_5, coded.p99_5)
    assert coded.mean == pytest.approx(clipped.mean(), rel=1e-6)
    assert coded.std == pytest.approx(clipped.std(), rel=1e-5)
    assert np.array_equal(coded.codes != 0, mask)
    assert coded.codes[mask].min() == 1 and coded.codes.max() <= MAX_CODE
    assert (coded.codes.max() == MAX_CODE) == (codes_per_noise is None)
    kept = inside <= coded.scale * coded.codes.max() + coded.offset
    assert np.count_nonzero(~kept) <= 0.001 * inside.size
    assert np.abs(restored(coded)[mask] - inside)[kept].max() <= 0.501 * coded.scale


def restored(coded: CodedVolume) -> npt.NDArray[np.float64]:
    return np.asarray(coded.codes * coded.scale + coded.offset, dtype=np.float64)


def smooth_head(sigma: float, shape: tuple[int, int, int] = (64, 72, 60)) -> tuple[Any, Any]:
    """A head of smooth tissue with a few edges, Rician noise of `sigma` on it, and its mask."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    tissue = 200 + 60 * np.sin(4 * x) * np.cos(3 * y + z) + 80 * (np.hypot(x, z) < 0.4)
    noise = np.random.default_rng(7).normal(0, sigma, (2, *shape))
    image = np.hypot(tissue + noise[0], noise[1]).astype(np.float32)
    return image, x**2 + y**2 + z**2 < 0.9


@pytest.mark.parametrize("sigma", [1.0, 6.0, 20.0])
def test_noise_of_a_head_is_found_and_sets_the_step(sigma: float) -> None:
    image, mask = smooth_head(sigma)
    assert noise_sigma(image, mask) == pytest.approx(sigma, rel=0.1)
    coded = encode(image, mask, "T1w")
    assert coded.scale == pytest.approx(sigma / 16, rel=0.1)
    kept = mask & (coded.codes < coded.codes.max())
    error = (restored(coded) - image)[kept]
    assert np.abs(error).max() <= 0.501 * coded.scale
    assert np.sqrt(np.mean(error**2)) == pytest.approx(0.018 * sigma, rel=0.1)


def test_noise_that_was_smoothed_away_gives_finer_steps_not_coarser() -> None:
    image, mask = smooth_head(20.0)
    smoothed = (image[:, 1:] + image[:, :-1]) / 2
    assert noise_sigma(smoothed, mask[:, 1:]) < 0.75 * noise_sigma(image, mask)


@pytest.mark.parametrize("case", ["map", "no noise", "thin", "off"])
def test_twelve_bits_where_noise_may_not_decide(case: str) -> None:
    image, mask = smooth_head(0.0 if case == "no noise" else 20.0)
    if case == "thin":
        image, mask = image[..., :1], mask[..., 30:31]
    contrast = "ADC" if case == "map" else "T1w"
    coded = encode(image, mask, contrast, None if case == "off" else 16.0)
    assert coded.codes.max() == MAX_CODE


def test_pure_noise_still_has_its_256_codes() -> None:
    values = RNG.normal(0, 1, SHAPE).astype(np.float32)
    coded = encode(values, np.ones(SHAPE, dtype=np.bool_), "T1w", 1.0)
    assert coded.codes.max() == MIN_CODES


@pytest.mark.parametrize(("slope", "start"), [(1.0, 0), (2.0078, -1000), (1e-3, 7)])
def test_coarse_integers_of_the_source_come_back_exactly(slope: float, start: int) -> None:
    image, mask = smooth_head(1.0)
    numbers = np.rint(image).astype(np.int64) + start
    values = (numbers * slope).astype(np.float32)
    coded = encode(values, mask, "T1w")
    assert coded.scale == pytest.approx(slope, rel=1e-6)
    kept = mask & (coded.codes < coded.codes.max())
    first = numbers[mask].min()
    assert np.array_equal(coded.codes[kept], numbers[kept] - first + 1)
    off_grid = encode(
        values + np.float32(slope / 3) * (RNG.random(values.shape) < 0.5), mask, "T1w"
    )
    assert off_grid.scale < 0.5 * slope


def test_fine_integers_are_rounded_as_any_value() -> None:
    image, mask = smooth_head(20.0)
    coded = encode(np.rint(image * 8), mask, "T1w")
    assert coded.scale == pytest.approx(8 * 20 / 16, rel=0.1)


def test_codes_depend_on_nothing_but_the_voxels() -> None:
    image, mask = smooth_head(6.0)
    codes = encode(image, mask, "T1w").codes
    assert np.array_equal(encode(np.asfortranarray(image), mask, "T1w").codes, codes)
    digest = hashlib.sha256(encode_frame(codes)).hexdigest()
    assert hashlib.sha256(encode_frame(encode(image, mask, "T1w").codes)).hexdigest() == digest


def ball(radius: float) -> npt.NDArray[np.bool_]:
    axes = [np.arange(n) - (n - 1) / 2 for n in SHAPE]
    return np.asarray(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) < radius**2)


def test_stripped_brain_keeps_its_voxels_and_its_holes_but_no_speck() -> None:
    head = ball(17)
    image = np.where(head, 100.0, 0.0).astype(np.float32)
    image[ball(5)] = 0
    image[:2, :2, :2] = 50
    mask = foreground_mask(image, (1.0, 1.0, 1.0))
    assert np.array_equal(mask, head)


def test_a_dent_in_a_stripped_brain_is_no_hole() -> None:
    image = np.where(ball(17), 100.0, 0.0).astype(np.float32)
    image[18:22, 19:23, 20:] = 0
    mask = foreground_mask(image, (1.0, 1.0, 1.0))
    assert np.array_equal(mask, image != 0)


def test_occupancy_comes_back_and_is_held_against_the_shape() -> None:
    shape = (24, 16, 40)
    codes = ((RNG.random(shape) < 0.002) * -5).astype(np.int16)
    blocks = (codes != 0).reshape(3, 8, 2, 8, 5, 8).any(axis=(1, 3, 5))
    text = pack_occupancy(codes)
    assert np.array_equal(unpack_occupancy(text, shape), blocks) and blocks.any()
    assert not blocks.all()
    assert pack_occupancy(codes.transpose(0, 1, 2)[::1].copy(order="F")) == text


@pytest.mark.parametrize(
    "text", ["", base64.b64encode(bytes(3)).decode(), base64.b64encode(bytes(5)).decode(), "?!"]
)
def test_occupancy_of_another_length_is_refused(text: str) -> None:
    with pytest.raises(ShardError, match="occupancy"):
        unpack_occupancy(text, (24, 16, 40))
