"""Dice by hand, its convention for empty ground truth, and bootstrap intervals."""

import math

import numpy as np
import pytest

from anycontrast.evaluation.metrics import bootstrap_mean, dice, dice_per_region


def mask(*voxels: int, size: int = 8) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    out = np.zeros(size, dtype=np.bool_)
    out[list(voxels)] = True
    return out


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (mask(0, 1, 2), mask(1, 2, 3), 2 * 2 / 6),
        (mask(0, 1), mask(0, 1), 1.0),
        (mask(0, 1), mask(2, 3), 0.0),
        (mask(0), mask(0, 1, 2), 2 * 1 / 4),
        (mask(), mask(4), 0.0),
    ],
)
def test_dice_equals_the_hand_computed_value(
    prediction: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    truth: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    expected: float,
) -> None:
    assert dice(prediction, truth) == pytest.approx(expected)


def test_empty_truth_gives_one_only_for_an_empty_prediction() -> None:
    assert dice(mask(), mask()) == 1.0
    assert dice(mask(3), mask()) == 0.0


def test_empty_truth_can_be_left_out_as_nan() -> None:
    assert math.isnan(dice(mask(), mask(), empty_truth="nan"))
    assert math.isnan(dice(mask(3), mask(), empty_truth="nan"))
    assert dice(mask(), mask(3), empty_truth="nan") == 0.0


def test_masks_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        dice(mask(size=8), mask(size=9))


def test_regions_may_overlap_and_the_threshold_is_strict() -> None:
    label = np.zeros((2, 2, 2), dtype=np.uint8)
    label[0, 0] = (1, 2)
    probability = np.zeros((2, 2, 2, 2), dtype=np.float32)
    probability[0, 0, 0] = (0.9, 0.5)
    probability[1, 0, 0, 0] = 0.6
    scores = dice_per_region(probability, label, {"whole": [1, 2], "core": [1]})
    # `whole`: one of two voxels above 0.5 (0.5 itself is not), 2 * 1 / (1 + 2).
    assert scores == {"whole": pytest.approx(2 / 3), "core": 1.0}


def test_a_channel_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="2 regions"):
        dice_per_region(
            np.zeros((1, 2, 2, 2), dtype=np.float32),
            np.zeros((2, 2, 2), dtype=np.uint8),
            {"a": [1], "b": [2]},
        )


def test_bootstrap_brackets_the_mean_and_repeats_with_its_seed() -> None:
    values = [0.1, 0.4, 0.5, 0.9, float("nan")]
    first = bootstrap_mean(values, num_bootstrap=500, seed=3)
    assert first == bootstrap_mean(values, num_bootstrap=500, seed=3)
    assert first.mean == pytest.approx(0.475)
    assert first.num_studies == 4
    assert 0.1 <= first.low < first.mean < first.high <= 0.9


def test_bootstrap_of_equal_values_has_no_width_and_of_none_no_number() -> None:
    same = bootstrap_mean([0.5, 0.5, 0.5], num_bootstrap=100, seed=0)
    assert (same.low, same.high) == (0.5, 0.5)
    empty = bootstrap_mean([float("nan")], num_bootstrap=100, seed=0)
    assert math.isnan(empty.mean)
    assert empty.num_studies == 0


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap_mean(
            list(rng.normal(0.6, 0.1, size=40)), num_bootstrap=200, seed=trial
        )
        covered += interval.low <= 0.6 <= interval.high
    assert 175 <= covered <= 200
