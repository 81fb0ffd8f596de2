"""`anycontrast plan`: what a configuration will need, before anything runs.

In: the manifest of a run, its shards if there are any, and the configuration. Out: one JSON-ready
dictionary; `plan_text` makes it readable. Order, packs and balance are made by the code the trainer
runs; what is assumed is named beside the numbers it enters.
"""

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast.model_cost import ModelCost, gpu_bytes, model_cost
from anycontrast_datasets.cost import CostModel
from anycontrast_datasets.plan import (
    RankPlan,
    StorageAssumptions,
    StoragePlan,
    plan_ranks,
    plan_storage,
    stored_voxels,
    studies_needed,
    tokens_by_volumes,
)
from anycontrast_datasets.plan_sizes import (
    SizeAssumptions,
    StudySizes,
    sizes_from_manifest,
    sizes_from_store,
)
from anycontrast_datasets.study import StudyError

if TYPE_CHECKING:
    from anycontrast.training.config import Config
    from anycontrast_datasets.manifest_table import ManifestTable
    from anycontrast_datasets.store.reader import StudyStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan is made for, and what it assumes."""

    gpus: int = 8
    """GPUs that the hours are for, one rank each; with too few studies for a step on so many, the
    nearest number that can be planned is taken, and the plan says so."""
    tflops_per_gpu: float = 989.0
    """Peak of one GPU in the precision of the run; 989 is an H100 in dense bf16."""
    mfu: float = 0.3
    """Share of the peak that training reaches."""
    ranks: list[int] = field(default_factory=lambda: [2**n for n in range(11)])
    """Numbers of ranks to simulate."""
    fit: bool = False
    """Measure the cost of packs on this machine and balance by it; else by counting operations."""
    sizes: SizeAssumptions = field(default_factory=SizeAssumptions)
    """Until there are shards."""
    storage: StorageAssumptions = field(default_factory=StorageAssumptions)
    """Until there are shards."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or any(n < 1 for n in self.ranks):
            raise ValueError(
                f"plan.gpus and plan.ranks must be >= 1, got {self.gpus} and {self.ranks}"
            )
        if not self.tflops_per_gpu > 0:
            raise ValueError(f"plan.tflops_per_gpu must be > 0, got {self.tflops_per_gpu}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"plan.mfu must be in (0, 1], got {self.mfu}")


def run_plan(config: "Config", options: PlanConfig) -> dict[str, Any]:
    """Plan pretraining on the manifest of a run.

    Raises:
        ManifestError: there is no usable manifest, or nothing to serve.
        ShardError: there are shards that cannot be used.
        StudyError: a study does not fit into a pack, or there are too few for a step.
    """
    from anycontrast_datasets.manifest_table import ManifestTable

    start_s = time.perf_counter()
    table = ManifestTable.open(config.paths.manifest / "manifest.parquet")
    stored = _Stored.find(config, table)
    sizes = _sizes(config, options, table, stored)
    model = model_cost(config.model, config.masking)
    cost = _measured_cost(config) if options.fit else model.flops
    ranks, skipped = _plan_ranks(config, options, sizes, cost)
    storage = _plan_storage(config, options, table, stored, sizes)
    own = min(ranks, key=lambda plan: abs(plan.stats.world_size - options.gpus))
    return {
        "studies": {
            "manifest": len(table),
            "served": len(sizes),
            "split": config.pretrain.stream.split,
        },
        "tokens": {
            "basis": sizes.basis,
            "by_volumes": tokens_by_volumes(sizes),
            "pack_tokens": config.pretrain.stream.pack_tokens,
        },
        "model": {"preset": config.model.preset, "parameters": model.num_parameters},
        "cost": {
            "ratio": _ratio(cost),
            "stream_ratio": _ratio(config.pretrain.stream.cost),
            "basis": "measured here" if options.fit else "by counting operations",
        },
        "memory": _memory(config, sizes, model, own, storage),
        "storage": asdict(storage),
        "training": _training(config, options, sizes, model, own, storage),
        "ranks": [{**asdict(plan), "stats": asdict(plan.stats)} for plan in ranks],
        "ranks_skipped": skipped,
        "assumed": {
            "tflops_per_gpu": options.tflops_per_gpu,
            "mfu": options.mfu,
            "gpus": own.stats.world_size,
            "gpus_asked": options.gpus,
        },
        "planned_in_s": time.perf_counter() - start_s,
    }


@dataclass(frozen=True)
class _Stored:
    """The shards of a run, if they were made of this manifest."""

    store: "StudyStore"
    folder: Path | None
    bytes_per_voxel: float | None

    @classmethod
    def find(cls, config: "Config", table: "ManifestTable") -> "_Stored | None":
        from anycontrast.shards import open_shards, shards_location
        from anycontrast_datasets.store.byte_source import LocalSource
        from anycontrast_datasets.store.volume_index import DATASET_NAME, read_dataset

        location = shards_location(config)
        folder = location if isinstance(location, Path) else None
        if folder is not None and not (folder / DATASET_NAME).is_file():
            return None
        store = open_shards(config)
        if folder is None:
            return cls(store, None, None)
        dataset = read_dataset(LocalSource(folder))
        if dataset.get("manifest_fingerprint") != table.fingerprint:
            store.close()
            logger.warning(
                "the shards in %s were made from another manifest; planning without them", folder
            )
            return None
        sizes = [int(shard["bytes"]) for shard in dataset.get("shards", [])]
        return cls(store, folder, sum(sizes) / stored_voxels(store) if sizes else None)


def _sizes(
    config: "Config", options: PlanConfig, table: "ManifestTable", stored: _Stored | None
) -> StudySizes:
    patch_vox = config.model.patch_vox
    if stored is not None:
        return sizes_from_store(stored.store, config.pretrain.stream, patch_vox)
    return sizes_from_manifest(
        table, config.pretrain.stream, config.prepare, patch_vox, options.sizes
    )


def _ratio(cost: CostModel) -> float:
    """Cost of a token squared over the cost of a token, which is all that balance depends on."""
    return cost.quadratic / max(cost.linear, 1e-9 * cost.quadratic)


def _measured_cost(config: "Config") -> CostModel:
    from anycontrast.measure_cost import measure_cost

    return measure_cost(config.model, config.masking)


def _plan_ranks(
    config: "Config", options: PlanConfig, sizes: StudySizes, cost: CostModel
) -> tuple[list[RankPlan], list[int]]:
    """Plan every number of ranks that has enough studies; return the others too."""
    stream = config.pretrain.stream
    wanted = sorted({*options.ranks, options.gpus})
    kept = [n for n in wanted if studies_needed(stream, n) <= len(sizes)]
    if not kept:
        raise StudyError(
            f"planning {', '.join(map(str, wanted))} ranks: a step takes at least "
            f"{min(studies_needed(stream, n) for n in wanted)} studies, the epoch has "
            f"{len(sizes)}; lower pretrain.stream.studies_per_step or packs_per_step",
            code="too_few_studies",
        )
    skipped = [n for n in wanted if n not in kept]
    return plan_ranks(sizes, stream, kept, seed=config.seed, cost=cost), skipped


def _plan_storage(
    config: "Config",
    options: PlanConfig,
    table: "ManifestTable",
    stored: _Stored | None,
    sizes: StudySizes,
) -> StoragePlan:
    num_volumes = int(table.num_volumes.sum())
    per_volume = float(sizes.voxels_N.sum() / sizes.volumes_N.sum())
    return plan_storage(
        num_studies=len(table),
        num_volumes=num_volumes,
        num_voxels=per_volume * num_volumes,
        studies_per_shard=config.shard.studies_per_shard,
        assumptions=options.storage,
        measured_bytes_per_voxel=None if stored is None else stored.bytes_per_voxel,
        shards_dir=None if stored is None else stored.folder,
    )


def _memory(
    config: "Config", sizes: StudySizes, model: ModelCost, own: RankPlan, storage: StoragePlan
) -> dict[str, Any]:
    """Estimate the memory of one rank: of its GPU, and of the threads that feed it."""
    stream = config.pretrain.stream
    pack_tokens = float(stream.pack_tokens or 0)
    if stream.pack_tokens is None:
        studies = own.studies_per_step / own.packs_per_step * stream.draws_per_study
        pack_tokens = max(studies * float(sizes.tokens_N.mean()), float(sizes.tokens_N.max()))
    packs = own.packs_per_step / own.stats.world_size
    if stream.crop_vox is None:
        # A pack holds whole boxes, which its draws share, and its studies are decoded into it.
        voxels_per_token = float(sizes.voxels_N.sum() / sizes.tokens_N.sum())
        pack_bytes = 2 * pack_tokens / stream.draws_per_study * voxels_per_token
        study_bytes = float(sizes.voxels_N.max()) * storage.bytes_per_voxel
    else:
        pack_bytes = 2 * pack_tokens * math.prod(config.model.patch_vox)
        study_bytes = float(sizes.voxels_N.max()) * (2 + storage.bytes_per_voxel)
    host = {
        "studies": stream.num_threads * study_bytes,
        "packs": (stream.prefetch_steps + 1) * packs * pack_bytes,
    }
    return {
        "pack_tokens": pack_tokens,
        "gpu_bytes": gpu_bytes(
            model,
            pack_tokens=pack_tokens,
            world_size=own.stats.world_size,
            zero_stage=config.pretrain.engine.zero_stage,
            pack_bytes=pack_bytes,
        ),
        "host_bytes": {**host, "total": sum(host.values())},
    }


def _training(
    config: "Config",
    options: PlanConfig,
    sizes: StudySizes,
    model: ModelCost,
    own: RankPlan,
    storage: StoragePlan,
) -> dict[str, float]:
    """Return steps, hours and bytes a second on the ranks of `own`."""
    stream = config.pretrain.stream
    flops = float(model.flops(sizes.tokens_N).mean()) * stream.draws_per_study
    rate = own.stats.world_size * options.tflops_per_gpu * 1e12 * options.mfu
    studies_per_s = rate / flops / own.stats.imbalance
    # Only packs that are filled by tokens end an epoch with a step.
    per_epoch = len(sizes) / own.studies_per_step
    if stream.pack_tokens is not None:
        per_epoch = float(own.stats.num_steps)
    steps = config.pretrain.steps or math.ceil(config.pretrain.epochs * per_epoch)
    epochs = steps / per_epoch
    served_bytes = storage.bytes_per_voxel * float(sizes.voxels_N.mean())
    return {
        "flops_per_study": flops,
        "studies_per_s": studies_per_s,
        "bytes_per_s": studies_per_s * served_bytes,
        "steps_per_epoch": per_epoch,
        "studies_per_step": own.studies_per_step,
        "steps": steps,
        "epochs": epochs,
        "hours": epochs * len(sizes) / studies_per_s / 3600,
    }
