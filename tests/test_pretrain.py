"""Pretraining: the real model on real packs, on one process and on two, at every ZeRO stage.

Run as a script, this file is one rank of the two-process test.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from anycontrast.models.amae import AMAEConfig
from anycontrast.models.masking import MaskingConfig
from anycontrast.training import pretrain
from anycontrast.training.checkpoint import CheckpointError, latest, load_weights
from anycontrast.training.config import Config
from anycontrast.training.engine import Engine, EngineConfig
from anycontrast.training.loop import TrainingInterrupted
from anycontrast.training.metrics import read_metrics
from anycontrast.training.optim import OptimConfig
from anycontrast.training.pretrain import PretrainConfig, PretrainTask, pretrain_worker
from anycontrast.training.process_group import (
    gather_objects,
    process_group,
    rank,
    reduce_sums,
    world_size,
)
from anycontrast_datasets.intensity import pack_occupancy
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.store.slots import slot_array
from anycontrast_datasets.stream import StreamConfig
from anycontrast_datasets.study import ShardError, StudyArrays, StudyRecord, VolumeRecord
from anycontrast_kernels.dispatch import order_backend

ROOT = Path(__file__).parents[1]
PATCH = (4, 4, 4)
IDENTITY = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
MODEL = AMAEConfig(
    preset="tiny", patch_vox=PATCH, width=64, depth=1, num_heads=1, position_patch_mm=4.0
)
# Two ranks with nothing in common: {T1w, FLAIR} and {DWI} here, {ADC, SWI, unknown} there.
DISJOINT = (("T1w", "FLAIR"), ("DWI",), ("ADC", "SWI", "unknown"))


class MemoryStore:
    """Studies held in memory; damaged ones are refused like a store on disk refuses them."""

    def __init__(self, studies: Sequence[StudyArrays], damaged: Sequence[int] = ()) -> None:
        self.studies = tuple(studies)
        self.damaged = damaged
        self.fingerprint = f"memory-{len(self.studies)}"

    @property
    def records(self) -> tuple[StudyRecord, ...]:
        return tuple(study.record for study in self.studies)

    def read(
        self,
        index: int,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
        out: Mapping[str, npt.NDArray[np.int16]] | None = None,
    ) -> StudyArrays:
        study = self.studies[index]
        if index in self.damaged:
            raise ShardError(f"shard 0.tar, study {study.record.study_id}, member T1w: damaged")
        names = study.record.contrasts if contrasts is None else contrasts
        kept = tuple(volume for volume in study.record.volumes if volume.contrast in names)
        codes = {volume.contrast: study.codes[volume.contrast] for volume in kept}
        if out is not None:
            for name, array in codes.items():
                slot_array(out, name, array.shape)[...] = array
        return StudyArrays(replace(study.record, volumes=kept), codes)

    def verify(self) -> list[str]:
        return []


def make_study(number: int, contrasts: Sequence[str], *, split: str = "train") -> StudyArrays:
    rng = np.random.default_rng(number)
    shape = (8 + 8 * (number % 2), 8, 16)
    codes = {name: rng.integers(1, 4096, shape).astype(np.int16) for name in contrasts}
    volumes = tuple(
        VolumeRecord(
            contrast=name,
            scale=1.0,
            offset=0.0,
            p0_5=20.0,
            p99_5=4070.0,
            mean=2048.0,
            std=1180.0,
            num_foreground=int(np.prod(shape)),
            occupancy=pack_occupancy(codes[name]),
            source_spacing_mm=(1.0, 1.0, 1.0),
        )
        for name in contrasts
    )
    record = StudyRecord(
        study_id=f"phantom-{number:04d}-1",
        dataset="test",
        subject_id=f"{number:04d}",
        session_id="1",
        split=split,
        shape=shape,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=IDENTITY,
        volumes=volumes,
    )
    return StudyArrays(record, codes)


def disjoint_store() -> Any:
    return MemoryStore([make_study(n, names) for n, names in enumerate(DISJOINT)])


def make_config(root: Path, **changes: Any) -> Config:
    loop: dict[str, Any] = {
        "stream": StreamConfig(studies_per_step=2, packs_per_step=2, num_threads=1),
        "steps": 4,
        "log_every": 2,
        "checkpoint_every": 2,
        "panel_every": -1,
        "optim": OptimConfig(lr=1e-3),
        **changes,
    }
    return Config(name="test", root=str(root), seed=3, model=MODEL, pretrain=PretrainConfig(**loop))


def mixed_store() -> Any:
    studies = [
        make_study(0, ["T1w", "FLAIR", "T2w"]),
        make_study(1, ["DWI", "ADC"]),
        make_study(2, ["FLAIR"]),
        make_study(3, ["FLAIR", "unknown"], split="val"),
    ]
    return MemoryStore(studies)


@pytest.fixture
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = mixed_store()
    monkeypatch.setattr(pretrain, "open_shards", lambda config: store)


@pytest.mark.usefixtures("_store")
def test_pretrain_logs_per_contrast_and_set_and_draws_a_panel(tmp_path: Path) -> None:
    config = make_config(tmp_path, panel_every=0, steps=3)
    result = pretrain_worker(config)
    assert result["step"] == 3
    folder = config.paths.pretrain
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 3]
    keys = {key for line in lines for key in line}
    assert {"loss/contrast/FLAIR", "loss/contrast/ADC", "loss/set/DWI+ADC"} <= keys
    assert {"lr", "grad_norm", "tokens_per_s", "studies_per_s", "data_wait_s"} <= keys
    assert {"skipped_steps", "memory_bytes", "epoch"} <= keys
    assert lines[0]["memory_bytes"] > 2**20
    assert 0.1 < lines[0]["loss"] < 10
    assert (folder / "panels" / "step-00000003.png").read_bytes()[:4] == b"\x89PNG"
    weights, state = load_weights(folder / "checkpoints")
    assert state["kind"] == "amae"
    assert str(tmp_path) not in json.dumps(state)
    assert AMAEConfig(**{**state["model_config"], "patch_vox": PATCH}) == MODEL.resolved()
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(name.startswith("encoder.") for name in weights)


@pytest.mark.usefixtures("_store")
def test_four_steps_equal_two_and_a_resume_of_two_bitwise(tmp_path: Path) -> None:
    whole = make_config(tmp_path / "whole")
    pretrain_worker(whole)
    parted = make_config(tmp_path / "parted")
    stops = iter([False, True])
    with pytest.raises(TrainingInterrupted, match="after step 2 of 4"):
        pretrain_worker(parted, stop_requested=lambda: next(stops))
    pretrain_worker(parted)
    for name in ("model.safetensors", "engine/optimizer-00000-of-00001.safetensors"):
        one, other = (
            (c.paths.pretrain / "checkpoints" / "step-00000004" / name).read_bytes()
            for c in (whole, parted)
        )
        assert one == other, name


def damaged_store(*damaged: int) -> Any:
    return MemoryStore([make_study(n, ["T1w", "DWI"][n % 2 :]) for n in range(8)], damaged)


def skipping_config(root: Path, *, max_corrupt_fraction: float, **changes: Any) -> Config:
    stream = StreamConfig(
        studies_per_step=4,
        packs_per_step=4,
        num_threads=1,
        on_corrupt="skip",
        max_corrupt_fraction=max_corrupt_fraction,
    )
    return make_config(root, stream=stream, checkpoint_every=1, log_every=1, **changes)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("_store")
def test_attention_is_ordered_by_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrain\.attention must be one of fa4, .*'fastest'"):
        PretrainConfig(attention="fastest")
    ordered = make_config(tmp_path, steps=1, attention="torch")
    try:
        with pytest.raises(ValueError, match="the configured back end='torch' cannot run here"):
            pretrain_worker(ordered)
    finally:
        order_backend(None)


@pytest.mark.usefixtures("_store")
def test_init_from_takes_weights_and_refuses_another_model(tmp_path: Path) -> None:
    first = make_config(tmp_path / "first", steps=2)
    done = pretrain_worker(first)
    again = make_config(
        tmp_path / "again", steps=1, init_from=done["checkpoint"], optim=OptimConfig(lr=1e-12)
    )
    warm = pretrain_worker(again)
    before, _ = load_weights(Path(done["checkpoint"]))
    after, _ = load_weights(Path(warm["checkpoint"]))
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    shutil.rmtree(done["checkpoint"])
    on = replace(again, pretrain=replace(again.pretrain, steps=2))
    assert pretrain_worker(on)["step"] == 2
    start = replace(again.pretrain, init_from=warm["checkpoint"])
    wider = replace(again, name="wider", pretrain=start, model=replace(MODEL, width=128))
    with pytest.raises(CheckpointError, match="not of the configured model"):
        pretrain_worker(wider)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two ranks, each this file run as a script, have left their results."""
    out = tmp_path_factory.mktemp("ranks")
    run_ranks(out, 2)
    return out


def run_ranks(out: Path, num_ranks: int, timeout_s: float = 120.0) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(str(ROOT / part) for part in ("platform", "kernels", "datasets"))
    processes = []
    for number in range(num_ranks):
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(number),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_RANK": str(number),
        }
        command = [sys.executable, __file__, str(out)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=-1, stderr=subprocess.STDOUT)
        )
    try:
        logs = [process.communicate(timeout=timeout_s)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)


def train_disjoint(stage: int) -> dict[str, Any]:
    """Three steps on three studies without a common contrast, two packs however many ranks."""
    store = disjoint_store()
    packs = [
        pack_studies([store.read(i) for i in group], PATCH, epochs=[0] * len(group))
        for group in ((0, 1), (2,))
    ]
    mine = packs[rank() * 2 // world_size() : (rank() + 1) * 2 // world_size()]
    task = PretrainTask(MODEL, MaskingConfig(), seed=0, store=store)
    engine = Engine(
        task, EngineConfig(zero_stage=stage), OptimConfig(lr=1e-2), accumulation=len(mine)
    )
    losses = []
    for step in range(3):
        engine.set_lr(1e-2)
        micros = [task.prepare(pack, step=step, device=engine.device) for pack in mine]
        (count,) = reduce_sums([float(sum(m.count for m in micros))], engine.device)
        total = 0.0
        for micro in micros:
            loss, _ = engine.loss(micro)
            engine.backward(loss, count)
            total += float(loss.detach())
        assert engine.step()
        losses.append(sum(gather_objects(total)) / count)
    # A key's bias moves no softmax: its gradient is rounding noise, which AdamW blows up.
    weights = {k: v for k, v in engine.full_state_dict().items() if "qkv.bias" not in k}
    moments: dict[str, torch.Tensor] = {}
    for share in gather_objects(engine.optimizer_state()):
        moments |= share
    digest = {name: float(value.double().abs().sum()) for name, value in moments.items()}
    return {
        "losses": losses,
        "grad_norm": engine.grad_norm,
        "weights": {name: float(value.double().sum()) for name, value in weights.items()},
        "moments": digest,
    }


def test_disjoint_contrasts_on_two_ranks_train_alike_at_every_stage(ranks: Path) -> None:
    results = [json.loads((ranks / f"rank-{n}.json").read_text()) for n in range(2)]
    with process_group():
        alone = train_disjoint(1)
    assert alone["losses"][2] < alone["losses"][0]
    for stage in ("0", "1", "2", "3"):
        found = results[0][stage]
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5), stage
        assert found["losses"] == results[1][stage]["losses"]
        assert found["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert found["weights"] == pytest.approx(alone["weights"], abs=1e-4, rel=1e-4)
        assert found["moments"] == pytest.approx(alone["moments"], abs=1e-5, rel=1e-3)
        assert results[1][stage]["weights"] == {}


@pytest.mark.usefixtures("_store")
def test_two_ranks_stop_together_and_one_rank_goes_on_alike(ranks: Path, tmp_path: Path) -> None:
    """The packs of a step are the same for any world size, so the weights are too."""
    run = ranks / "run"
    found = latest(run / "test" / "pretrain" / "checkpoints")
    assert found is not None
    assert (found.step, found.state["world_size"], found.state["zero_stage"]) == (2, 2, 2)
    assert len(list((found.path / "engine").glob("optimizer-*-of-00002.safetensors"))) == 2
    assert pretrain_worker(make_config(run))["step"] == 4
    pretrain_worker(make_config(tmp_path))
    one, other = (
        load_weights(root / "test" / "pretrain" / "checkpoints")[0] for root in (run, tmp_path)
    )
    names = [name for name in one if "qkv.bias" not in name]
    assert max(float((one[name] - other[name]).abs().max()) for name in names) < 1e-4
    both, alone = (
        read_metrics(root / "test" / "pretrain" / "metrics.jsonl") for root in (run, tmp_path)
    )
    for there, here in zip(both, alone, strict=True):
        assert there.keys() == here.keys()
        for name in (key for key in here if key.startswith("loss")):
            assert there[name] == pytest.approx(here[name], rel=1e-4), name


def test_two_ranks_lose_a_study_and_train_as_one_rank_does(
    ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a rank's two packs one becomes a substitute; nobody hangs, and the weights agree."""
    monkeypatch.setattr(pretrain, "open_shards", lambda config: damaged_store(1, 6))
    config = skipping_config(tmp_path, max_corrupt_fraction=0.25)
    pretrain_worker(config)
    there = ranks / "lossy" / "test" / "pretrain"
    for name in ("audit.jsonl", "quarantine.jsonl"):
        assert read_lines(there / name) == read_lines(config.paths.pretrain / name)
    one, other = (
        load_weights(folder / "checkpoints")[1]["stream"]
        for folder in (there, config.paths.pretrain)
    )
    assert one == other
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (there, config.paths.pretrain)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_cap_ends_both_ranks_with_the_same_error(ranks: Path) -> None:
    errors = [(ranks / f"cap-{n}.txt").read_text() for n in range(2)]
    assert errors[0] == errors[1]
    assert "2 of 8 studies cannot be read" in errors[0]


def lose_studies(out: Path) -> None:
    """Train on two ranks with damaged studies: below the cap to the end, then above it."""
    pretrain.open_shards = lambda config: damaged_store(1, 6)  # type: ignore[attr-defined]
    pretrain_worker(skipping_config(out / "lossy", max_corrupt_fraction=0.25))
    try:
        pretrain_worker(skipping_config(out / "cap", max_corrupt_fraction=0.2))
    except ShardError as error:
        (out / f"cap-{rank()}.txt").write_text(str(error))


def stop_on_rank_1(out: Path) -> None:
    """Train on two ranks through the whole worker until rank 1 is asked to stop at step 2."""
    pretrain.open_shards = lambda config: mixed_store()  # type: ignore[attr-defined]
    config = make_config(out / "run", engine=EngineConfig(zero_stage=2))
    asked = iter([False, rank() == 1])
    try:
        pretrain_worker(config, stop_requested=lambda: next(asked))
    except TrainingInterrupted:
        return
    raise AssertionError(f"rank {rank()} was not stopped")


if __name__ == "__main__":
    with process_group(timeout_s=60):
        results = {str(stage): train_disjoint(stage) for stage in (0, 1, 2, 3)}
        Path(sys.argv[1], f"rank-{rank()}.json").write_text(json.dumps(results))
        stop_on_rank_1(Path(sys.argv[1]))
        lose_studies(Path(sys.argv[1]))
