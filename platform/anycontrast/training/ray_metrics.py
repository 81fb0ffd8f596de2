"""A run's numbers for Prometheus, through Ray: set where `metrics.jsonl` is written.

Every gauge of `GAUGES` appears on the metrics port of the node its process runs on, with `ray_`
before its name, and with the labels `run` and `task`; dashboards and alerts are made from the same
table. Ray exports a gauge only if it was set since the export before: a thread sets each one again
every few seconds; all of a process are gone half a minute after its end. Outside a process that is
connected to Ray nothing is set, and Ray is not imported.
"""

import math
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

PREFIX = "anycontrast_"
EXPORTED_PREFIX = "ray_" + PREFIX
"""What the names of `GAUGES` start with in Prometheus."""
_REPEAT_S = 3.0


@dataclass(frozen=True)
class GaugeInfo:
    """One number of a run."""

    name: str
    """Without a prefix; units end it."""
    help: str
    key: str = ""
    """Its name in `metrics.jsonl`, a prefix that ends in `/` where it has a label of its own;
    empty where it is set elsewhere."""
    label: str = ""
    """A third label beside `run` and `task`."""


GAUGES = (
    GaugeInfo("job", "1 while a job works on the run, also while it waits for its workers"),
    GaugeInfo("step", "Optimiser steps done"),
    GaugeInfo("planned_steps", "Optimiser steps of the whole run"),
    GaugeInfo("epoch", "Epoch the newest step belongs to", "epoch"),
    GaugeInfo("step_timestamp_seconds", "When the newest logged step ended, Unix time"),
    GaugeInfo("checkpoint_timestamp_seconds", "When the newest checkpoint was whole, Unix time"),
    GaugeInfo("loss", "Training loss, mean over what is predicted", "loss"),
    GaugeInfo("contrast_loss", "Training loss by contrast", "loss/contrast/", "contrast"),
    GaugeInfo("learning_rate", "Learning rate", "lr"),
    GaugeInfo("grad_norm", "Norm of the whole gradient before clipping", "grad_norm"),
    GaugeInfo("skipped_steps", "Steps skipped: loss or gradient not finite", "skipped_steps"),
    GaugeInfo("tokens_per_second", "Tokens trained on, all ranks", "tokens_per_s"),
    GaugeInfo("studies_per_second", "Studies trained on, all ranks", "studies_per_s"),
    GaugeInfo("contrast_share", "Share of studies with a contrast", "mix/contrast/", "contrast"),
    GaugeInfo("dataset_share", "Share of studies from a dataset", "mix/dataset/", "dataset"),
    GaugeInfo("quarantined_studies", "Studies left out because they could not be read"),
    GaugeInfo("ranks", "Training processes"),
    GaugeInfo("restarts", "Times the workers of this job were started again"),
    GaugeInfo("step_seconds", "Mean time of a step of this rank", label="rank"),
    GaugeInfo("data_wait_seconds", "Mean time per step this rank waited for data", label="rank"),
    GaugeInfo("data_wait_share", "Share of the time this rank waited for data", label="rank"),
    GaugeInfo("memory_bytes", "Peak memory: of the rank's GPU, or resident", label="rank"),
)
_OF_RANK = {
    "step_seconds": "step_s",
    "data_wait_seconds": "data_wait_s",
    "data_wait_share": "data_wait_share",
    "memory_bytes": "memory_bytes",
}


class RayMetrics:
    """The gauges of one process of a run, while the block lasts; nothing where there is no Ray.

    Args:
        run: Name of the run.
        task: What is trained, e.g. `amae`.
        rank: Of this process. Only rank 0 sets what belongs to the whole run.
    """

    def __init__(self, run: str, task: str, *, rank: int) -> None:
        self._tags = {"run": run, "task": task}
        self._rank = rank
        self._gauges = _gauges() if _is_connected() else {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._done = threading.Event()

    def __enter__(self) -> "RayMetrics":
        if self._gauges:
            threading.Thread(target=self._repeat, name="ray-metrics", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()

    def working(self) -> None:
        """Say that a job works on the run; for its driver, which lives as long as the job."""
        self._set("job", 1)

    def started(
        self, *, step: int, planned_steps: int, ranks: int, saved_s: float | None = None
    ) -> None:
        """Say where the run stands as it begins.

        Args:
            step: Steps done already.
            planned_steps: Steps of the whole run.
            ranks: Training processes.
            saved_s: When the checkpoint it resumes from was whole, Unix time; None where there is
                nothing to lose yet.
        """
        if self._rank == 0:
            now_s = time.time()
            self._set("step", step)
            self._set("planned_steps", planned_steps)
            self._set("ranks", ranks)
            self._set("step_timestamp_seconds", now_s)
            self._set("checkpoint_timestamp_seconds", now_s if saved_s is None else saved_s)

    def logged(
        self,
        step: int,
        values: Mapping[str, float],
        own: Mapping[str, float],
        *,
        quarantined_studies: int,
    ) -> None:
        """Set what a line of `metrics.jsonl` says.

        Args:
            step: Steps done.
            values: Of all ranks, by their keys in `metrics.jsonl`.
            own: Of this rank: `step_s`, `data_wait_s`, `data_wait_share`, `memory_bytes`.
            quarantined_studies: Studies that no rank could read, so far.
        """
        for name, key in _OF_RANK.items():
            self._set(name, own[key], rank=str(self._rank))
        if self._rank != 0:
            return
        self._set("step", step)
        self._set("step_timestamp_seconds", time.time())
        self._set("quarantined_studies", quarantined_studies)
        for info in GAUGES:
            if info.label and info.key:
                for key in (key for key in values if key.startswith(info.key)):
                    self._set(info.name, values[key], **{info.label: key[len(info.key) :]})
            elif info.key in values:
                self._set(info.name, values[info.key])

    def saved(self) -> None:
        """Note that a checkpoint is whole."""
        if self._rank == 0:
            self._set("checkpoint_timestamp_seconds", time.time())

    def restarted(self, times: int) -> None:
        """Note how often the workers of this job were started again."""
        if self._rank == 0:
            self._set("restarts", times)

    def _set(self, name: str, value: float, **labels: str) -> None:
        if self._gauges and math.isfinite(value):
            self._values[name, tuple(labels.items())] = float(value)
            self._gauges[name].set(float(value), tags={**self._tags, **labels})

    def _repeat(self) -> None:
        while not self._done.wait(_REPEAT_S):
            for (name, labels), value in list(self._values.items()):
                self._gauges[name].set(value, tags={**self._tags, **dict(labels)})


def _is_connected() -> bool:
    # Whoever is connected has imported it; a plain run pays nothing.
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _gauges() -> dict[str, Any]:
    from ray.util.metrics import Gauge

    return {
        info.name: Gauge(
            PREFIX + info.name,
            description=info.help,
            tag_keys=("run", "task", *([info.label] if info.label else [])),
        )
        for info in GAUGES
    }
