"""Epoch plans: exactly once, within budget, balanced, the same for every world size."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anycontrast_datasets.cost import CostModel
from anycontrast_datasets.epoch_plan import EpochPlan, plan_epoch, simulate
from anycontrast_datasets.packing import (
    even_out,
    first_fit_decreasing,
    pack_pool,
    split_packs,
    spread_evenly,
)


def hospital_tokens(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Tokens of studies of 1 to 6 volumes, 2.6 on average, of mixed sizes."""
    rng = np.random.default_rng(seed)
    volumes = 1 + rng.binomial(5, 0.32, count)
    per_volume = rng.choice([350, 520, 640, 760, 900], count) * rng.lognormal(0, 0.12, count)
    return np.rint(np.minimum(volumes * per_volume, 8000)).astype(np.int64)


def served(plan: EpochPlan) -> list[int]:
    return [int(p) for step in range(plan.num_steps) for pack in plan.step(step) for p in pack]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 100), min_size=6, max_size=120),
    packs_per_step=st.integers(1, 6),
    pool_studies=st.integers(1, 60),
    seed=st.integers(0, 3),
)
def test_every_study_is_in_one_pack_within_the_budget(
    tokens: list[int], packs_per_step: int, pool_studies: int, seed: int
) -> None:
    plan = plan_epoch(
        tokens,
        pack_tokens=100,
        packs_per_step=packs_per_step,
        pool_studies=pool_studies,
        seed=seed,
    )
    assert sorted([*served(plan), *plan.left_over]) == list(range(len(tokens)))
    assert len(plan.left_over) < packs_per_step
    assert plan.num_packs == plan.num_steps * packs_per_step
    for step in range(plan.num_steps):
        for number, pack in enumerate(plan.step(step), start=step * packs_per_step):
            assert len(pack) >= 1
            assert sum(tokens[p] for p in pack) == plan.tokens[number] <= 100
            assert list(pack) == sorted(pack)


def test_a_large_epoch_is_full_and_balanced_on_any_number_of_ranks() -> None:
    plan = plan_epoch(
        hospital_tokens(40_000), pack_tokens=8192, packs_per_step=128, pool_studies=8192
    )
    assert plan.left_over.size == 0
    for world_size in (1, 2, 8, 128):
        stats = simulate(plan, world_size)
        assert stats.fill >= 0.97
        assert stats.imbalance <= 1.03
        assert stats.num_steps == plan.num_steps


def test_the_plan_depends_on_seed_and_epoch_in_the_order_of_steps_alone() -> None:
    tokens = hospital_tokens(3000)

    def plan(seed: int, epoch: int) -> EpochPlan:
        return plan_epoch(
            tokens, pack_tokens=8192, packs_per_step=8, pool_studies=1000, seed=seed, epoch=epoch
        )

    assert served(plan(1, 2)) == served(plan(1, 2))
    assert served(plan(1, 2)) != served(plan(1, 3))
    assert served(plan(1, 2)) != served(plan(2, 2))

    def steps(plan: EpochPlan) -> set[tuple[int, ...]]:
        return {tuple(sorted(np.concatenate(plan.step(s)))) for s in range(plan.num_steps)}

    assert steps(plan(1, 2)) == steps(plan(2, 7))


def test_steps_are_not_sorted_by_size() -> None:
    plan = plan_epoch(hospital_tokens(5000), pack_tokens=8192, packs_per_step=4, pool_studies=2000)
    costs = plan.costs.reshape(plan.num_steps, -1).mean(axis=1)[:-1]
    rises = np.diff(costs) > 0
    assert 0.3 < rises.mean() < 0.7


def test_the_last_step_is_shared_by_all_ranks() -> None:
    plan = plan_epoch([50] * 26, pack_tokens=100, packs_per_step=8, pool_studies=100)
    assert [len(pack) for pack in plan.step(0)] == [2] * 8
    assert sorted(len(pack) for pack in plan.step(1)) == [1] * 6 + [2] * 2
    # Nine packs of one study each cannot make two steps of eight.
    plan = plan_epoch([90] * 9, pack_tokens=100, packs_per_step=8, pool_studies=100)
    assert plan.num_steps == 1
    assert plan.left_over.size == 1


def test_a_study_larger_than_a_pack_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"study s1 has 101 .*raise pack_tokens to 101.*crop_vox"):
        plan_epoch(
            [5, 101],
            pack_tokens=100,
            packs_per_step=1,
            pool_studies=2,
            name=lambda position: f"s{position}",
        )
    with pytest.raises(ValueError, match="2 studies for 3 packs; lower packs_per_step"):
        plan_epoch([5, 6], pack_tokens=100, packs_per_step=3, pool_studies=2)
    with pytest.raises(ValueError, match="must have tokens"):
        plan_epoch([5, 0], pack_tokens=100, packs_per_step=1, pool_studies=2)
    with pytest.raises(ValueError, match="pool_studies must be >= 1"):
        plan_epoch([5], pack_tokens=100, packs_per_step=1, pool_studies=0)


def test_simulation_refuses_ranks_that_do_not_share_evenly() -> None:
    plan = plan_epoch([5] * 12, pack_tokens=10, packs_per_step=3, pool_studies=12)
    with pytest.raises(ValueError, match="multiple of the ranks, got 3"):
        simulate(plan, 2)
    assert simulate(plan, 3).imbalance == 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_first_fit_decreasing_is_the_textbook_rule(sizes: list[int]) -> None:
    room: list[int] = []
    expected = {}
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((n for n, r in enumerate(room) if r >= sizes[item]), len(room))
        if place == len(room):
            room.append(50)
        room[place] -= sizes[item]
        expected[item] = place
    found = first_fit_decreasing(np.array(sizes), 50)
    assert found.tolist() == [expected[i] for i in range(len(sizes))]


def test_packs_are_as_few_as_by_first_fit_decreasing_and_more_alike() -> None:
    tokens = hospital_tokens(2000)
    mixed, filled = pack_pool(tokens, 16_384), first_fit_decreasing(tokens, 16_384)
    assert mixed.max() <= 1.005 * filled.max()

    def spread(packs: npt.NDArray[np.int64]) -> float:
        costs = np.bincount(packs, weights=CostModel()(tokens))[:-2]
        return float(costs.std() / costs.mean())

    assert spread(mixed) < 0.5 * spread(filled)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_a_pool_is_packed_whole_and_within_the_budget(sizes: list[int]) -> None:
    packs = pack_pool(np.array(sizes), 50)
    loads = np.bincount(packs, weights=sizes)
    assert len(packs) == len(sizes)
    assert 0 < loads.min() <= loads.max() <= 50


def test_the_cost_model_decides_which_packs_share_a_step() -> None:
    tokens = [100] * 4 + [25] * 16
    plan = plan_epoch(
        tokens,
        pack_tokens=100,
        packs_per_step=4,
        pool_studies=20,
        cost=CostModel(linear=1.0, quadratic=1.0),
    )
    assert {len({len(pack) for pack in plan.step(s)}) for s in range(2)} == {1}
    assert simulate(plan, 4).imbalance == 1.0


def test_a_last_step_of_few_sizes_is_evened_out_by_swaps() -> None:
    lengths = np.array([864] * 12 * 96 + [635] * 140)
    costs = lengths * 3 + lengths**2 // 500
    dealt = spread_evenly(lengths, costs, 16_384, 96)
    assert dealt is not None
    swapped = dealt.copy()
    even_out(swapped, lengths, costs, 16_384)

    def worst(pack_N: npt.NDArray[np.int64]) -> float:
        loads = np.bincount(pack_N, weights=costs)
        return float(loads.max() / loads.mean())

    assert worst(dealt) > 1.025 > 1.015 > worst(swapped)
    assert np.array_equal(np.bincount(swapped), np.bincount(dealt)), "swaps keep the counts"


def test_a_swap_never_overfills_a_pack() -> None:
    lengths, costs = np.array([9, 1, 4, 6]), np.array([2, 9, 6, 1])
    packs = np.array([0, 0, 1, 1])
    even_out(packs, lengths, costs, 10)
    assert packs.tolist() == [0, 0, 1, 1], "either swap would make a pack of 13 tokens"
    even_out(packs, lengths, costs, 13)
    assert packs.tolist() != [0, 0, 1, 1] and np.bincount(packs, costs).max() < 11


def test_packs_are_split_until_there_are_enough() -> None:
    packs = split_packs(np.array([4, 4, 4, 7]), np.array([10, 30, 20, 50]), 4)
    assert sorted(np.bincount(packs)) == [1, 1, 1, 1]
