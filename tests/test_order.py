"""The order serves every study as often as its weight says, and depends on nothing else."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anycontrast_datasets.order import StudyOrder, study_rng

WEIGHTS = st.lists(st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 2.5, 40.0]), min_size=1, max_size=60)


@given(num_studies=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 9))
def test_every_study_is_served_exactly_once_per_epoch(
    num_studies: int, seed: int, epoch: int
) -> None:
    order = StudyOrder(num_studies, seed).epoch(epoch)
    assert sorted(order.study_N) == list(range(num_studies))
    assert not order.repeat_N.any()


def test_order_changes_with_epoch_and_seed_and_only_with_them() -> None:
    def served(epoch: int, seed: int) -> list[int]:
        return [int(study) for study in StudyOrder(100, seed).epoch(epoch).study_N]

    assert served(0, 7) == served(0, 7)
    assert served(0, 7) != served(1, 7)
    assert served(0, 7) != served(0, 8)
    assert served(0, 7) != list(range(100))


def test_order_is_the_one_that_older_runs_were_trained_with() -> None:
    # Frozen values: a change here breaks the resume of every run in progress.
    order = StudyOrder(8, 0)
    assert order.epoch(0).study_N.tolist() == [0, 1, 4, 2, 5, 3, 7, 6]
    assert order.epoch(1).study_N.tolist()[:2] == [6, 0]
    mixed = StudyOrder(6, 0, weights=np.array([1.0, 1, 2, 2, 0, 6]))
    assert mixed.epoch(0).study_N.tolist() == [5, 5, 2, 3, 1]


def test_first_place_of_the_epoch_is_uniform_over_studies() -> None:
    order = StudyOrder(5, 1)
    counts = np.bincount([order.epoch(epoch).study_N[0] for epoch in range(1000)], minlength=5)
    # Chi-square with 4 degrees of freedom: 18.5 is the 0.1 % point.
    assert ((counts - 200) ** 2 / 200).sum() < 18.5


@given(weights=WEIGHTS.filter(any), seed=st.integers(0, 2**31), groups=st.integers(1, 4))
def test_a_study_gets_floor_or_ceil_of_its_share_and_so_does_a_stratum(
    weights: list[float], seed: int, groups: int
) -> None:
    weight_N = np.array(weights)
    strata_N = np.arange(len(weights)) % groups
    order = StudyOrder(len(weights), seed, weights=weight_N, strata=strata_N)
    served = order.epoch(2)
    num_places = np.count_nonzero(weight_N)
    assert len(served.study_N) == order.num_places == num_places
    share = num_places * weight_N / weight_N.sum()
    counts = np.bincount(served.study_N, minlength=len(weights))
    assert (counts >= np.floor(share - 1e-9)).all()
    assert (counts <= np.ceil(share + 1e-9)).all()
    of_stratum = np.bincount(strata_N, weights=share)
    found = np.bincount(strata_N[served.study_N], minlength=len(of_stratum))
    assert (np.abs(found - of_stratum) < 1 + 1e-9).all()


@given(weights=WEIGHTS.filter(any), seed=st.integers(0, 2**31))
def test_repeats_of_a_study_are_numbered(weights: list[float], seed: int) -> None:
    served = StudyOrder(len(weights), seed, weights=np.array(weights)).epoch(0)
    pairs = set(zip(served.study_N.tolist(), served.repeat_N.tolist(), strict=True))
    assert len(pairs) == len(served.study_N)
    for study, count in zip(*np.unique(served.study_N, return_counts=True), strict=True):
        assert {r for s, r in pairs if s == study} == set(range(count))


def test_equal_weights_are_no_weights() -> None:
    plain, weighted = StudyOrder(50, 3), StudyOrder(50, 3, weights=np.full(50, 0.1))
    for epoch in range(3):
        assert np.array_equal(plain.epoch(epoch).study_N, weighted.epoch(epoch).study_N)


def test_half_weight_serves_every_study_in_the_long_run_and_in_changing_company() -> None:
    weights = np.array([0.5] * 10 + [1.5] * 10)
    order = StudyOrder(20, 0, weights=weights)
    epochs = [order.epoch(n).study_N for n in range(200)]
    counts = np.bincount(np.concatenate(epochs), minlength=20)
    assert np.abs(counts[:10] - 100).max() < 40
    assert np.abs(counts[10:] - 300).max() < 40
    companies = {tuple(sorted(int(s) for s in served if s < 10)) for served in epochs}
    assert len(companies) > 50


def test_study_rng_repeats_for_equal_and_differs_for_unequal_arguments() -> None:
    base = (3, 1, "sub-01", "mask")
    drawn = study_rng(*base).random(4)
    assert np.array_equal(drawn, study_rng(*base, draw=0).random(4))
    others = [
        (4, *base[1:], 0),
        (3, 2, "sub-01", "mask", 0),
        (3, 1, "sub-02", "mask", 0),
        (3, 1, "sub-01", "x", 0),
        (*base, 1),
    ]
    streams = [study_rng(*other[:4], draw=other[4]).random(4).tolist() for other in others]
    assert drawn.tolist() not in streams
    assert len({tuple(stream) for stream in streams}) == len(others)


def test_study_rng_is_the_one_that_older_masks_were_drawn_from() -> None:
    assert study_rng(0, 0, "a", "mask").bit_generator.random_raw() == 1442913581207964578


def test_study_rng_keeps_study_id_and_purpose_apart() -> None:
    assert study_rng(0, 0, "a", "bc").random() != study_rng(0, 0, "ab", "c").random()
    assert study_rng(1, 11, "a", "b").random() != study_rng(11, 1, "a", "b").random()


def _order(weights: list[float]) -> Callable[[], StudyOrder]:
    weight_N: npt.NDArray[np.float64] = np.array(weights)
    return lambda: StudyOrder(3, 0, weights=weight_N)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StudyOrder(0, 0), "num_studies must be >= 1, got 0"),
        (_order([1.0, 2.0]), "one weight per study, got 2 for 3"),
        (_order([1.0, -2.0, 1.0]), "finite, >= 0 and not all 0"),
        (_order([1.0, float("nan"), 1.0]), "finite, >= 0 and not all 0"),
        (_order([0.0, 0.0, 0.0]), "finite, >= 0 and not all 0"),
    ],
)
def test_order_refuses_impossible_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
