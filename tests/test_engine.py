"""The engine: same numbers at every ZeRO stage and world size, no step on non-finite gradients.

Run as a script, this file is one rank of the two-process test.
"""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anycontrast.training.engine import Engine, EngineConfig, resolve_precision
from anycontrast.training.optim import OptimConfig
from anycontrast.training.process_group import (
    gather_objects,
    process_group,
    rank,
    reduce_sums,
    world_size,
)
from anycontrast.training.task import Micro, Parts, Validation

ROOT = Path(__file__).parents[1]
STAGES = (0, 1, 2, 3)
# Two packs of unequal size; 13 and 3 divide by no world size, so ZeRO has to pad.
SIZES = (5, 2)


class Regression:
    """Summed squared error of a small net; the count is the number of rows."""

    kind = "toy"

    def __init__(self) -> None:
        self.model_config: dict[str, Any] = {}
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(
            nn.Linear(7, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 3)
        )

    def prepare(self, batch: Any, *, step: int, device: torch.device) -> Micro:
        return Micro(batch.to(device), len(batch), len(batch), ("study",))

    def loss(self, model: nn.Module, micro: Micro) -> tuple[Tensor, Parts]:
        loss = (model(micro.inputs) - 1).float().square().sum()
        return loss, {}

    def panels(self, model: nn.Module, micro: Micro, *, step: int, folder: Path) -> None:
        raise NotImplementedError

    def validate(self, model: nn.Module, *, step: int) -> Validation | None:
        return None


def packs_of(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(size, 7, generator=generator) for size in SIZES]


def build(stage: int, **changes: Any) -> Engine:
    packs = len(SIZES) // world_size()
    config = EngineConfig(zero_stage=stage, **changes)
    return Engine(Regression(), config, OptimConfig(lr=1e-2), accumulation=packs)


def run_step(engine: Engine, step: int, *, spoil: int | None = None) -> bool:
    """One step over both packs, wherever they are; `spoil` puts a NaN into that pack."""
    packs = packs_of(step)
    if spoil is not None:
        packs[spoil][0, 0] = math.nan
    own = packs[rank() * 2 // world_size() : (rank() + 1) * 2 // world_size()]
    (count,) = reduce_sums([float(sum(len(pack) for pack in own))], engine.device)
    for pack in own:
        loss, _ = engine.loss(Micro(pack, len(pack), len(pack), ("study",)))
        engine.backward(loss, count)
    return engine.step()


def reference(num_steps: int) -> dict[str, Tensor]:
    """The same training in plain PyTorch: one batch of all rows, torch's clipping and AdamW."""
    task = Regression()
    decayed = [p for p in task.model.parameters() if p.ndim >= 2]
    kept = [p for p in task.model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(num_steps):
        rows = torch.cat(packs_of(step))
        loss = (task.model(rows) - 1).square().sum() / len(rows)
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        adamw.step()
    return task.model.state_dict()


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(autouse=True, scope="module")
def _group() -> None:
    with process_group():
        pass


@pytest.mark.parametrize("stage", STAGES)
def test_accumulated_packs_train_like_one_plain_batch(stage: int) -> None:
    engine = build(stage)
    assert all(run_step(engine, step) for step in range(4))
    assert largest_difference(engine.full_state_dict(), reference(4)) < 1e-6
    assert engine.applied_steps() == 4


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("spoil", [0, 1])
def test_a_nan_skips_the_step_and_leaves_weights_and_moments(stage: int, spoil: int) -> None:
    engine = build(stage)
    assert run_step(engine, 0)
    weights, moments = engine.full_state_dict(), engine.optimizer_state()
    assert not run_step(engine, 1, spoil=spoil)
    assert not run_step(engine, 2, spoil=spoil)
    assert (engine.skipped_steps, engine.bad_steps_in_a_row) == (2, 2)
    assert largest_difference(engine.full_state_dict(), weights) == 0
    assert largest_difference(engine.optimizer_state(), moments) == 0
    assert run_step(engine, 1)
    assert engine.bad_steps_in_a_row == 0
    assert largest_difference(engine.full_state_dict(), reference(2)) < 1e-6


class InfiniteLoss(Regression):
    """A loss that is infinite while its gradient is finite."""

    def loss(self, model: nn.Module, micro: Micro) -> tuple[Tensor, Parts]:
        loss, parts = super().loss(model, micro)
        return loss + math.inf, parts


@pytest.mark.parametrize("stage", STAGES)
def test_an_infinite_loss_skips_the_step_though_its_gradient_is_finite(stage: int) -> None:
    task = InfiniteLoss()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    engine = Engine(task, EngineConfig(zero_stage=stage), OptimConfig(), accumulation=2)
    assert not run_step(engine, 0)
    assert largest_difference(engine.full_state_dict(), before) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_moments_move_to_any_stage_and_training_goes_on_alike(stage: int) -> None:
    first = build(1)
    run_step(first, 0)
    run_step(first, 1)
    task = Regression()
    task.model.load_state_dict(first.full_state_dict())
    second = Engine(task, EngineConfig(zero_stage=stage), OptimConfig(lr=1e-2), accumulation=2)
    second.load_optimizer_state(first.optimizer_state(), first.applied_steps())
    assert run_step(second, 2)
    assert second.applied_steps() == 3
    assert largest_difference(second.full_state_dict(), reference(3)) < 1e-6


def test_moments_of_another_model_are_refused() -> None:
    with pytest.raises(KeyError, match="weight/exp_avg"):
        build(1).load_optimizer_state({}, 1)


def test_bf16_computes_in_bf16_and_keeps_float32_weights() -> None:
    seen: list[torch.dtype] = []
    task = Regression()
    first = next(task.model.children())
    first.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    config = EngineConfig(precision="bf16", zero_stage=1)
    engine = Engine(task, config, OptimConfig(lr=1e-2), accumulation=2)
    assert run_step(engine, 0)
    assert set(seen) == {torch.bfloat16}
    assert {w.dtype for w in engine.full_state_dict().values()} == {torch.float32}
    assert 0 < largest_difference(engine.full_state_dict(), reference(1)) < 1e-2
    with engine.evaluation() as model:
        assert model(packs_of(0)[0]).dtype == torch.bfloat16
        assert not model.training
    assert model.training


def test_optimizer_offload_trains_alike() -> None:
    engine = build(1, offload_optimizer=True)
    assert all(run_step(engine, step) for step in range(2))
    assert largest_difference(engine.full_state_dict(), reference(2)) < 1e-6


def test_auto_precision_is_fp32_on_the_cpu_and_bf16_on_a_gpu() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    assert resolve_precision("fp32", torch.device("cuda")) == "fp32"


def test_nothing_is_built_and_the_extension_cache_is_not_shared() -> None:
    build(1)
    cache = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert Path.home() / ".cache" not in cache.parents
    assert not list(cache.rglob("*.so"))


def test_two_ranks_with_unequal_counts_give_the_weights_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("platform", "kernels", "datasets")),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**environment, "RANK": str(n), "LOCAL_RANK": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for n in range(2)
    ]
    try:
        logs = [process.communicate(timeout=120)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in ranks), "\n".join(logs)
    for stage in STAGES:
        weights = load_file(tmp_path / f"weights-{stage}.safetensors")
        assert largest_difference(weights, reference(3)) < 1e-6, stage
        # Saved by two ranks, gone on by one, at another stage.
        task = Regression()
        task.model.load_state_dict(weights)
        config = EngineConfig(zero_stage=(stage + 1) % 4)
        engine = Engine(task, config, OptimConfig(lr=1e-2), accumulation=2)
        engine.load_optimizer_state(load_file(tmp_path / f"moments-{stage}.safetensors"), 3)
        assert run_step(engine, 3)
        assert largest_difference(engine.full_state_dict(), reference(4)) < 1e-6, stage


def _train_as_a_rank(out: Path) -> None:
    for stage in STAGES:
        engine = build(stage)
        assert run_step(engine, 0)
        # A NaN in the pack of rank 1 alone: both ranks skip.
        assert not run_step(engine, 1, spoil=1)
        assert run_step(engine, 1)
        shares = gather_objects(engine.optimizer_state())
        assert not shares[0].keys() & shares[1].keys()
        weights = engine.full_state_dict()
        # From the saved state, in a new engine on the same two ranks.
        task = Regression()
        task.model.load_state_dict(gather_objects(weights)[0])
        again = Engine(task, EngineConfig(zero_stage=stage), OptimConfig(lr=1e-2))
        again.load_optimizer_state(shares[0] | shares[1], engine.applied_steps())
        assert run_step(again, 2)
        weights = again.full_state_dict()
        shares = gather_objects(again.optimizer_state())
        if rank() == 0:
            save_file(weights, out / f"weights-{stage}.safetensors")
            save_file(shares[0] | shares[1], out / f"moments-{stage}.safetensors")


if __name__ == "__main__":
    with process_group(timeout_s=60):
        _train_as_a_rank(Path(sys.argv[1]))
        dist.barrier()
    # What a rank computed is under test here, not how an interpreter with gloo threads goes down.
    sys.stdout.flush()
    os._exit(0)
