"""The phantom's plan: which contrasts and lesions a study gets, and which settings are refused."""

from dataclasses import replace

import pytest

from anycontrast_datasets.sources.phantom_config import (
    PHANTOM_CONTRASTS,
    PhantomConfig,
    plan_study,
)

SMALL = PhantomConfig(num_studies=4, always=["DWI"], num_sites=2)


def test_a_study_does_not_depend_on_how_many_there_are() -> None:
    longer = replace(SMALL, num_studies=100)
    assert [plan_study(SMALL, i) for i in range(4)] == [plan_study(longer, i) for i in range(4)]


def test_subset_sizes_run_from_one_to_all() -> None:
    config = PhantomConfig(num_studies=200)
    subsets = [plan_study(config, index).contrasts for index in range(200)]
    assert {len(subset) for subset in subsets} == set(range(1, 9))
    for contrast in PHANTOM_CONTRASTS:
        assert 20 < sum(contrast in subset for subset in subsets) < 200


def test_always_holds_and_zero_probability_excludes() -> None:
    config = PhantomConfig(always=["ADC"], keep_probability={"T2w": 0.5, "SWI": 0.0})
    subsets = {plan_study(config, index).contrasts for index in range(60)}
    assert subsets == {("ADC",), ("T2w", "ADC")}


def test_a_study_is_never_empty() -> None:
    config = PhantomConfig(keep_probability={"T2w": 0.001, "SWI": 0.0})
    assert {plan_study(config, index).contrasts for index in range(30)} == {("T2w",)}


def test_lesion_shares_follow_the_configuration() -> None:
    kinds = [plan_study(PhantomConfig(infarct_fraction=0.25), i).lesion for i in range(400)]
    assert kinds.count("") == pytest.approx(80, abs=30)
    assert kinds.count("infarct") == pytest.approx(80, abs=30)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"num_studies": 0}, "num_studies must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"always": ["FLIAR"]}, "nearest: FLAIR"),
        ({"keep_probability": {"CT": 0.5}}, "'CT' is none of"),
        ({"keep_probability": {"T1w": 1.5}}, "keep_probability.T1w must lie in 0 .. 1"),
        ({"keep_probability": {"T1w": 0.0}}, "no study would have a volume"),
        ({"spacing_mm": (3.0, 3.0, 0.0)}, "spacing_mm must lie in"),
        ({"spacing_mm": (3.0, 3.0, float("nan"))}, "spacing_mm must lie in"),
        ({"lesion_fraction": 1.2}, "lesion_fraction must lie in"),
        ({"noise": -0.1}, "noise must lie in"),
    ],
)
def test_bad_configuration_is_refused(setting: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PhantomConfig(**setting)  # type: ignore[arg-type]
