"""Mixing weights: they multiply, unknown names are refused, equal on every machine."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.manifest import contrast_set
from anycontrast_datasets.mixing import (
    MixingConfig,
    contrast_set_name,
    mix_shares,
    strata,
    study_weights,
)
from anycontrast_datasets.study import ManifestError

NAMES = ("brats", "isles")
SETS = [("T1w",), ("T1w", "FLAIR"), ("SWI",), ("FLAIR", "DWI")]


def columns() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Six studies of brats and two of isles."""
    dataset_N = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    names = [SETS[n] for n in (0, 0, 0, 1, 1, 2, 3, 3)]
    return dataset_N, np.array([contrast_set(one) for one in names], dtype=np.uint64)


def weights(**values: Any) -> list[float]:
    found = study_weights(MixingConfig(**values), NAMES, *columns())
    return [float(weight) for weight in found]


def test_weights_of_dataset_contrast_and_set_multiply() -> None:
    assert weights(by_dataset={"isles": 3.0}) == [1, 1, 1, 1, 1, 1, 3, 3]
    assert weights(by_contrast_set={"FLAIR+T1w": 2.0, "SWI": 0.0}) == [1, 1, 1, 2, 2, 0, 1, 1]
    found = weights(
        by_dataset={"brats": 2.0}, by_contrast={"SWI": 5.0}, by_contrast_set={"SWI": 3.0}
    )
    assert found == [2, 2, 2, 2, 2, 30, 1, 1]


def test_the_most_wanted_contrast_of_a_study_counts() -> None:
    # {T1w} alone is left out; {T1w, FLAIR} still has FLAIR, which nobody voted down.
    assert weights(by_contrast={"T1w": 0.0}) == [0, 0, 0, 1, 1, 1, 1, 1]
    assert weights(by_contrast={"T1w": 0.5, "FLAIR": 4.0}) == [0.5, 0.5, 0.5, 4, 4, 1, 4, 4]


def test_temperature_flattens_the_sizes_of_datasets() -> None:
    dataset_N, _ = columns()
    for temperature, ratio in ((1.0, 3.0), (2.0, 3.0**0.5), (1e9, 1.0)):
        shares = np.bincount(dataset_N, weights=weights(temperature=temperature))
        assert shares[0] / shares[1] == pytest.approx(ratio)


def test_weights_are_short_decimals() -> None:
    # The last bits of a power differ between machines, and with them would the order.
    assert weights(temperature=3.0)[0] == float(f"{6 ** (-2 / 3):.12g}")


def test_strata_keep_datasets_together() -> None:
    dataset_N, set_N = columns()
    groups = strata(dataset_N, set_N)
    assert len(np.unique(groups)) == 4
    assert groups[:6].max() < groups[6:].min()


def test_a_set_is_named_in_vocabulary_order() -> None:
    assert contrast_set_name(contrast_set(("FLAIR", "T1w"))) == "T1w+FLAIR"


def test_shares_count_every_place() -> None:
    shares = mix_shares(NAMES, *columns())
    assert shares["dataset/brats"] == 6 / 8
    assert shares["contrast/FLAIR"] == 4 / 8
    assert shares["set/T1w+FLAIR"] == 2 / 8
    assert sum(value for name, value in shares.items() if name.startswith("set/")) == 1


def test_an_unknown_dataset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ManifestError, match=r"'Brats'; did you mean 'brats'.* brats, isles"):
        weights(by_dataset={"Brats": 2.0})


def test_all_weights_zero_leave_nothing() -> None:
    with pytest.raises(ManifestError, match="every study has weight 0"):
        weights(by_dataset={"brats": 0.0, "isles": 0.0})


def test_a_weight_without_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        weights(by_contrast={"ADC": 2.0, "T1w": 2.0}, by_contrast_set={"T1w+SWI": 3.0})
    assert "no study has the contrasts ADC, T1w+SWI;" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"by_dataset": {"x": -1.0}}, "by_dataset.x must be finite and >= 0, got -1.0"),
        ({"by_contrast": {"T1x": 1.0}}, r"mixing\.by_contrast: .T1x.*T1w"),
        ({"by_contrast_set": {"T1w+FLIAR": 1.0}}, r"mixing\.by_contrast_set: .*FLIAR.*FLAIR"),
        ({"by_contrast": {"T1w+T2w": 1.0}}, r"mixing\.by_contrast: "),
        ({"by_contrast_set": {"T1w+FLAIR": 1.0, "FLAIR+T1w": 2.0}}, "FLAIR.* twice"),
    ],
)
def test_bad_weights_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixingConfig(**values)
