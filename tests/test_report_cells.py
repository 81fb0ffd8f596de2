"""Suppression of rare cells: what is shown must not give away what is not."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.report_cells import (
    State,
    System,
    merge_bins,
    partition,
    protect,
    show,
)

LEAST = 10


def possible_values(system: System, states: list[State], row: int) -> set[int]:
    """Every value of a rare row that agrees with all that is shown: by trying all, as a reader."""
    values = system.values_R
    known = [r for r, s in enumerate(states) if s is State.SHOWN and r not in system.unlisted]
    largest = int(max(values)) + 1
    found = set()
    atoms = len(system.counts_A)
    for guess in itertools.product(range(largest + 1), repeat=atoms):
        rows = system.parts_RA @ np.array(guess)
        fits = all(rows[r] == values[r] for r in known)
        fits &= all(1 <= rows[r] < LEAST for r, s in enumerate(states) if s is State.RARE)
        if fits:
            found.add(int(rows[row]))
    return found


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([50, 40, 30], ["50", "40", "30"]),
        # One rare cell: the smallest other one is withheld with it.
        ([50, 40, 3], ["50", "withheld", "< 10"]),
        # 2 + 3 = 5 would say that both are at most 4.
        ([50, 40, 2, 3], ["50", "withheld", "< 10", "< 10"]),
        # 5 + 6 = 11 leaves 2 .. 9 only: "at least 2" is more than "< 10" says.
        ([50, 40, 5, 6], ["50", "withheld", "< 10", "< 10"]),
        ([50, 40, 5, 6, 4], ["50", "40", "< 10", "< 10", "< 10"]),
        # Nothing left to hide behind: not even "< 10" is said.
        ([11, 1], ["withheld", "withheld"]),
        ([3], ["< 10"]),
        ([0, 12], ["0", "12"]),
    ],
)
def test_a_table_with_a_total(counts: list[int], expected: list[str]) -> None:
    system = partition(counts, counts, total_people=sum(counts))
    shown = show(counts, protect(system, LEAST), LEAST)
    assert [str(cell) for cell in shown] == expected


@pytest.mark.parametrize("seed", range(12))
def test_every_number_below_the_least_stays_possible(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.sort(rng.integers(1, 22, size=3))
    system = partition(counts, counts, total_people=int(counts.sum()))
    states = protect(system, LEAST)
    for row, state in enumerate(states):
        if state is State.RARE and states[-1] is State.SHOWN:
            assert possible_values(system, states, row) >= set(range(1, LEAST))
        assert state is not State.SHOWN or row == 3 or counts[row] >= LEAST


def linked(sets: list[tuple[int, ...]], counts: list[int]) -> System:
    """Contrast sets as rows, contrasts as overlapping sums of them, and the total."""
    num_contrasts = max(max(names) for names in sets) + 1
    rows = [np.eye(len(sets))[i] for i in range(len(sets))]
    rows += [np.array([float(c in names) for names in sets]) for c in range(num_contrasts)]
    rows.append(np.ones(len(sets)))
    parts = np.array(rows)
    people: npt.NDArray[np.int64] = (parts @ np.array(counts)).astype(np.int64)
    return System(parts, np.array(counts), people, pinned=frozenset({len(rows) - 1}))


def test_sums_over_overlapping_rows_do_not_tell_a_rare_one() -> None:
    # Contrast 1 is in one set only, which is rare; contrast 0's count minus the others gives it.
    system = linked([(0,), (0, 1), (0, 2), (2,)], [40, 3, 25, 30])
    states = protect(system, LEAST)
    assert states[1] is State.RARE
    assert states[5] is State.RARE  # the contrast of that set alone
    known = [r for r, s in enumerate(states) if s is State.SHOWN]
    rank = np.linalg.matrix_rank(system.parts_RA[known])
    assert (
        np.linalg.matrix_rank(np.vstack([system.parts_RA[known], system.parts_RA[1]])) == rank + 1
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_linear_combination_of_what_is_shown_is_a_rare_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sets = [s for n in (1, 2, 3) for s in itertools.combinations(range(4), n)]
    counts = [int(c) for c in rng.integers(1, 45, size=len(sets))]
    system = linked(sets, counts)
    states = protect(system, LEAST)
    known = [r for r, s in enumerate(states) if s is State.SHOWN]
    rank = np.linalg.matrix_rank(system.parts_RA[known])
    rare = [r for r, s in enumerate(states) if s is State.RARE]
    assert all(counts[r] < LEAST for r in rare)
    for row in rare:
        stacked = np.vstack([system.parts_RA[known], system.parts_RA[row]])
        assert np.linalg.matrix_rank(stacked) == rank + 1


def test_the_complement_of_a_common_row_is_protected() -> None:
    # 4 of 100 lack something: shown, 96 and 100 would tell.
    system = System(
        np.array([[1.0, 0], [0, 1.0], [1.0, 1.0]]),
        np.array([96, 4]),
        np.array([96, 4, 100]),
        pinned=frozenset({2}),
        unlisted=frozenset({1}),
    )
    assert protect(system, LEAST)[0] is State.WITHHELD


def test_people_decide_and_not_what_is_counted() -> None:
    system = partition([40, 30, 20], [40, 30, 2], total_people=72)
    assert protect(system, LEAST)[2] is State.RARE


def test_nothing_is_rare_when_one_is_enough() -> None:
    states = protect(partition([1, 2], [1, 2], total_people=3), 1)
    assert set(states) == {State.SHOWN}


def test_bins_are_joined_until_they_hold_enough_people() -> None:
    bins = np.array([0] * 3 + [1] * 8 + [4] * 12 + [6] * 2)
    people = np.arange(len(bins))
    assert merge_bins(bins, people, 8, LEAST) == [(0, 2, 11), (4, 7, 14)]
    # Everything of one person: nothing is shown.
    assert merge_bins(bins, np.zeros_like(bins), 8, LEAST) is None
    assert merge_bins(bins, people, 8, 1) == [(0, 1, 3), (1, 2, 8), (4, 5, 12), (6, 7, 2)]
