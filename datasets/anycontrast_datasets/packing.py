"""Studies to packs of bounded size: first-fit-decreasing over pools, large studies dealt out first.

In: tokens (and costs) of studies. Out: the number of each study's pack, as one array. Pools of
studies, in the order given, are packed one after the other; packs that stay underfull are dissolved
into the next pool. Within a pool the large studies go in turn to the pack with the fewest tokens,
and first-fit-decreasing fills the rest: so packs are as full as by first-fit-decreasing alone, and
alike, each with large and small studies, hence of nearly one cost.

Source: Johnson, Near-optimal bin packing algorithms, 1973 (first-fit-decreasing); Graham, Bounds on
multiprocessing timing anomalies, 1969 (longest processing time first).
"""

import heapq

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

GOOD_FILL = 0.98
"""Packs below this share of the budget are dissolved into the next pool."""
MAX_CARRIED = 0.5
"""At most this share of a pool is carried into the next one, so that a pool stays a pool."""
DEALT_SHARE = 0.6
"""Share of the tokens that is dealt out, largest studies first; the rest fills up."""
EVEN_PARTNERS = 16
"""Cheapest packs that the dearest one tries to swap studies with."""
EVEN_ENOUGH = 1.005
"""Dearest pack of a step over the mean at which nothing is swapped any more."""
MAX_SWAPS = 2
"""In one step, per pack."""
MORE_PACKS = 1.005
"""Dealing out may need this many times the packs of first-fit-decreasing alone."""


def pack_pools(lengths_N: Ints, pack_tokens: int, pool_studies: int) -> Ints:
    """Pack studies, `pool_studies` at a time.

    Args:
        lengths_N: Tokens, 1 .. pack_tokens, in the order served.
        pack_tokens: Most tokens of a pack.
        pool_studies: Studies that join a pool.

    Returns:
        [N] number of each study's pack, counted from 0; every number has a study.
    """
    pack_N = np.empty(len(lengths_N), dtype=np.int64)
    carried, num_packs, num = np.empty(0, dtype=np.int64), 0, len(lengths_N)
    for first in range(0, num, pool_studies):
        is_last = first + pool_studies >= num
        pool = np.concatenate((carried, np.arange(first, min(first + pool_studies, num))))
        packs = pack_pool(lengths_N[pool], pack_tokens)
        is_carried = np.zeros(int(packs.max()) + 1, dtype=np.bool_)
        if not is_last:
            is_carried = _underfull(packs, lengths_N[pool], pack_tokens, pool_studies)
        # Packs that stay get the next numbers.
        number = num_packs - 1 + np.cumsum(~is_carried)
        leaving = is_carried[packs]
        pack_N[pool[~leaving]] = number[packs[~leaving]]
        num_packs = int(number[-1]) + 1
        carried = pool[leaving]
    return pack_N


def _underfull(packs_N: Ints, lengths_N: Ints, pack_tokens: int, pool_studies: int) -> Bools:
    """Return which packs are dissolved into the next pool: the emptiest, and not too many."""
    tokens = np.bincount(packs_N, weights=lengths_N)
    studies = np.bincount(packs_N)
    emptiest = np.argsort(tokens, kind="stable")
    few = np.cumsum(studies[emptiest]) <= MAX_CARRIED * pool_studies
    chosen = np.zeros(len(tokens), dtype=np.bool_)
    chosen[emptiest[few & (tokens[emptiest] < GOOD_FILL * pack_tokens)]] = True
    return chosen


def pack_pool(lengths_N: Ints, capacity: int) -> Ints:
    """Pack one pool: [N] number of each study's pack, counted from 0.

    Where few studies fit into a pack, dealing out wastes room; then the pool is packed by
    first-fit-decreasing alone.
    """
    filled = first_fit_decreasing(lengths_N, capacity)
    pack_N, room = _deal_large(lengths_N, capacity)
    rest = np.flatnonzero(pack_N < 0)
    pack_N[rest] = first_fit_decreasing(lengths_N[rest], capacity, room)
    mixed = np.unique(pack_N, return_inverse=True)[1].astype(np.int64)
    return mixed if mixed.max() + 1 <= MORE_PACKS * (filled.max() + 1) else filled


def first_fit_decreasing(lengths_N: Ints, capacity: int, room: Ints | None = None) -> Ints:
    """Put each study into the first pack with room, longest study first.

    Studies of one length are placed together, so the work is one pass over the open packs for every
    different length.

    Args:
        lengths_N: Tokens, 1 .. capacity.
        capacity: Most tokens of a pack.
        room: Tokens that still fit into packs already open; None if there are none.

    Returns:
        [N] number of each study's pack, counted from 0, those already open first.
    """
    room = np.empty(0, dtype=np.int64) if room is None else room.copy()
    open_packs, num_packs = np.arange(len(room)), len(room)
    pack_N = np.empty(len(lengths_N), dtype=np.int64)
    order = np.argsort(-lengths_N, kind="stable")
    sizes, firsts, counts = np.unique(-lengths_N[order], return_index=True, return_counts=True)
    for size, first, count in zip((-sizes).tolist(), firsts.tolist(), counts.tolist(), strict=True):
        fits = room // size
        total = np.cumsum(fits)
        placed = min(count, int(total[-1]) if len(total) else 0)
        if placed:
            last = int(np.searchsorted(total, placed))
            taken = fits[: last + 1]
            taken[last] -= total[last] - placed
            pack_N[order[first : first + placed]] = np.repeat(open_packs[: last + 1], taken)
            room[: last + 1] -= taken * size
        if placed < count:
            per_pack, rest = capacity // size, count - placed
            fresh = np.arange(rest) // per_pack
            pack_N[order[first + placed : first + count]] = num_packs + fresh
            kept = room >= -sizes[-1]
            added = np.arange(num_packs, num_packs + int(fresh[-1]) + 1)
            left = capacity - np.bincount(fresh) * size
            open_packs = np.concatenate((open_packs[kept], added))
            room = np.concatenate((room[kept], left))
            num_packs = int(added[-1]) + 1
    return pack_N


def _deal_large(lengths_N: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Deal the largest studies out to as few packs as there can be, always to the emptiest.

    Returns:
        [N] number of the pack, -1 for a study that was not dealt; and the room left in every pack.
    """
    order = np.argsort(-lengths_N, kind="stable")
    tokens = np.cumsum(lengths_N[order])
    num_packs = -(-int(tokens[-1]) // capacity)
    num_large = int(np.searchsorted(tokens, DEALT_SHARE * tokens[-1]))
    pack_N = np.full(len(lengths_N), -1, dtype=np.int64)
    heap = [(0, pack) for pack in range(num_packs)]
    for place in order[:num_large].tolist():
        length = int(lengths_N[place])
        load, pack = heap[0]
        if load + length <= capacity:
            heapq.heapreplace(heap, (load + length, pack))
            pack_N[place] = pack
    room = np.full(num_packs, capacity, dtype=np.int64)
    for load, pack in heap:
        room[pack] -= load
    return pack_N, room


def spread_order(count: int) -> Ints:
    """Return a permutation of which every run is spread evenly over the range (bit reversal)."""
    bits = max(count - 1, 1).bit_length()
    values, reversed_ = np.arange(count), np.zeros(count, dtype=np.int64)
    for _ in range(bits):
        reversed_, values = reversed_ * 2 + values % 2, values // 2
    return np.argsort(np.argsort(reversed_, kind="stable"), kind="stable")


def fill_last_step(
    pack_N: Ints,
    num_dealt: int,
    lengths_N: Ints,
    costs_N: Ints,
    pack_tokens: int,
    packs_per_step: int,
) -> Ints:
    """Make one more step of the packs that are left, in place; return positions it cannot take."""
    rest = np.flatnonzero(pack_N >= num_dealt)
    if len(rest) == 0:
        return rest
    missing = packs_per_step - len(rest)
    if missing > 0:
        borrowed = _spare_studies(pack_N, num_dealt, lengths_N, missing)
        if len(borrowed) < missing:
            pack_N[rest] = -1
            return rest
        rest = np.concatenate((rest, borrowed))
        pack_N[borrowed] = pack_N.max() + 1 + np.arange(missing)
    spread = spread_evenly(lengths_N[rest], costs_N[rest], pack_tokens, packs_per_step)
    if spread is None:
        spread = split_packs(pack_N[rest], lengths_N[rest], packs_per_step)
    even_out(spread, lengths_N[rest], costs_N[rest], pack_tokens)
    by_cost = np.argsort(np.bincount(spread, weights=costs_N[rest]), kind="stable")
    number = np.empty(packs_per_step, dtype=np.int64)
    number[by_cost[spread_order(packs_per_step)]] = np.arange(packs_per_step)
    pack_N[rest] = num_dealt + number[spread]
    return np.empty(0, dtype=np.int64)


def _spare_studies(pack_N: Ints, num_dealt: int, lengths_N: Ints, count: int) -> Ints:
    """Return the shortest study of each of the packs with the most studies, two at least."""
    positions = np.flatnonzero(pack_N < num_dealt)
    by_pack = positions[np.lexsort((positions, lengths_N[positions], pack_N[positions]))]
    _, firsts, studies = np.unique(pack_N[by_pack], return_index=True, return_counts=True)
    most = np.argsort(-studies, kind="stable")[:count]
    return by_pack[firsts[most[studies[most] >= 2]]]


def spread_evenly(lengths_N: Ints, costs_N: Ints, pack_tokens: int, num_packs: int) -> Ints | None:
    """Put each study, dearest first, into the cheapest pack with room; None if one finds none."""
    pack_N = np.empty(len(lengths_N), dtype=np.int64)
    heap = [(0, pack, 0) for pack in range(num_packs)]
    for place in np.argsort(-costs_N, kind="stable").tolist():
        length, full = int(lengths_N[place]), []
        while heap and heap[0][2] + length > pack_tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, pack, tokens = heap[0]
        heapq.heapreplace(heap, (cost + int(costs_N[place]), pack, tokens + length))
        pack_N[place] = pack
        for item in full:
            heapq.heappush(heap, item)
    return pack_N


def even_out(pack_N: Ints, lengths_N: Ints, costs_N: Ints, pack_tokens: int) -> None:
    """Swap studies between the dearest pack and a cheap one while that helps, in place.

    Dealing studies of a few sizes one by one leaves packs apart by a whole small study; a swap of
    two studies of different sizes moves a part of one.

    Args:
        pack_N: Number of each study's pack, counted from 0; every number has a study.
        lengths_N: Tokens.
        costs_N: What is evened out.
        pack_tokens: Most tokens of a pack.
    """
    held = [np.flatnonzero(pack_N == pack) for pack in range(int(pack_N.max()) + 1)]
    costs = np.bincount(pack_N, weights=costs_N).astype(np.int64)
    for _ in range(MAX_SWAPS * len(held)):
        dear = int(costs.argmax())
        if costs[dear] <= EVEN_ENOUGH * costs.mean():
            return
        cheapest = np.argsort(costs, kind="stable")[: min(EVEN_PARTNERS, len(held) - 1)]
        for cheap in cheapest.tolist():
            pair = _best_swap(held[dear], held[cheap], lengths_N, costs_N, pack_tokens)
            if pair is not None:
                break
        else:
            return
        ours, theirs = held[dear][pair[0]], held[cheap][pair[1]]
        held[dear][pair[0]], held[cheap][pair[1]] = theirs, ours
        pack_N[ours], pack_N[theirs] = cheap, dear
        moved = int(costs_N[ours] - costs_N[theirs])
        costs[dear] -= moved
        costs[cheap] += moved


def _best_swap(
    dear: Ints, cheap: Ints, lengths_N: Ints, costs_N: Ints, pack_tokens: int
) -> tuple[int, int] | None:
    """Return which study of each pack to swap to bring their costs closest, if any brings them so.

    Args:
        dear: Studies of the dearer pack.
        cheap: Studies of the cheaper pack.
        lengths_N: Tokens of every study.
        costs_N: Cost of every study.
        pack_tokens: Most tokens of a pack.
    """
    gap = int(costs_N[dear].sum() - costs_N[cheap].sum())
    moved_AB = costs_N[dear][:, None] - costs_N[cheap]
    grown_AB = lengths_N[dear][:, None] - lengths_N[cheap]
    fits_AB = lengths_N[cheap].sum() + grown_AB <= pack_tokens
    fits_AB &= lengths_N[dear].sum() - grown_AB <= pack_tokens
    off_AB = np.where(fits_AB, np.abs(gap - 2 * moved_AB), gap)
    best = int(off_AB.argmin())
    row, column = divmod(best, len(cheap))
    return (row, column) if off_AB[row, column] < gap else None


def split_packs(pack_N: Ints, lengths_N: Ints, num_packs: int) -> Ints:
    """Split a study off the pack with the most studies until there are so many packs."""
    pack_N = np.unique(pack_N, return_inverse=True)[1].astype(np.int64)
    for number in range(int(pack_N.max()) + 1, num_packs):
        own = np.flatnonzero(pack_N == np.bincount(pack_N).argmax())
        pack_N[own[lengths_N[own].argmax()]] = number
    return pack_N
