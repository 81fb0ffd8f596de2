"""The loop: exact resume, stopping on request, non-finite steps, validation, what is written."""

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anycontrast.training.checkpoint import CheckpointError, latest, load_weights
from anycontrast.training.engine import EngineConfig
from anycontrast.training.loop import LoopConfig, TrainingError, TrainingInterrupted, run_loop
from anycontrast.training.metrics import read_metrics
from anycontrast.training.optim import OptimConfig
from anycontrast.training.process_group import process_group
from anycontrast.training.task import Micro, Parts, Validation
from anycontrast_datasets.stream import StepPacks

CONFIG = LoopConfig(
    steps=10, log_every=1, checkpoint_every=5, panel_every=-1, optim=OptimConfig(lr=1e-2)
)


class RowTask:
    """A net that learns rows of ones; draws from torch's global generator, so RNG state counts."""

    kind = "toy"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        self.model_config = {"width": 8}
        self.spoiled_steps: set[int] = set()
        self.scores: dict[int, float] = {}
        self.best = -1.0
        self.drawn: list[int] = []

    def prepare(self, batch: Any, *, step: int, device: torch.device) -> Micro:
        rows = batch + 0.01 * torch.randn(batch.shape)
        if step in self.spoiled_steps:
            rows[0, 0] = torch.nan
        return Micro(rows, len(rows), len(rows), (f"study-{step}",))

    def loss(self, model: nn.Module, micro: Micro) -> tuple[Tensor, Parts]:
        loss = (model(micro.inputs) - 1).square().sum()
        return loss, {"loss/half": (loss.detach() / 2, torch.tensor(float(micro.count)))}

    def panels(self, model: nn.Module, micro: Micro, *, step: int, folder: Path) -> None:
        assert not model.training
        self.drawn.append(step)

    def validate(self, model: nn.Module, *, step: int) -> Validation | None:
        if step not in self.scores:
            return None
        is_best = self.scores[step] > self.best
        self.best = max(self.best, self.scores[step])
        return Validation({"val/score": self.scores[step]}, is_best=is_best)


class RowStream:
    """Two packs a step, a pure function of the step."""

    num_studies = 8
    steps_per_epoch = 2.5

    def __init__(self, start_step: int, *, name: str = "rows") -> None:
        self._step = start_step
        self._name = name
        self.is_closed = False

    def __iter__(self) -> "RowStream":
        return self

    def __next__(self) -> Any:
        step, self._step = self._step, self._step + 1
        generator = torch.Generator().manual_seed(step)
        packs: Any = (
            torch.randn(3, 4, generator=generator),
            torch.randn(1, 4, generator=generator),
        )
        return StepPacks(step, packs, 0.25, step // 3)

    def __enter__(self) -> "RowStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.is_closed = True

    def state_dict(self, next_step: int) -> dict[str, object]:
        return {"name": self._name, "next_step": next_step}

    num_quarantined = 0
    damages = ()

    def restore(self, state: dict[str, object]) -> None:
        if state["name"] != self._name:
            raise ValueError(f"the saved data cursor is of another stream: {state['name']!r}")


def train(folder: Path, task: RowTask | None = None, **options: Any) -> dict[str, Any]:
    name = options.pop("name", "rows")
    stop = options.pop("stop_requested", None)
    save = options.pop("save_requested", None)

    def open_stream(start_step: int) -> Any:
        return RowStream(start_step, name=name)

    with process_group():
        return run_loop(
            task or RowTask(),
            open_stream,
            replace(CONFIG, **options),
            folder=folder,
            run_config={"name": "test"},
            extra_state={"from_scratch": True},
            stop_requested=stop,
            save_requested=save,
        )


def stop_after(step: int) -> Any:
    calls = iter(range(1, 10**6))
    return lambda: next(calls) >= step


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ten_steps_equal_five_and_a_resume_of_five_bitwise(tmp_path: Path, stage: int) -> None:
    engine = EngineConfig(zero_stage=stage)
    train(tmp_path / "whole", engine=engine)
    with pytest.raises(TrainingInterrupted, match="after step 5 of 10"):
        train(tmp_path / "parted", engine=engine, stop_requested=stop_after(5))
    torch.manual_seed(999)
    result = train(tmp_path / "parted", engine=engine)
    assert result["step"] == 10
    names = [
        "model.safetensors",
        "engine/optimizer-00000-of-00001.safetensors",
        "engine/rng-00000.json",
    ]
    for name in names:
        one, other = (
            (tmp_path / run / "checkpoints" / "step-00000010" / name).read_bytes()
            for run in ("whole", "parted")
        )
        assert one == other, name
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "parted")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def test_a_run_goes_on_at_another_zero_stage(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "moved", stop_requested=stop_after(5))
    train(tmp_path / "moved", engine=EngineConfig(zero_stage=3))
    one, other = (load_weights(tmp_path / run / "checkpoints")[0] for run in ("whole", "moved"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6


def test_a_checkpoint_that_is_asked_for_is_saved_after_the_step_and_training_goes_on(
    tmp_path: Path,
) -> None:
    calls = iter(range(1, 10**6))
    options = {"checkpoint_every": 100, "keep_last": 0}
    asked: Any = {"save_requested": lambda: next(calls) == 4, **options}
    assert train(tmp_path, **asked)["step"] == 10
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-00000004", "step-00000010"]


def test_a_crash_after_a_checkpoint_repeats_no_line_of_metrics(tmp_path: Path) -> None:
    task = RowTask()
    task.spoiled_steps = {7}

    def explode(*args: object, **kwargs: object) -> Any:
        raise RuntimeError("lost")

    task.panels = explode  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="lost"):
        train(tmp_path, task, panel_every=8)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")][-1] == 8
    train(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[7]["skipped_steps"] == 0


def test_metrics_and_state_hold_what_they_promise(tmp_path: Path) -> None:
    result = train(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["loss"] == result["loss"]
    assert lines[0]["loss/half"] == pytest.approx(lines[0]["loss"] / 2)
    assert lines[0]["data_wait_s"] == 0.25
    assert lines[0]["lr"] == pytest.approx(1e-2)
    assert lines[-1]["lr"] == pytest.approx(0)
    assert [line["epoch"] for line in lines[:4]] == [0, 0, 0, 1]
    assert list((tmp_path / "tensorboard").iterdir())
    _, state = load_weights(Path(result["checkpoint"]))
    assert state["kind"] == "toy"
    assert state["model_config"] == {"width": 8}
    assert state["config"] == {"name": "test"}
    assert state["stream"] == {"name": "rows", "next_step": 10}
    assert state["from_scratch"] is True
    assert state["versions"]["torch"] == torch.__version__
    assert not (tmp_path / "run.lock").exists()


def test_a_finished_run_is_left_as_it_is_and_more_steps_extend_it(tmp_path: Path) -> None:
    first = train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(tmp_path) == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert train(tmp_path, steps=12)["step"] == 12


def test_epochs_decide_where_steps_do_not(tmp_path: Path) -> None:
    assert train(tmp_path, steps=0, epochs=2.0)["step"] == 5


def test_sigterm_saves_at_the_next_step_and_the_run_goes_on(tmp_path: Path) -> None:
    task = RowTask()
    prepare = task.prepare

    def signalled(batch: Any, *, step: int, device: torch.device) -> Micro:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(batch, step=step, device=device)

    task.prepare = signalled  # type: ignore[method-assign]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match=r"after step 3 of 10.*step-00000003"):
        train(tmp_path, task)
    assert signal.getsignal(signal.SIGTERM) == handler
    found = latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 3
    assert train(tmp_path)["step"] == 10


def test_a_spoiled_step_is_skipped_counted_and_its_study_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = RowTask()
    task.spoiled_steps = {3, 4}
    with caplog.at_level(logging.WARNING):
        result = train(tmp_path, task)
    assert result["skipped_steps"] == 2
    assert "step 4 skipped on all ranks: loss not finite, studies study-3" in caplog.text
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines[2:6]] == [0, 1, 2, 2]
    assert "loss" not in lines[3]
    assert all(
        torch.isfinite(w).all() for w in load_weights(Path(result["checkpoint"]))[0].values()
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_many_spoiled_steps_in_a_row_stop_with_their_studies(tmp_path: Path, stage: int) -> None:
    task = RowTask()
    task.spoiled_steps = set(range(4, 100))
    with pytest.raises(TrainingError, match=r"step 7: the loss .* 3 steps in a row.*study-6"):
        train(tmp_path, task, engine=EngineConfig(zero_stage=stage, max_bad_steps=3))
    weights, _ = load_weights(tmp_path / "checkpoints")
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_the_best_checkpoint_is_named_and_outlives_newer_ones(tmp_path: Path) -> None:
    task = RowTask()
    task.scores = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.1, 10: 0.2}
    train(tmp_path, task, validate_every=2, checkpoint_every=1, keep_last=2)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"checkpoint": "step-00000004", "step": 4, "metrics": {"val/score": 0.9}}
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000009", "step-00000010"]
    scores = [r["val/score"] for r in read_metrics(tmp_path / "metrics.jsonl") if "val/score" in r]
    assert scores == [0.5, 0.9, 0.7, 0.1, 0.2]


@pytest.mark.parametrize(("every", "drawn"), [(-1, []), (0, [10]), (4, [4, 8, 10])])
def test_panels_are_drawn_when_due(tmp_path: Path, every: int, drawn: list[int]) -> None:
    task = RowTask()
    train(tmp_path, task, panel_every=every)
    assert task.drawn == drawn


def test_another_stream_or_model_is_refused_on_resume(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(CheckpointError, match="another stream: 'rows'"):
        train(tmp_path, name="other", steps=20)
    task = RowTask()
    task.model = nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match="not of the configured model"):
        train(tmp_path, task, steps=20)


def test_resume_off_refuses_a_used_folder(tmp_path: Path) -> None:
    train(tmp_path, resume=False)
    with pytest.raises(CheckpointError, match="resume is off"):
        train(tmp_path, resume=False)


def test_a_damaged_newest_checkpoint_costs_one_interval_only(tmp_path: Path) -> None:
    train(tmp_path)
    weights = tmp_path / "checkpoints" / "step-00000010" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert train(tmp_path)["step"] == 10
    assert weights.read_bytes() == whole


def test_the_first_log_line_says_what_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train(tmp_path, steps=1)
    line = next(r.getMessage() for r in caplog.records if "training toy with" in r.getMessage())
    for part in ("anycontrast 0.", "commit", "platform/anycontrast", "1 process(es) on", "ZeRO-1"):
        assert part in line
