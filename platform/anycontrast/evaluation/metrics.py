"""Dice, with one stated convention for empty ground truth, and intervals over studies.

Convention (`one_if_empty`): when a study's ground truth holds no voxel of a region, Dice is 1 if
the prediction is empty too and 0 otherwise, so a false alarm costs what a miss costs. `nan`
reproduces tools that leave such studies out of the mean. Every table says which one it used.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

EmptyTruth = Literal["one_if_empty", "nan"]

EMPTY_TRUTH_NOTE: dict[str, str] = {
    "one_if_empty": "empty ground truth: Dice 1 if the prediction is empty, else 0",
    "nan": "empty ground truth: the study is left out of the mean",
}


class Interval(NamedTuple):
    """A mean over studies with its bootstrap interval; NaN where nothing could be computed."""

    mean: float
    low: float
    high: float
    num_studies: int


def dice(
    prediction: npt.NDArray[np.bool_],
    truth: npt.NDArray[np.bool_],
    *,
    empty_truth: EmptyTruth = "one_if_empty",
) -> float:
    """Return 2 |A and B| / (|A| + |B|) of two masks.

    Args:
        prediction: mask of any shape.
        truth: mask of the same shape.
        empty_truth: what an empty `truth` gives, see the module's docstring.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"computing Dice: both masks must have one shape, got {prediction.shape} for the "
            f"prediction and {truth.shape} for the ground truth"
        )
    num_truth = int(np.count_nonzero(truth))
    num_prediction = int(np.count_nonzero(prediction))
    if num_truth == 0:
        if empty_truth == "nan":
            return float("nan")
        return 1.0 if num_prediction == 0 else 0.0
    num_both = int(np.count_nonzero(np.logical_and(prediction, truth)))
    return 2.0 * num_both / (num_prediction + num_truth)


def dice_per_region(
    probability_RXYZ: npt.NDArray[np.float32],
    label_XYZ: npt.NDArray[np.uint8],
    regions: Mapping[str, Sequence[int]],
    *,
    threshold: float = 0.5,
    empty_truth: EmptyTruth = "one_if_empty",
) -> dict[str, float]:
    """Return the Dice of every region of one study.

    Args:
        probability_RXYZ: [R, X, Y, Z], regions in the mapping's order.
        label_XYZ: [X, Y, Z] label values, 0 background.
        regions: region name -> label values.
        threshold: a voxel is predicted where its probability is above this.
        empty_truth: see `dice`.

    Raises:
        ValueError: the number of channels is not the number of regions, or shapes differ.
    """
    if probability_RXYZ.shape[0] != len(regions):
        raise ValueError(
            f"computing Dice per region: {len(regions)} regions need as many channels, "
            f"got {probability_RXYZ.shape[0]}"
        )
    return {
        name: dice(
            probability_XYZ > threshold, np.isin(label_XYZ, list(values)), empty_truth=empty_truth
        )
        for probability_XYZ, (name, values) in zip(probability_RXYZ, regions.items(), strict=True)
    }


def bootstrap_mean(values: Sequence[float], *, num_bootstrap: int, seed: int) -> Interval:
    """Return the mean over studies and its 95 % percentile bootstrap interval.

    Args:
        values: one number per study; NaN entries are left out.
        num_bootstrap: resamples; 0 gives NaN bounds.
        seed: of the resampling; the same values and seed give the same interval.
    """
    finite = np.asarray([v for v in values if not np.isnan(v)], dtype=np.float64)
    if finite.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(finite.mean())
    if num_bootstrap == 0:
        return Interval(mean, float("nan"), float("nan"), int(finite.size))
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, finite.size, size=(num_bootstrap, finite.size))
    low, high = np.percentile(finite[picks].mean(axis=1), (2.5, 97.5))
    return Interval(mean, float(low), float(high), int(finite.size))
