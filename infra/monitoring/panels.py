"""Dashboards of a run, its data and its nodes: one line per panel."""

from dataclasses import dataclass

_RUN = '{run=~"$run"}'


@dataclass(frozen=True)
class Panel:
    """One picture: what it shows, in which unit, as how many lines."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    """PromQL and the legend of its lines."""
    help: str
    kind: str = "timeseries"
    is_log: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One page of Grafana."""

    uid: str
    title: str
    panels: tuple[Panel, ...]
    has_run: bool = True
    """Whether one can choose the run."""


def _of_run(metric: str, how: str = "max") -> tuple[tuple[str, str], ...]:
    """One line per run: a restarted process sets a series of its own."""
    return ((f"{how} by (run, task) (ray_anycontrast_{metric}{_RUN})", "{{run}} {{task}}"),)


def _by(label: str, metric: str) -> tuple[tuple[str, str], ...]:
    query = f"max by (run, task, {label}) (ray_anycontrast_{metric}{_RUN})"
    return ((query, f"{{{{run}}}} {{{{{label}}}}}"),)


def _age(metric: str) -> tuple[tuple[str, str], ...]:
    query = f"time() - max by (run, task) (ray_anycontrast_{metric}_timestamp_seconds{_RUN})"
    return ((query, "{{run}} {{task}}"),)


def _node(expression: str, legend: str = "{{ip}}") -> tuple[str, str]:
    return (expression, legend)


_DONE = f"max by (run, task) (ray_anycontrast_step{_RUN})"
_PLANNED = f"max by (run, task) (ray_anycontrast_planned_steps{_RUN})"

TRAINING = Dashboard(
    "anycontrast-training",
    "anycontrast / Training",
    (
        Panel(
            "Progress",
            "percentunit",
            ((f"{_DONE} / {_PLANNED}", "{{run}} {{task}}"),),
            "Optimiser steps done of all.",
            kind="gauge",
        ),
        Panel("Last step", "s", _age("step"), "Time since a step was logged.", kind="stat"),
        Panel(
            "Checkpoint age",
            "s",
            _age("checkpoint"),
            "What a failure now would cost.",
            kind="stat",
        ),
        Panel("Restarts", "short", _of_run("restarts"), "Of the workers of a job.", kind="stat"),
        Panel("Skipped steps", "short", _of_run("skipped_steps"), "Not finite.", kind="stat"),
        Panel("Ranks", "short", _of_run("ranks"), "Training processes.", kind="stat"),
        Panel("Loss", "short", _of_run("loss"), "Mean over hidden patches.", is_log=True),
        Panel(
            "Loss by contrast",
            "short",
            _by("contrast", "contrast_loss"),
            "One contrast that rises alone points at its data.",
            is_log=True,
        ),
        Panel("Gradient norm", "short", _of_run("grad_norm"), "Before clipping.", is_log=True),
        Panel("Learning rate", "sci", _of_run("learning_rate"), "Of the schedule."),
        Panel(
            "Time of a step",
            "s",
            _by("rank", "step_seconds"),
            "Mean since the log line before; ranks wait for the slowest.",
        ),
        Panel("Tokens", "short", _of_run("tokens_per_second"), "A second, all ranks."),
        Panel(
            "Peak memory",
            "bytes",
            _by("rank", "memory_bytes"),
            "Of the rank's GPU; resident memory where there is none.",
        ),
        Panel(
            "Job and its ranks",
            "short",
            (
                (f"max by (run, task) (ray_anycontrast_job{_RUN})", "{{run}} {{task}} submitted"),
                (f"count by (run, task) (ray_anycontrast_step_seconds{_RUN})", "{{run}} ranks up"),
            ),
            "A job without ranks waits for nodes, GPUs or CPUs.",
        ),
    ),
)

DATA = Dashboard(
    "anycontrast-data",
    "anycontrast / Data",
    (
        Panel("Studies", "short", _of_run("studies_per_second"), "A second, all ranks."),
        Panel("Epoch", "short", _of_run("epoch"), "Of the newest step."),
        Panel(
            "Wait for data",
            "percentunit",
            _by("rank", "data_wait_share"),
            "Share of the time; above a few per cent reading limits training.",
        ),
        Panel("Wait for data, per step", "s", _by("rank", "data_wait_seconds"), "Mean of a rank."),
        Panel(
            "Contrasts served",
            "percentunit",
            _by("contrast", "contrast_share"),
            "Share of the studies that have a contrast.",
        ),
        Panel(
            "Datasets served",
            "percentunit",
            _by("dataset", "dataset_share"),
            "Share of the studies; compare with pretrain.stream.mixing.",
        ),
        Panel(
            "Studies left out",
            "short",
            _of_run("quarantined_studies"),
            "Could not be read; quarantine.jsonl names them.",
        ),
        Panel(
            "Network received",
            "Bps",
            (_node("sum by (ip) (ray_node_network_receive_speed)"),),
            "By node: shards from a store come this way.",
        ),
    ),
)

NODES = Dashboard(
    "anycontrast-nodes",
    "anycontrast / Nodes",
    (
        Panel(
            "CPU",
            "percent",
            (_node("max by (ip) (ray_node_cpu_utilization)"),),
            "Of all cores of a node.",
        ),
        Panel(
            "Memory",
            "percentunit",
            (_node("max by (ip) (ray_node_mem_used) / max by (ip) (ray_node_mem_total)"),),
            "Ray ends workers at 95 %.",
        ),
        Panel(
            "Shared memory",
            "bytes",
            (_node("max by (ip) (ray_node_mem_shared_bytes)"),),
            "/dev/shm and what processes share.",
        ),
        Panel(
            "Disk",
            "percent",
            (_node("max by (ip) (ray_node_disk_utilization_percentage)"),),
            "Ray stops placing work at 95 %.",
        ),
        Panel(
            "Disk reads",
            "Bps",
            (_node("max by (ip) (ray_node_disk_io_read_speed)"),),
            "Shards and cache.",
        ),
        Panel(
            "Disk writes",
            "Bps",
            (_node("max by (ip) (ray_node_disk_io_write_speed)"),),
            "Cache and checkpoints.",
        ),
        Panel(
            "Network sent",
            "Bps",
            (_node("sum by (ip) (ray_node_network_send_speed)"),),
            "By node.",
        ),
        Panel(
            "CPUs and GPUs in use",
            "short",
            (
                (
                    'sum by (Name) (ray_resources{State="USED", Name=~"CPU|GPU"})',
                    "{{Name}} used",
                ),
                (
                    'sum by (Name) (ray_resources{State="AVAILABLE", Name=~"CPU|GPU"})',
                    "{{Name}} free",
                ),
            ),
            "As Ray counts them.",
        ),
    ),
    has_run=False,
)

DASHBOARDS = (TRAINING, DATA, NODES)
