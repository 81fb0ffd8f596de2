"""Which counts a report may show: rare ones withheld, and enough others that no sum tells them.

A row of a table counts some of the atoms (disjoint groups of studies, files, ...) that all tables
of one system share. A row of fewer than `least` people is rare: it is shown as "< least". What is
left shown must not say more than that, so rows are withheld, smallest first, until linear
programming finds every number from 1 to `least - 1` possible for every rare row, given all rows
that are shown. Pure: knows nothing of manifests.

Source: Cox, "Linear sensitivity measures in statistical disclosure control", 1981 (complementary
suppression); audited by linear programming as in Fischetti and Salazar, 2001.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Shown = int | str
"""A count, or why there is none: `"< 10"`, or `WITHHELD`."""

WITHHELD = "withheld"
_ZERO = 1e-7


class State(Enum):
    """What becomes of a row."""

    SHOWN = "shown"
    RARE = "rare"
    WITHHELD = "withheld"


@dataclass(frozen=True)
class System:
    """Rows over shared atoms. R rows, A atoms."""

    parts_RA: npt.NDArray[np.float64]
    """[R, A], how often a row counts a member of an atom."""
    counts_A: npt.NDArray[np.int64]
    """[A], members per atom."""
    people_R: npt.NDArray[np.int64]
    """[R], different people behind a row; what decides whether it is rare."""
    pinned: frozenset[int] = frozenset()
    """Rows that other tables show too: never withheld, unless they are rare."""
    unlisted: frozenset[int] = frozenset()
    """Rows that no table lists, but which must not be computable when they are rare."""

    @property
    def values_R(self) -> npt.NDArray[np.int64]:
        """[R], the true counts."""
        return np.asarray(np.rint(self.parts_RA @ self.counts_A), dtype=np.int64)


def partition(counts: npt.ArrayLike, people: npt.ArrayLike, *, total_people: int | None) -> System:
    """Return the system of a table whose rows are disjoint and add up to a total.

    Args:
        counts: [N] members of each row.
        people: [N] people behind each row.
        total_people: People behind the total, which becomes row N and is pinned; None if the total
            is shown nowhere.
    """
    counts_A = np.asarray(counts, dtype=np.int64)
    people_R = np.asarray(people, dtype=np.int64)
    parts_RA = np.eye(len(counts_A))
    if total_people is None:
        return System(parts_RA, counts_A, people_R)
    return System(
        np.vstack([parts_RA, np.ones((1, len(counts_A)))]),
        counts_A,
        np.append(people_R, total_people),
        pinned=frozenset({len(counts_A)}),
    )


def protect(system: System, least: int, withheld: frozenset[int] = frozenset()) -> list[State]:
    """Decide what becomes of every row.

    Args:
        system: The rows.
        least: Fewest people behind a row that is shown.
        withheld: Rows that another measure of the same table already withholds.

    Returns:
        One state per row. If withholding every row that may be withheld is not enough, rare rows
        are `WITHHELD` too, so that not even "< least" is said of them.
    """
    values = system.values_R
    rare = (values > 0) & (system.people_R < least)
    hidden = np.zeros(len(values), dtype=np.bool_)
    hidden[sorted(withheld)] = True
    hidden[sorted(system.unlisted)] = True
    open_rows = [int(r) for r in np.flatnonzero(rare)]
    while open_rows:
        row = open_rows[-1]
        binding = _telling_rows(system, row, rare, hidden, least)
        if binding is None:
            open_rows.pop()
            continue
        candidates = [r for r in binding if r not in system.pinned and values[r] > 0]
        if not candidates:
            hidden |= rare
            break
        hidden[min(candidates, key=lambda r: (values[r], r))] = True
        open_rows = [int(r) for r in np.flatnonzero(rare)]
    return [
        State.WITHHELD if hidden[r] else State.RARE if rare[r] else State.SHOWN
        for r in range(len(values))
    ]


def show(
    values: Sequence[int] | npt.NDArray[np.int64], states: Sequence[State], least: int
) -> list[Shown]:
    """Replace what must not be shown: counts, `"< least"` or `WITHHELD`, in order."""
    words = {State.RARE: f"< {least}", State.WITHHELD: WITHHELD}
    return [words.get(s, int(v)) for v, s in zip(values, states, strict=False)]


def _telling_rows(
    system: System,
    row: int,
    rare: npt.NDArray[np.bool_],
    hidden: npt.NDArray[np.bool_],
    least: int,
) -> list[int] | None:
    """Return shown rows that narrow a rare row to less than 1 .. least - 1, None if none does."""
    from scipy.optimize import linprog

    values = system.values_R
    known = [int(r) for r in np.flatnonzero(~rare & ~hidden)]
    # A reader sees that a listed row is there, that a rare one is below `least` (if it counts
    # people; a rare row may count more), and that a withheld one is not.
    listed = [r for r in range(len(values)) if r not in system.unlisted and values[r] > 0]
    floors = {r: 1 if rare[r] else least for r in listed if r not in known}
    ceilings = [r for r in floors if rare[r] and not hidden[r] and values[r] < least]
    between_RA = np.vstack([-system.parts_RA[list(floors)], system.parts_RA[ceilings]])
    limits_R = np.array([-n for n in floors.values()] + [least - 1] * len(ceilings))
    narrowing: set[int] = set()
    for sign, limit in ((1.0, 1.0), (-1.0, least - 1.0)):
        result = linprog(
            sign * system.parts_RA[row],
            A_eq=system.parts_RA[known] if known else None,
            b_eq=values[known] if known else None,
            A_ub=between_RA if floors else None,
            b_ub=limits_R if floors else None,
            bounds=(0, None),
            method="highs",
        )
        if result.status == 3:  # unbounded: nothing narrows this side
            continue
        assert result.status == 0, f"the true counts are feasible: {result.message}"
        if float(result.fun or 0.0) > sign * limit + _ZERO:
            dual = np.abs(result.eqlin.marginals) > _ZERO
            narrowing |= {r for r, binds in zip(known, dual, strict=True) if binds}
    return sorted(narrowing) if narrowing else None


def merge_bins(
    bins: npt.NDArray[np.int64], people: npt.NDArray[np.int64], num_bins: int, least: int
) -> list[tuple[int, int, int]] | None:
    """Join neighbouring bins of a histogram until each holds nobody, or `least` people.

    Args:
        bins: [N] bin of every value, 0 .. num_bins - 1.
        people: [N] whose value it is.
        num_bins: Number of bins.
        least: Fewest people of a bin.

    Returns:
        `(first bin, last bin + 1, values)` from left to right, empty bins left out; None if all
        values together come from fewer than `least` people.
    """
    if len(np.unique(people)) < least or not len(bins):
        return None
    order = np.argsort(bins, kind="stable")
    edges = np.searchsorted(bins[order], np.arange(num_bins + 1))
    merged: list[tuple[int, int, int]] = []
    start = -1
    for stop in range(1, num_bins + 1):
        if start < 0 and edges[stop] == edges[stop - 1]:
            continue
        start = stop - 1 if start < 0 else start
        members = people[order[edges[start] : edges[stop]]]
        if len(np.unique(members)) >= least:
            merged.append((start, stop, len(members)))
            start = -1
    if start >= 0:  # a rare tail joins what is left of it
        first, _, count = merged.pop()
        last = int(bins.max()) + 1
        merged.append((first, last, count + int(edges[num_bins] - edges[start])))
    return merged


def by_count(
    measure: str, name: Callable[[dict[str, Any]], str] = lambda row: str(row["name"])
) -> Callable[[dict[str, Any]], tuple[int, str]]:
    """Sort key: by shown count, then by name; the place of a hidden count tells nothing of it."""
    return lambda row: (-row[measure] if isinstance(row[measure], int) else 1, name(row))
