"""The order serves every study once an epoch, and depends on nothing but its arguments."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anycontrast_datasets.order import step_studies, study_at, study_rng


@given(
    num_studies=st.integers(1, 40),
    studies_per_step=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_every_study_is_served_exactly_once_per_epoch(
    num_studies: int, studies_per_step: int, seed: int
) -> None:
    num_steps = -(-3 * num_studies // studies_per_step)
    served = [
        pair
        for step in range(num_steps)
        for pair in step_studies(step, studies_per_step, num_studies, seed)
    ]
    for epoch in range(3):
        indices = [index for e, index in served if e == epoch]
        assert sorted(indices) == list(range(num_studies))
    assert [epoch for epoch, _ in served] == sorted(epoch for epoch, _ in served)


def test_order_changes_with_epoch_and_seed_and_only_with_them() -> None:
    def epoch_order(epoch: int, seed: int) -> list[int]:
        return [study_at(epoch * 100 + i, 100, seed)[1] for i in range(100)]

    assert epoch_order(0, 7) == epoch_order(0, 7)
    assert epoch_order(0, 7) != epoch_order(1, 7)
    assert epoch_order(0, 7) != epoch_order(0, 8)
    assert epoch_order(0, 7) != list(range(100))


def test_order_is_the_one_that_older_runs_were_trained_with() -> None:
    # Frozen values: a change here breaks the resume of every run in progress.
    assert [study_at(n, 8, 0) for n in range(10)] == [
        (0, 0),
        (0, 1),
        (0, 4),
        (0, 2),
        (0, 5),
        (0, 3),
        (0, 7),
        (0, 6),
        (1, 6),
        (1, 0),
    ]


def test_first_place_of_the_epoch_is_uniform_over_studies() -> None:
    counts = np.bincount([study_at(epoch * 5, 5, 1)[1] for epoch in range(1000)], minlength=5)
    # Chi-square with 4 degrees of freedom: 18.5 is the 0.1 % point.
    assert ((counts - 200) ** 2 / 200).sum() < 18.5


def test_study_rng_repeats_for_equal_and_differs_for_unequal_arguments() -> None:
    base = (3, 1, "sub-01", "mask")
    drawn = study_rng(*base).random(4)
    assert np.array_equal(drawn, study_rng(*base).random(4))
    others = [
        (4, *base[1:]),
        (3, 2, "sub-01", "mask"),
        (3, 1, "sub-02", "mask"),
        (3, 1, "sub-01", "x"),
    ]
    for other in others:
        assert not np.array_equal(drawn, study_rng(*other).random(4))


def test_study_rng_keeps_study_id_and_purpose_apart() -> None:
    assert study_rng(0, 0, "a", "bc").random() != study_rng(0, 0, "ab", "c").random()
    assert study_rng(1, 11, "a", "b").random() != study_rng(11, 1, "a", "b").random()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: study_at(0, 0, 0), "num_studies must be >= 1, got 0"),
        (lambda: study_at(-1, 3, 0), "position must be >= 0, got -1"),
        (lambda: step_studies(0, 0, 3, 0), "studies_per_step must be >= 1, got 0"),
        (lambda: step_studies(-1, 2, 3, 0), "position must be >= 0, got -2"),
    ],
)
def test_order_refuses_impossible_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
