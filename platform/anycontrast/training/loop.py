"""The training loop, the same for pretraining and finetuning, on one process or many.

Comes in: a task, and a stream of packs that is a pure function of (seed, step). Goes out: a run
folder.

    <folder>/metrics.jsonl               one object per logged step; tensorboard/ beside it
    <folder>/audit.jsonl                 one object per finished epoch, see `data_log.py`
    <folder>/quarantine.jsonl            one object per study that could not be read
    <folder>/checkpoints/step-00000100/  after 100 steps, see `checkpoint.py`
    <folder>/panels/                     pictures
    <folder>/best.json                   {"checkpoint", "step", metrics}, where the task validates

A step whose loss or gradient is not finite on any rank is skipped on every rank and counted.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from anycontrast.log import OnProgress, progress
from anycontrast.training.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    find_resumable,
    load_model,
    load_optimizer,
    save,
    sweep,
)
from anycontrast.training.data_log import DataLog
from anycontrast.training.engine import Engine, EngineConfig
from anycontrast.training.metrics import Meter, MetricsWriter, read_metrics
from anycontrast.training.optim import OptimConfig, lr_at
from anycontrast.training.process_group import (
    from_rank_0,
    gather_objects,
    rank,
    reduce_sums,
    world_size,
)
from anycontrast.training.provenance import announce, versions
from anycontrast.training.ray_metrics import RayMetrics
from anycontrast.training.run_lock import RunLock
from anycontrast.training.stop_signal import stop_signal
from anycontrast.training.task import Micro, Parts, Task, Validation
from anycontrast_datasets.stream import StepPacks, StudyStream

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; running it again would meet the same."""


class TrainingInterrupted(RuntimeError):
    """Training was asked to stop and has saved its state; running it again goes on from there."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every training has; `PretrainConfig` extends it, finetuning fills one in."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    steps: int = 0
    """Optimiser steps; 0 means as many as `epochs` make."""
    epochs: float = 1.0
    """Passes over the training studies, where `steps` is 0."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; the last step is always logged."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    panel_every: int = 0
    """Steps between reconstruction pictures; 0 means at the last step only, -1 means none."""
    validate_every: int = 0
    """Steps between validations; 0 means at the last step only."""
    keep_last: int = 2
    """Newest checkpoints kept beside the best one; 0 means all."""
    resume: bool = True
    """Go on from the newest verified checkpoint of the run folder, if there is one."""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 0),
            ("log_every", 1),
            ("checkpoint_every", 1),
            ("panel_every", -1),
            ("validate_every", 0),
            ("keep_last", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.steps == 0 and not self.epochs > 0:
            raise ValueError(f"epochs must be > 0 where steps is 0, got {self.epochs}")


OpenStream = Callable[[int], StudyStream]
"""Opens the stream of this rank at a step; the loop closes it."""


def run_loop(
    task: Task,
    open_stream: OpenStream,
    config: LoopConfig,
    *,
    folder: Path,
    run_config: Mapping[str, Any],
    extra_state: Mapping[str, Any] | None = None,
    stop_requested: Callable[[], bool] | None = None,
    save_requested: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Train `task` until its last step; resume by itself. Every rank calls it alike.

    Needs a process group (`process_group.process_group`).

    Args:
        task: model, loss, pictures, validation.
        open_stream: called once, with the first step to serve.
        config: steps, intervals, optimiser, engine.
        folder: run folder, on a filesystem that all ranks share.
        run_config: JSON, stored in every checkpoint as `config`.
        extra_state: JSON, stored at the top level of every `state.json`.
        stop_requested: asked at every step besides SIGTERM; True on any rank stops all.
        save_requested: asked at every step; True on any rank saves a checkpoint after that step.

    Returns:
        `{"step", "checkpoint", "loss", "skipped_steps", "quarantined_studies"}`; `checkpoint` is a
        path as a string.

    Raises:
        TrainingError: too many non-finite steps in a row.
        ShardError: a study cannot be read, or too many, see `StreamConfig.on_corrupt`.
        AuditError: studies were lost or served twice in an epoch.
        TrainingInterrupted: asked to stop; the state is saved.
        CheckpointError: a checkpoint cannot be written or used, or another job holds the folder.
    """
    with ExitStack() as stack:
        from_rank_0(lambda: _enter(stack, folder))
        found = from_rank_0(lambda: _find_checkpoint(folder / "checkpoints", config.resume))
        start = found.step if found else 0
        stream = stack.enter_context(open_stream(start))
        num_steps = config.steps or math.ceil(config.epochs * stream.steps_per_epoch)
        if found is not None:
            _restore_stream(stream, found)
            if start >= num_steps:
                logger.info("reused %s: all %d steps are done already", folder, start)
                skipped = int(found.state["skipped_steps"])
                return _result(folder, found.step, found.path, skipped, stream.num_quarantined)
            load_model(found, task.model)
        stopping = stack.enter_context(stop_signal(stop_requested))
        run = _Run(task, stream, config, folder, num_steps, stopping)
        run.saving = save_requested or run.saving
        run.state = {
            "kind": task.kind,
            "model_config": dict(task.model_config),
            "config": dict(run_config),
            "versions": versions(),
            **(extra_state or {}),
        }
        name = str(run_config.get("name", folder.name))
        run.live = stack.enter_context(RayMetrics(name, task.kind, rank=rank()))
        run.start(stack, found)
        return run.train()


class _Run:
    """One job between its first and its last step."""

    state: dict[str, Any]
    live: RayMetrics

    def __init__(
        self,
        task: Task,
        stream: StudyStream,
        config: LoopConfig,
        folder: Path,
        num_steps: int,
        stopping: Callable[[], bool],
    ) -> None:
        self.task, self.stream, self.config = task, stream, config
        self.folder, self.num_steps, self.stopping = folder, num_steps, stopping
        self.saving: Callable[[], bool] = lambda: False
        self.meter = Meter()
        self.writer: MetricsWriter | None = None
        self.show: OnProgress = lambda done, total: None
        self.validation: Validation | None = None

    def start(self, stack: ExitStack, found: CheckpointInfo | None) -> None:
        """Build the engine, take over a checkpoint's optimiser, open the logs."""
        start = found.step if found else 0
        # Before the first step, whose damaged studies are to be logged too.
        self.data = DataLog(self.stream, self.folder, start_step=start)
        self.first = next(self.stream)
        self.engine = Engine(
            self.task, self.config.engine, self.config.optim, accumulation=len(self.first.packs)
        )
        saved_s = None
        announce(
            f"training {self.task.kind}",
            where=self.engine.device,
            zero_stage=self.engine.stage,
            precision=self.engine.precision,
        )
        if found is not None:
            load_optimizer(found, self.engine)
            saved_s = found.path.stat().st_mtime
            logger.info("resuming at step %d of %d from %s", found.step, self.num_steps, found.path)
        self.live.started(
            step=start, planned_steps=self.num_steps, ranks=world_size(), saved_s=saved_s
        )
        if rank() == 0:
            self.writer = stack.enter_context(MetricsWriter(self.folder, start_step=start))
            if sys.stderr.isatty():
                self.show = stack.enter_context(progress("training", "steps"))

    def train(self) -> dict[str, Any]:
        """Step until the last step or a request to stop."""
        for packs in chain([self.first], self.stream):
            micros, is_stopping, is_saving = self.step(packs)
            step = packs.step + 1
            is_last = step == self.num_steps
            if is_last or is_stopping or step % self.config.log_every == 0:
                self.log(step, packs.epoch)
            is_best = self.is_due(self.config.validate_every, step) and self.validate(step)
            is_due = step % self.config.checkpoint_every == 0
            if is_last or is_stopping or is_saving or is_best or is_due:
                path = self.save(step)
            if is_best:
                self.name_best(step, path)
            if self.is_due(self.config.panel_every, step):
                with self.engine.evaluation() as model:
                    panels = self.folder / "panels"
                    self.task.panels(model, micros[0], step=step, folder=panels)
            if is_last:
                skipped = self.engine.skipped_steps
                return _result(self.folder, step, path, skipped, self.stream.num_quarantined)
            if is_stopping:
                raise TrainingInterrupted(
                    f"stopped on request after step {step} of {self.num_steps}; saved {path}, run "
                    "the same command to go on"
                )
        raise AssertionError("the stream is endless")

    def step(self, packs: StepPacks) -> tuple[list[Micro], bool, bool]:
        """One optimiser step over all packs of all ranks; also whether to stop, and to save."""
        engine, start_s = self.engine, time.perf_counter()
        engine.set_lr(lr_at(packs.step, self.num_steps, self.config.optim))
        micros = [
            self.task.prepare(batch, step=packs.step, device=engine.device) for batch in packs.packs
        ]
        own_count = float(sum(micro.count for micro in micros))
        # One sum for all: every rank learns the global count, whether anyone is to stop or to save,
        # and whether anyone met a damaged study.
        own = [own_count, self.stopping(), self.saving(), len(packs.damages)]
        summed = reduce_sums([float(value) for value in own], engine.device)
        count, num_stopping, num_saving, num_damages = summed
        parts: list[Parts] = []
        for micro in micros:
            loss, found = engine.loss(micro)
            engine.backward(loss, max(count, 1.0))
            parts.append({"loss": (loss.detach(), loss.new_tensor(float(micro.count))), **found})
        is_applied = engine.step()
        self.meter.add_step(
            micros, parts, data_wait_s=packs.data_wait_s, is_applied=is_applied, mix=packs.mix
        )
        if not is_applied:
            self.report_bad_step(packs.step + 1, micros, parts)
        self.data.note(packs, num_damages=int(num_damages))
        self.show(packs.step + 1, self.num_steps)
        logger.debug("step %d took %.3f s", packs.step + 1, time.perf_counter() - start_s)
        return micros, num_stopping > 0, num_saving > 0

    def report_bad_step(self, step: int, micros: list[Micro], parts: list[Parts]) -> None:
        """Name the studies of a skipped step; stop when there are too many in a row."""
        own = [
            study
            for micro, found in zip(micros, parts, strict=True)
            if not math.isfinite(float(found["loss"][0]))
            for study in micro.study_ids
        ]
        suspects = [study for studies in gather_objects(own) for study in studies]
        everyone = [
            s for ids in gather_objects([m.study_ids for m in micros]) for i in ids for s in i
        ]
        what = "loss" if suspects else "gradient"
        logger.warning(
            "step %d skipped on all ranks: %s not finite, studies %s",
            step,
            what,
            ", ".join(suspects or everyone),
        )
        if self.engine.bad_steps_in_a_row >= self.config.engine.max_bad_steps:
            raise TrainingError(
                f"training stopped at step {step}: the {what} was not finite in "
                f"{self.engine.bad_steps_in_a_row} steps in a row, last with studies "
                f"{', '.join(suspects or everyone)}; lower optim.lr, or check these studies"
            )

    def log(self, step: int, epoch: int) -> None:
        """Write one line of metrics; every rank takes part."""
        values = self.meter.flush()
        values |= {
            "epoch": float(epoch),
            "lr": lr_at(step - 1, self.num_steps, self.config.optim),
            "grad_norm": self.engine.grad_norm,
            "skipped_steps": float(self.engine.skipped_steps),
        }
        self.live.logged(
            step, values, self.meter.own, quarantined_studies=self.stream.num_quarantined
        )
        if self.writer is None:
            return
        self.writer.write(step, values)
        if not sys.stderr.isatty():
            logger.info(
                "step %d of %d: loss %.4f, %.0f tokens/s, %.2f studies/s, waited %.3f s for data",
                step,
                self.num_steps,
                values.get("loss", math.nan),
                values["tokens_per_s"],
                values["studies_per_s"],
                values["data_wait_s"],
            )

    def is_due(self, every: int, step: int) -> bool:
        """Whether something done every `every` steps (0: at the end, -1: never) is due."""
        return every >= 0 and (step == self.num_steps or (every > 0 and step % every == 0))

    def validate(self, step: int) -> bool:
        """Validate; whether this is the best model so far."""
        with self.engine.evaluation() as model:
            own = self.task.validate(model, step=step)
        self.validation = from_rank_0(lambda: own)
        if self.validation is None:
            return False
        if self.writer is not None:
            self.writer.write(step, self.validation.metrics)
            numbers = ", ".join(f"{k} {v:.4f}" for k, v in self.validation.metrics.items())
            logger.info("step %d of %d: %s", step, self.num_steps, numbers)
        return self.validation.is_best

    def save(self, step: int) -> Path:
        """Write the checkpoint of `step`."""
        state = {**self.state, "stream": self.data.state(step), "num_steps": self.num_steps}
        best = _read_best(self.folder)
        path = save(
            self.folder / "checkpoints",
            self.engine,
            step=step,
            state=state,
            keep_last=self.config.keep_last,
            pinned=frozenset({str(best["checkpoint"])} if best else ()),
        )
        self.live.saved()
        return path

    def name_best(self, step: int, path: Path) -> None:
        """Point `best.json` at a saved checkpoint."""
        assert self.validation is not None
        if rank() != 0:
            return
        values = {"checkpoint": path.name, "step": step, "metrics": dict(self.validation.metrics)}
        temporary = self.folder / "best.json.tmp"
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
        temporary.replace(self.folder / "best.json")


def _enter(stack: ExitStack, folder: Path) -> None:
    stack.enter_context(RunLock(folder))
    sweep(folder / "checkpoints")


def _find_checkpoint(root: Path, is_resuming: bool) -> CheckpointInfo | None:
    if is_resuming:
        return find_resumable(root)
    if root.is_dir() and any(root.iterdir()):
        raise CheckpointError(
            f"{root} holds checkpoints and resume is off; choose another run name, remove that "
            "folder, or set resume=true"
        )
    return None


def _restore_stream(stream: StudyStream, found: CheckpointInfo) -> None:
    try:
        stream.restore(found.state["stream"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"resuming from {found.path}: {error}") from error


def _read_best(folder: Path) -> dict[str, Any] | None:
    path = folder / "best.json"
    best: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return best


def _result(
    folder: Path, step: int, path: Path, skipped_steps: int, num_quarantined: int
) -> dict[str, Any]:
    losses = [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    return {
        "step": step,
        "checkpoint": str(path),
        "loss": losses[-1] if losses else None,
        "skipped_steps": skipped_steps,
        "quarantined_studies": num_quarantined,
    }
