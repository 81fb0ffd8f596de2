"""Foreground, percentiles, codes and occupancy: what the fast paths must not change."""

import base64

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.foreground import foreground_mask
from anycontrast_datasets.intensity import (
    MAX_CODE,
    encode,
    pack_occupancy,
    tail_percentiles,
    unpack_occupancy,
)
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


@pytest.mark.parametrize("gain", [1e-3, 1.0, 1e6])
def test_codes_are_the_nearest_and_the_statistics_are_exact(gain: float) -> None:
    values = (SAMPLES["normal"][: int(np.prod(SHAPE))].reshape(SHAPE) * gain).astype(np.float32)
    mask = RNG.random(SHAPE) < 0.6
    coded = encode(values, mask, "T1w")
    inside = values[mask].astype(np.float64)
    clipped = np.clip(inside, coded.p0_5, coded.p99_5)
    assert coded.mean == pytest.approx(clipped.mean(), rel=1e-6)
    assert coded.std == pytest.approx(clipped.std(), rel=1e-5)
    assert np.array_equal(coded.codes != 0, mask)
    assert coded.codes[mask].min() == 1 and coded.codes.max() <= MAX_CODE
    back = coded.codes[mask] * coded.scale + coded.offset
    kept = inside <= coded.scale * MAX_CODE + coded.offset
    assert np.abs(back - inside)[kept].max() <= 0.501 * coded.scale


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
