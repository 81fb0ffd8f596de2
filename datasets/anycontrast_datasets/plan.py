"""What a manifest will ask for: tokens, packs, steps, shards, disk and hours of sharding.

In: the sizes of the studies and the options of stream and shards. Out: plain numbers, with what
each rests on. Packs, steps and balance come from the code that the trainer itself runs, for any
number of ranks; nothing is read but tables.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anycontrast_datasets.cost import CostModel
from anycontrast_datasets.epoch_plan import PlanStats, plan_epoch, simulate
from anycontrast_datasets.mixing import strata, study_weights
from anycontrast_datasets.order import StudyOrder
from anycontrast_datasets.pack import assign_packs
from anycontrast_datasets.plan_sizes import Floats, Ints, StudySizes
from anycontrast_datasets.shard import COST_NAME
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.study import ShardError

MAX_SIMULATED_STEPS = 200
"""Where steps hold a number of studies; packs filled by tokens are planned for the whole epoch."""


@dataclass(frozen=True, kw_only=True)
class StorageAssumptions:
    """What storing costs until it was measured."""

    bytes_per_voxel: float = 0.65
    """Stored bytes per voxel of the box: int16, lz4hc-5, head half-filling the box."""
    sharding_cpu_s_per_volume: float = 1.05
    """Read, resample to 1 mm, mask, quantise, compress."""

    def __post_init__(self) -> None:
        for name in ("bytes_per_voxel", "sharding_cpu_s_per_volume"):
            if not getattr(self, name) > 0:
                raise ValueError(f"plan.storage.{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """An epoch on one number of ranks."""

    packs_per_step: int
    """As configured if it can be shared out; else one pack for every rank."""
    studies_per_step: float
    """Mean."""
    stats: PlanStats


@dataclass(frozen=True, kw_only=True)
class StoragePlan:
    """What the shards of the studies take."""

    num_shards: int
    shard_bytes: float
    """Mean."""
    disk_bytes: float
    bytes_per_voxel: float
    bytes_basis: str
    sharding_cpu_h: float
    sharding_basis: str


def tokens_by_volumes(sizes: StudySizes) -> dict[str, dict[str, float]]:
    """Return the spread of tokens of all studies, and of those with 1, 2, ... volumes."""
    groups = {"all": spread(sizes.tokens_N) | {"studies": float(len(sizes))}}
    for count in np.unique(sizes.volumes_N).tolist():
        tokens = sizes.tokens_N[sizes.volumes_N == count]
        groups[str(count)] = spread(tokens) | {"studies": float(len(tokens))}
    return groups


def spread(values: Floats) -> dict[str, float]:
    """Return mean, median, 99th percentile and maximum."""
    p50, p99 = (float(p) for p in np.percentile(values, (50, 99)))
    return {"mean": float(values.mean()), "p50": p50, "p99": p99, "max": float(values.max())}


def plan_ranks(
    sizes: StudySizes,
    stream: StreamConfig,
    world_sizes: Sequence[int],
    *,
    seed: int,
    cost: CostModel,
) -> list[RankPlan]:
    """Plan the first epoch for every number of ranks.

    Args:
        sizes: The studies.
        stream: How they are served; packs are balanced by its `cost`.
        world_sizes: Numbers of ranks.
        seed: Seed of the run.
        cost: What the studies really cost, for the balance that is reported.

    Raises:
        StudyError: a study is larger than a pack, or there are fewer studies than `studies_needed`
            where packs are filled by tokens.
    """
    order = _order(sizes, stream, seed)
    tokens = sizes.tokens_N[order]
    costs = cost(tokens) * stream.draws_per_study
    plans = {}
    found = []
    for world_size in world_sizes:
        packs = _packs_per_step(stream, world_size)
        if stream.pack_tokens is None:
            found.append(_count_plan(tokens, costs, stream, packs, world_size))
            continue
        if packs not in plans:
            plans[packs] = plan_epoch(
                tokens,
                pack_tokens=stream.pack_tokens,
                packs_per_step=packs,
                pool_studies=stream.pool_studies,
                copies=stream.draws_per_study,
                cost=stream.cost,
                seed=seed,
                name=lambda place: str(sizes.study_ids[int(order[place])]),
            )
        plan = plans[packs]
        found.append(
            RankPlan(
                packs_per_step=packs,
                studies_per_step=len(plan.positions) / plan.num_steps,
                stats=simulate(plan, world_size, costs_N=costs),
            )
        )
    return found


def studies_needed(stream: StreamConfig, world_size: int) -> int:
    """Return how many studies an epoch needs for every rank to have its part of a step.

    Steps of a number of studies run on into the next epoch, so that any epoch will do for a step as
    configured; one that was made larger to give every rank a pack should not need more than all.
    """
    packs = _packs_per_step(stream, world_size)
    if stream.pack_tokens is not None:
        return packs
    return 1 if packs == stream.packs_per_step else _studies_per_step(stream, packs)


def plan_storage(
    *,
    num_studies: int,
    num_volumes: int,
    num_voxels: float,
    studies_per_shard: int,
    assumptions: StorageAssumptions,
    measured_bytes_per_voxel: float | None = None,
    shards_dir: Path | None = None,
) -> StoragePlan:
    """Extrapolate shards, disk and sharding time to all studies of a manifest.

    Args:
        num_studies: Of the whole manifest.
        num_volumes: Of the whole manifest.
        num_voxels: Of all their volumes on the common grid.
        studies_per_shard: As configured.
        assumptions: Used where nothing was measured.
        measured_bytes_per_voxel: Bytes of shards over `stored_voxels`; None if there are none.
        shards_dir: Folder that an earlier sharding wrote its rate into; None if there is none.
    """
    cpu_s = assumptions.sharding_cpu_s_per_volume * num_volumes
    sharding_basis = f"assumed {assumptions.sharding_cpu_s_per_volume:g} CPU s a volume"
    if shards_dir is not None and (shards_dir / COST_NAME).is_file():
        per_study_s, measured_on = _measured_cpu_s(shards_dir / COST_NAME)
        cpu_s = per_study_s * num_studies
        sharding_basis = f"measured {per_study_s:.3g} CPU s a study on {measured_on} studies"
    bytes_per_voxel, bytes_basis = assumptions.bytes_per_voxel, "assumed"
    if measured_bytes_per_voxel is not None:
        bytes_per_voxel, bytes_basis = measured_bytes_per_voxel, "measured on the shards"
    disk_bytes = num_voxels * bytes_per_voxel
    num_shards = -(-num_studies // studies_per_shard)
    return StoragePlan(
        num_shards=num_shards,
        shard_bytes=disk_bytes / num_shards,
        disk_bytes=disk_bytes,
        bytes_per_voxel=bytes_per_voxel,
        bytes_basis=bytes_basis,
        sharding_cpu_h=cpu_s / 3600,
        sharding_basis=sharding_basis,
    )


def stored_voxels(store: StudyStore) -> float:
    """Return the voxels of all volumes of a store."""
    return float(sum(math.prod(r.shape) * len(r.volumes) for r in store.records))


def _packs_per_step(stream: StreamConfig, world_size: int) -> int:
    return stream.packs_per_step if stream.packs_per_step % world_size == 0 else world_size


def _studies_per_step(stream: StreamConfig, packs: int) -> int:
    return max(packs, round(stream.studies_per_step * packs / stream.packs_per_step))


def _order(sizes: StudySizes, stream: StreamConfig, seed: int) -> Ints:
    """Return the first epoch's studies in the order the stream serves them."""
    if stream.mixing.is_even:
        return StudyOrder(len(sizes), seed).epoch(0).study_N
    weights = study_weights(
        stream.mixing, sizes.dataset_names, sizes.dataset_N, sizes.contrast_set_N
    )
    groups = strata(sizes.dataset_N, sizes.contrast_set_N)
    return StudyOrder(len(sizes), seed, weights=weights, strata=groups).epoch(0).study_N


def _count_plan(
    tokens: Floats, costs: Floats, stream: StreamConfig, packs: int, world_size: int
) -> RankPlan:
    """Simulate steps of a fixed number of studies, shared out as `step_plan.CountPlanner` does.

    A step that is larger than the epoch takes studies of the next one, here in the same order.
    """
    per_step = _studies_per_step(stream, packs)
    ranks, filled = [], []
    for step in range(min(max(1, len(tokens) // per_step), MAX_SIMULATED_STEPS)):
        own = np.arange(step * per_step, (step + 1) * per_step) % len(tokens)
        groups = assign_packs(stream.cost(tokens[own]).tolist(), packs)
        ranks.append([costs[own][group].sum() for group in groups])
        filled.append([tokens[own][group].sum() for group in groups])
    loads = np.array(ranks).reshape(len(ranks), world_size, -1).sum(axis=2)
    ratio = loads.max(axis=1) / loads.mean(axis=1)
    fill = float(np.mean(filled) / np.max(filled))
    stats = PlanStats(
        world_size=world_size,
        num_steps=-(-len(tokens) // per_step),
        fill=fill,
        fill_whole_steps=fill,
        imbalance=float(loads.max(axis=1).sum() / loads.mean(axis=1).sum()),
        imbalance_p99=float(np.percentile(ratio, 99)),
        imbalance_max=float(ratio.max()),
    )
    return RankPlan(packs_per_step=packs, studies_per_step=float(per_step), stats=stats)


def _measured_cpu_s(path: Path) -> tuple[float, int]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return float(values["cpu_s_per_study"]), int(values["studies"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"planning: {path} is damaged ({error}); remove it, or run `anycontrast shard` again"
        ) from error
