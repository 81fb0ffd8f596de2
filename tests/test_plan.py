"""What a plan says, against what preparing, packing and training really do."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anycontrast.bench.synthetic_manifest import write_synthetic_manifest
from anycontrast.measure_cost import measure_cost
from anycontrast.model_cost import gpu_bytes, model_cost
from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.masking import MaskingConfig
from anycontrast.plan_text import render
from anycontrast.planning import PlanConfig, run_plan
from anycontrast.training.config import Config, load_config
from anycontrast_datasets.cost import CostModel
from anycontrast_datasets.manifest import write_manifest
from anycontrast_datasets.manifest_table import ManifestTable
from anycontrast_datasets.mixing import MixingConfig
from anycontrast_datasets.plan import StorageAssumptions, plan_ranks, plan_storage, studies_needed
from anycontrast_datasets.plan_sizes import (
    SizeAssumptions,
    sizes_from_manifest,
    sizes_from_store,
)
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.stream import StudyStream
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.study import ManifestError, ShardError, Study, StudyError, Volume

PATCH = (8, 8, 8)
RANKS = [2**n for n in range(11)]


def study(study_id: str, split: str, **shapes: tuple[int, int, int]) -> Study:
    affine = ((2.0, 0.0, 0.0, 0.0), (0.0, 2.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0, 0, 0, 1.0))
    volumes = tuple(
        Volume(contrast=c, location="", shape=shape, spacing_mm=(2.0, 2.0, 2.0), affine=affine)
        for c, shape in shapes.items()
    )
    return Study(
        study_id=study_id,
        dataset="d",
        subject_id=study_id,
        session_id="",
        split=split,
        volumes=volumes,
    )


def test_sizes_of_a_manifest_follow_reference_spacing_and_box() -> None:
    table = ManifestTable.from_studies(
        [
            study("a", "train", FLAIR=(9, 9, 9), T1w=(64, 80, 72)),
            study("b", "train", ADC=(40, 40, 40)),
            study("c", "val", T1w=(64, 64, 64)),
        ]
    )
    sizes = sizes_from_manifest(
        table,
        StreamConfig(),
        PrepareConfig(box_multiple_vox=16),
        (16, 16, 16),
        SizeAssumptions(box_share=1 / 8, occupied_share=0.5),
    )
    # T1w is the reference of a: 128 x 160 x 144 at 1 mm, half of every side, whole multiples of 16.
    assert sizes.voxels_N.tolist() == [2 * 64 * 80 * 80, 48**3]
    assert sizes.tokens_N.tolist() == [2 * round(4 * 5 * 5 * 0.5), round(27 * 0.5)]
    assert sizes.volumes_N.tolist() == [2, 1]
    assert list(map(str, sizes.study_ids)) == ["a", "b"]


def test_only_what_is_served_counts() -> None:
    table = ManifestTable.from_studies(
        [
            study("a", "train", FLAIR=(32, 32, 32), T1w=(32, 32, 32)),
            study("b", "train", ADC=(32, 32, 32)),
        ]
    )
    stream = StreamConfig(contrasts=["FLAIR"], crop_vox=(16, 16, 8), drop_empty=False)
    sizes = sizes_from_manifest(table, stream, PrepareConfig(), PATCH, SizeAssumptions())
    assert sizes.tokens_N.tolist() == [4]
    assert list(map(str, sizes.study_ids)) == ["a"]
    with pytest.raises(ManifestError, match="split 'test'"):
        sizes_from_manifest(
            table, StreamConfig(split="test"), PrepareConfig(), PATCH, SizeAssumptions()
        )


@pytest.mark.parametrize("draws", [1, 2])
def test_the_plan_has_the_packs_that_the_stream_serves(
    memory_store: Callable[..., Any], draws: int
) -> None:
    store, patch_vox = memory_store(30), (8, 8, 4)
    stream = StreamConfig(pack_tokens=16 * draws, packs_per_step=2, draws_per_study=draws)
    sizes = sizes_from_store(store, stream, patch_vox)
    (plan,) = plan_ranks(sizes, stream, [2], seed=3, cost=CostModel())
    with StudyStream(store, stream, patch_vox, seed=3) as served:
        assert served.steps_per_epoch == plan.stats.num_steps
        steps = [next(served) for _ in range(plan.stats.num_steps)]
        assert {step.epoch for step in steps} == {0}
        assert next(served).epoch == 1
    tokens = [pack.num_tokens for step in steps for pack in step.packs]
    assert np.sum(tokens) / len(tokens) / stream.pack_tokens == pytest.approx(plan.stats.fill)


def test_steps_of_a_number_of_studies_are_simulated_too(memory_store: Callable[..., Any]) -> None:
    stream = StreamConfig(studies_per_step=6, packs_per_step=2)
    sizes = sizes_from_store(memory_store(24), stream, PATCH)
    one, two, four = plan_ranks(sizes, stream, [1, 2, 4], seed=0, cost=CostModel())
    assert (one.packs_per_step, two.packs_per_step, four.packs_per_step) == (2, 2, 4)
    assert (two.stats.num_steps, four.studies_per_step, four.stats.num_steps) == (4, 12, 2)
    assert one.stats.imbalance == 1.0
    assert two.stats.imbalance >= 1.0


def test_a_step_larger_than_the_epoch_is_planned_as_it_is_served(
    memory_store: Callable[..., Any],
) -> None:
    stream = StreamConfig(studies_per_step=8, packs_per_step=2)
    store = memory_store(5)
    sizes = sizes_from_store(store, stream, PATCH)
    assert [studies_needed(stream, ranks) for ranks in (1, 2, 4)] == [1, 1, 16]
    (plan,) = plan_ranks(sizes, stream, [2], seed=0, cost=CostModel())
    assert (plan.studies_per_step, plan.stats.num_steps) == (8, 1)
    with StudyStream(store, stream, PATCH, seed=0) as served:
        assert sum(len(pack.study_ids) for pack in next(served).packs) == 8


def test_mixing_weights_enter_the_plan(memory_store: Callable[..., Any]) -> None:
    store = memory_store(24, datasets=("small", "large"), contrasts=(("T1w",), ("T1w", "FLAIR")))
    even = StreamConfig(pack_tokens=8)
    heavy = replace(even, mixing=MixingConfig(by_dataset={"large": 5.0}))
    sizes = sizes_from_store(store, even, PATCH)
    (plain,) = plan_ranks(sizes, even, [1], seed=0, cost=CostModel())
    (mixed,) = plan_ranks(sizes, heavy, [1], seed=0, cost=CostModel())
    # `large` has the studies of two contrasts.
    assert mixed.stats.num_steps > plain.stats.num_steps


def test_a_study_that_fits_no_pack_is_named(memory_store: Callable[..., Any]) -> None:
    stream = StreamConfig(pack_tokens=5)
    sizes = sizes_from_store(memory_store(6), stream, PATCH)
    with pytest.raises(ValueError, match=r"study s005 has 6 .*raise pack_tokens to 6"):
        plan_ranks(sizes, stream, [1], seed=0, cost=CostModel())


def test_storage_is_extrapolated_from_what_was_measured(tmp_path: Path) -> None:
    def plan(**options: Any) -> Any:
        return plan_storage(
            num_studies=100,
            num_volumes=250,
            num_voxels=1e9,
            studies_per_shard=32,
            assumptions=StorageAssumptions(bytes_per_voxel=0.5, sharding_cpu_s_per_volume=36.0),
            **options,
        )

    assumed = plan()
    assert (assumed.num_shards, assumed.disk_bytes, assumed.sharding_cpu_h) == (4, 5e8, 2.5)
    (tmp_path / "sharding.json").write_text(json.dumps({"studies": 8, "cpu_s_per_study": 72.0}))
    measured = plan(shards_dir=tmp_path, measured_bytes_per_voxel=0.25)
    assert (measured.disk_bytes, measured.sharding_cpu_h) == (2.5e8, 2.0)
    assert "measured 72 CPU s a study on 8 studies" in measured.sharding_basis
    (tmp_path / "sharding.json").write_text("{}")
    with pytest.raises(ShardError, match="damaged"):
        plan(shards_dir=tmp_path)


def test_parameters_are_the_models_and_memory_follows_zero() -> None:
    config = AMAEConfig(preset="tiny", patch_vox=PATCH)
    cost = model_cost(config, MaskingConfig())
    assert cost.num_parameters == sum(p.numel() for p in AMAE(config).parameters())
    states = [
        gpu_bytes(cost, pack_tokens=0, world_size=8, zero_stage=stage)["state"]
        for stage in range(4)
    ]
    assert states == sorted(states, reverse=True)
    assert states[0] == 18 * cost.num_parameters
    assert states[3] == 4 * cost.num_parameters
    plain, full = (
        gpu_bytes(cost, pack_tokens=64, world_size=8, zero_stage=0, pack_bytes=n) for n in (0, 500)
    )
    assert full["total"] == plain["total"] + 500
    recomputed = model_cost(replace(config, recompute=True), MaskingConfig())
    assert recomputed.activation_bytes_per_token < cost.activation_bytes_per_token
    assert recomputed.flops.linear > cost.flops.linear


def test_operations_are_those_a_profiler_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from anycontrast.measure_cost import _noise
    from anycontrast.models.masking import mask_batch

    for decoder in ("joint", "cross"):
        config = AMAEConfig(preset="tiny", patch_vox=PATCH, decoder=decoder)
        masking = MaskingConfig(hidden_fraction=0.75)
        pack = mask_batch(_noise([400], PATCH), masking, 0)
        model = AMAE(config)
        with FlopCounterMode(display=False) as counter:
            model(pack).loss_M.sum().backward()
        counted = counter.get_total_flops()
        # The counter knows no attention kernel of the CPU, so the linear part is compared.
        assert 400 * model_cost(config, masking).flops.linear == pytest.approx(counted, rel=0.15)


def test_measured_packs_give_a_cost_that_grows() -> None:
    cost = measure_cost(
        AMAEConfig(preset="tiny", patch_vox=PATCH),
        MaskingConfig(),
        packs=[(64,), (256,), (1024,), (512, 512)],
        device=torch.device("cpu"),
    )
    assert float(cost(1024)) > float(cost(64)) > 0


def planned(config: Config, **options: Any) -> dict[str, Any]:
    plan = run_plan(config, PlanConfig(**options))
    json.dumps(plan)
    return plan


def test_45000_studies_are_planned_without_a_voxel(tmp_path: Path) -> None:
    folder = tmp_path / "big" / "manifest"
    folder.mkdir(parents=True)
    write_synthetic_manifest(folder / "manifest.parquet", 45_000)
    config = load_config(
        None,
        [
            f"root={tmp_path}",
            "name=big",
            "pretrain.stream.pack_tokens=16384",
            "pretrain.stream.packs_per_step=1024",
            "pretrain.stream.pool_studies=8192",
        ],
    )
    plan = planned(config, gpus=64)
    assert plan["studies"] == {"manifest": 45_000, "served": 36_000, "split": "train"}
    assert [row["stats"]["world_size"] for row in plan["ranks"]] == RANKS
    for row in plan["ranks"]:
        assert row["packs_per_step"] == 1024
        # Six steps of which one takes what is left: longer epochs balance better.
        assert row["stats"]["imbalance"] <= 1.05
        assert row["stats"]["fill_whole_steps"] >= 0.97
    tokens = plan["tokens"]["by_volumes"]
    assert tokens["all"]["studies"] == 36_000
    assert tokens["1"]["mean"] < tokens["all"]["mean"] < tokens["6"]["mean"]
    assert plan["storage"]["num_shards"] == math.ceil(45_000 / 32)
    text = render(plan)
    share = plan["cost"]["ratio"]
    assert f"set pretrain.stream.cost.linear=1 pretrain.stream.cost.quadratic={share:.3g}" in text
    for words in ("36,000 served", "on 64 GPUs", "CPU hours", "989 TFLOP/s", "1,024"):
        assert words in text


def test_a_plan_uses_the_shards_it_finds(tiny_run: Config) -> None:
    plan = planned(tiny_run, gpus=1, ranks=[1, 2])
    assert plan["tokens"]["basis"] == "what the shards hold"
    assert plan["storage"]["bytes_basis"] == "measured on the shards"
    assert "measured" in plan["storage"]["sharding_basis"]
    sizes = [path.stat().st_size for path in tiny_run.paths.shards.glob("*.tar")]
    assert plan["storage"]["disk_bytes"] == pytest.approx(sum(sizes), rel=0.35)
    assert plan["training"]["steps"] == 4


def test_shards_of_another_manifest_are_left_aside(
    run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(run_copy)
    volumes = {"T1w": (24, 24, 24)}
    studies = [study(f"s{n}", "train", **volumes) for n in range(4)]
    write_manifest(studies, config.paths.manifest / "manifest.parquet")
    with caplog.at_level(logging.WARNING):
        plan = planned(config, gpus=1, ranks=[1, 1024])
    assert "made from another manifest" in caplog.text
    assert plan["tokens"]["basis"].startswith("the manifest, assuming")
    assert plan["ranks_skipped"] == [1024]
    assert "too few studies for a step on 1024 ranks" in render(plan)


def test_more_gpus_than_the_studies_feed_are_skipped_in_a_line(tiny_run: Config) -> None:
    plan = planned(tiny_run, gpus=4096, ranks=[1, 2, 4096])
    assert (plan["ranks_skipped"], plan["assumed"]["gpus"]) == ([4096], 2)
    same = planned(tiny_run, gpus=2, ranks=[2])
    assert plan["training"]["studies_per_s"] == same["training"]["studies_per_s"]
    assert "too few studies for a step on 4,096 GPUs, so this is for 2" in render(plan)
    with pytest.raises(StudyError, match="planning 4096 ranks: a step takes") as caught:
        planned(tiny_run, gpus=4096, ranks=[4096])
    assert "\n" not in str(caught.value)


def test_options_out_of_range_are_refused() -> None:
    for options, words in (
        ({"gpus": 0}, "plan.gpus"),
        ({"mfu": 1.5}, "plan.mfu"),
        ({"tflops_per_gpu": 0.0}, "plan.tflops_per_gpu"),
        ({"ranks": [0]}, "plan.ranks"),
    ):
        with pytest.raises(ValueError, match=words):
            PlanConfig(**options)
    with pytest.raises(ValueError, match=r"plan\.sizes\.box_share"):
        SizeAssumptions(box_share=0.0)
    with pytest.raises(ValueError, match=r"plan\.storage\.bytes_per_voxel"):
        StorageAssumptions(bytes_per_voxel=0.0)
