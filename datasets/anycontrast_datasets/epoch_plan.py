"""One epoch's packs, and which step each is in: a pure function of tokens and settings.

In: the tokens of every study, in the order in which the epoch serves them. Out: packs of at most
`pack_tokens` tokens, in steps of `packs_per_step` packs that cost nearly the same, so that no rank
waits for another. Every study is in exactly one pack.

Pools of studies, in the order served, are packed (see `packing`); a pack with very long studies,
whose cost grows with their square, is left a little emptier. All packs of the epoch are then
sorted by cost and dealt, run by run, to steps, and the steps are put in a random order. What makes
no whole step, preferably short studies, is spread over one last step, at least one study to a pack,
so that every rank has the same number of steps.

World size never enters: rank r of W takes the r-th of W equal runs of each step's packs. Costs are
summed as integers, so that every machine makes the same plan.

Gives up: the studies of a step have packs of similar cost, hence are not a random draw.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.cost import DEFAULT_COST, CostModel
from anycontrast_datasets.order import study_rng
from anycontrast_datasets.packing import Ints, fill_last_step, pack_pools, spread_order
from anycontrast_datasets.study import StudyError

MAX_PACK_COST = 1.2
"""Largest cost of a pack of several studies, over the mean cost of as many tokens."""
_COST_UNITS = 2**20
"""Integer units in the cost of the dearest study."""


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Packs of one epoch. Pack p of step s is number `s * packs_per_step + p`."""

    pack_tokens: int
    """Most tokens of a pack."""
    packs_per_step: int
    positions: Ints
    """Positions in the epoch's order, pack after pack, ascending within a pack."""
    pack_offsets: Ints
    """[packs + 1], pack n holds `positions[pack_offsets[n]:pack_offsets[n + 1]]`."""
    tokens: Ints
    """[packs] tokens of each pack."""
    costs: Ints
    """[packs] cost of each pack, in units that mean something within this plan only."""
    left_over: Ints
    """Positions that no pack could be made for; fewer than `packs_per_step`. Empty unless nearly
    every study fills a pack by itself."""

    @property
    def num_packs(self) -> int:
        """Packs of all steps."""
        return len(self.tokens)

    @property
    def num_steps(self) -> int:
        """Steps, the same on every rank."""
        return self.num_packs // self.packs_per_step

    def step(self, step: int) -> list[Ints]:
        """Return the packs of a step, each as positions in the epoch's order."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"epoch plan: no step {step}, it has {self.num_steps}")
        first = step * self.packs_per_step
        bounds = self.pack_offsets[first : first + self.packs_per_step + 1]
        return np.split(self.positions[bounds[0] : bounds[-1]], bounds[1:-1] - bounds[0])

    @property
    def fill(self) -> float:
        """Tokens served over tokens that the packs have room for."""
        return float(self.tokens.mean() / self.pack_tokens)

    @property
    def fill_whole_steps(self) -> float:
        """`fill` without the last step; of an epoch of one step, that step's."""
        tokens = self.tokens[: -self.packs_per_step] if self.num_steps > 1 else self.tokens
        return float(tokens.mean() / self.pack_tokens)


@dataclass(frozen=True, kw_only=True)
class PlanStats:
    """How well a plan fits a number of ranks."""

    world_size: int
    num_steps: int
    fill: float
    """Tokens over room, all steps."""
    fill_whole_steps: float
    """The same without the last step, which takes what is left of the epoch."""
    imbalance: float
    """Time with waiting over time without: sum of the dearest ranks over sum of the means."""
    imbalance_p99: float
    """99th percentile over steps of dearest rank over mean rank."""
    imbalance_max: float


def plan_epoch(
    tokens_N: npt.ArrayLike,
    *,
    pack_tokens: int,
    packs_per_step: int,
    pool_studies: int,
    copies: int = 1,
    cost: CostModel = DEFAULT_COST,
    seed: int = 0,
    epoch: int = 0,
    name: Callable[[int], str] = lambda position: f"at position {position}",
) -> EpochPlan:
    """Pack an epoch's studies and deal the packs to steps.

    Args:
        tokens_N: Tokens of each study in the order served, >= 1; fractions are rounded up.
        pack_tokens: Most tokens of a pack.
        packs_per_step: Packs of a step, over all ranks.
        pool_studies: Studies that are packed together.
        copies: Times each study goes into its pack, every copy attending to itself alone.
        cost: What balance is measured by.
        seed: Seed of the run: of the order of the steps.
        epoch: Number of the epoch.
        name: Says in a message which study a position is.

    Raises:
        StudyError: a study is larger than a pack, or there are fewer studies than packs in a step.
    """
    lengths_N = np.ceil(np.asarray(tokens_N, dtype=np.float64)).astype(np.int64)
    costs_N = _integer_costs(lengths_N, cost)
    lengths_N = lengths_N * copies
    _check(lengths_N, pack_tokens, packs_per_step, pool_studies, name)
    sizes_N = _capped_sizes(lengths_N, costs_N, pack_tokens)
    pack_N = pack_pools(sizes_N, pack_tokens, pool_studies)
    order = _deal(pack_N, lengths_N, costs_N, packs_per_step, seed, epoch)
    # Packs are numbered anew: first those dealt, in the order served, then those left.
    number = np.empty(len(order.packs), dtype=np.int64)
    number[order.packs] = np.arange(len(order.packs))
    pack_N = number[pack_N]
    left_over = fill_last_step(
        pack_N, order.num_dealt, lengths_N, costs_N, pack_tokens, packs_per_step
    )
    return _to_plan(pack_N, left_over, lengths_N, costs_N, pack_tokens, packs_per_step)


def simulate(
    plan: EpochPlan, world_size: int, *, costs_N: npt.NDArray[np.float64] | None = None
) -> PlanStats:
    """Return fill and balance of a plan on so many ranks.

    Args:
        plan: The plan.
        world_size: Ranks that share each step.
        costs_N: What each position of the epoch really costs; None takes what was planned by.

    Raises:
        ValueError: the packs of a step cannot be shared out evenly.
    """
    if world_size < 1 or plan.packs_per_step % world_size:
        raise ValueError(
            f"simulating {world_size} ranks: packs_per_step must be a multiple of the ranks, "
            f"got {plan.packs_per_step}"
        )
    costs = plan.costs.astype(np.float64)
    if costs_N is not None:
        costs = np.add.reduceat(costs_N[plan.positions], plan.pack_offsets[:-1])
    ranks = costs.reshape(plan.num_steps, world_size, -1).sum(axis=2)
    dearest, mean = ranks.max(axis=1), ranks.mean(axis=1)
    ratio = dearest / mean
    return PlanStats(
        world_size=world_size,
        num_steps=plan.num_steps,
        fill=plan.fill,
        fill_whole_steps=plan.fill_whole_steps,
        imbalance=float(dearest.sum() / mean.sum()),
        imbalance_p99=float(np.percentile(ratio, 99)),
        imbalance_max=float(ratio.max()),
    )


@dataclass(frozen=True)
class _Order:
    packs: Ints
    """Old numbers of all packs: those dealt to whole steps, in the order served, then the rest."""
    num_dealt: int


def _check(
    lengths_N: Ints,
    pack_tokens: int,
    packs_per_step: int,
    pool_studies: int,
    name: Callable[[int], str],
) -> None:
    for key, value in (
        ("pack_tokens", pack_tokens),
        ("packs_per_step", packs_per_step),
        ("pool_studies", pool_studies),
    ):
        if value < 1:
            raise ValueError(f"planning an epoch: {key} must be >= 1, got {value}")
    if len(lengths_N) < packs_per_step:
        raise StudyError(
            f"planning an epoch: every pack of a step needs a study, got {len(lengths_N)} studies "
            f"for {packs_per_step} packs; lower packs_per_step",
            code="too_few_studies",
        )
    if lengths_N.min() < 1:
        raise StudyError(
            f"planning an epoch: every study must have tokens, study "
            f"{name(int(lengths_N.argmin()))} has {lengths_N.min()}"
        )
    if lengths_N.max() > pack_tokens:
        place = int(lengths_N.argmax())
        raise StudyError(
            f"planning an epoch: a study must fit into a pack of {pack_tokens} tokens, study "
            f"{name(place)} has {lengths_N[place]} ({int((lengths_N > pack_tokens).sum())} do not "
            f"fit); raise pack_tokens to {lengths_N[place]} or more, or set crop_vox",
            code="study_larger_than_pack",
        )


def _integer_costs(lengths_N: Ints, cost: CostModel) -> Ints:
    costs = cost(lengths_N)
    largest = max(costs.max(initial=0.0), np.finfo(np.float64).tiny)
    units: Ints = np.maximum(np.rint(costs / largest * _COST_UNITS), 1).astype(np.int64)
    return units


def _capped_sizes(lengths_N: Ints, costs_N: Ints, pack_tokens: int) -> Ints:
    """Return how much room studies take, so that no full pack costs far more than the others.

    Only the longest studies take more than their tokens: their packs are left a little emptier.
    """
    largest_cost = MAX_PACK_COST * pack_tokens * (int(costs_N.sum()) / int(lengths_N.sum()))
    by_cost = np.ceil(costs_N * (pack_tokens / largest_cost)).astype(np.int64)
    sizes: Ints = np.maximum(lengths_N, np.minimum(by_cost, pack_tokens))
    return sizes


def _deal(
    pack_N: Ints, lengths_N: Ints, costs_N: Ints, packs_per_step: int, seed: int, epoch: int
) -> _Order:
    """Sort packs by cost into whole steps, in a random order of the steps.

    Packs without long studies are left for the last step: they are spread best.
    """
    costs = np.bincount(pack_N, weights=costs_N)
    longest = np.zeros(len(costs), dtype=np.int64)
    np.maximum.at(longest, pack_N, lengths_N)
    order = np.lexsort((-np.bincount(pack_N, weights=lengths_N), -longest))
    num_steps = len(costs) // packs_per_step
    dealt, rest = np.split(order, [num_steps * packs_per_step])
    steps = dealt[np.argsort(costs[dealt], kind="stable")].reshape(num_steps, packs_per_step)
    generator = study_rng(seed, epoch, "", "steps").bit_generator
    shuffled = np.argsort(generator.random_raw(num_steps), kind="stable")
    steps = steps[shuffled][:, spread_order(packs_per_step)]
    return _Order(np.concatenate((steps.reshape(-1), rest)), dealt.size)


def _to_plan(
    pack_N: Ints,
    left_over: Ints,
    lengths_N: Ints,
    costs_N: Ints,
    pack_tokens: int,
    packs_per_step: int,
) -> EpochPlan:
    positions = np.argsort(pack_N, kind="stable")[len(left_over) :]
    packs = pack_N[positions]
    return EpochPlan(
        pack_tokens=pack_tokens,
        packs_per_step=packs_per_step,
        positions=positions,
        pack_offsets=np.concatenate(([0], np.cumsum(np.bincount(packs)))),
        tokens=np.bincount(packs, weights=lengths_N[positions]).astype(np.int64),
        costs=np.bincount(packs, weights=costs_N[positions]).astype(np.int64),
        left_over=left_over,
    )
