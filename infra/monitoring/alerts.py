"""Alert rules of a run and its nodes: what is wrong, since when, what to do."""

from dataclasses import dataclass

RUN = "namespace, run, task"
"""What a run is told apart by; restarts change every other label. Two teams may have runs of one
name: the PodMonitors add the namespace, and where nobody adds one the label stays empty."""


@dataclass(frozen=True)
class Alert:
    """One rule of Prometheus."""

    name: str
    expr: str
    wait: str
    """How long it must hold."""
    severity: str
    summary: str
    remedy: str


def _age(metric: str) -> str:
    return f"time() - max by ({RUN}) (ray_anycontrast_{metric}_timestamp_seconds)"


def _growth(metric: str, window: str) -> str:
    """Growth over a window: a gauge begins anew with every process that sets it."""
    name = f"ray_anycontrast_{metric}[{window}]"
    return f"max by ({RUN}) (max_over_time({name})) - min by ({RUN}) (min_over_time({name}))"


_NODE = "by (SessionName, ip)"

ALERTS = (
    Alert(
        "AnycontrastNoStep",
        f"{_age('step')} > 900",
        "1m",
        "critical",
        "Run {{ $labels.run }} ({{ $labels.task }}) has logged no step for 15 minutes",
        "A rank hangs, or pretrain.log_every steps take longer than that. Look at the newest line "
        "of the job log and at the data wait by rank; a hung collective ends after "
        "cluster.timeout_s.",
    ),
    Alert(
        "AnycontrastCheckpointOld",
        f"{_age('checkpoint')} > 7200",
        "5m",
        "warning",
        "Run {{ $labels.run }} ({{ $labels.task }}) has no checkpoint of the last 2 hours",
        "A failure now costs that much work. Lower pretrain.checkpoint_every, or look in the job "
        "log for checkpoints that could not be written.",
    ),
    Alert(
        "AnycontrastRestartStorm",
        f"{_growth('restarts', '30m')} >= 3",
        "0m",
        "critical",
        "Run {{ $labels.run }} was started again 3 times or more within 30 minutes",
        "The job log names what ended each worker. Out of memory: lower "
        "pretrain.stream.pack_tokens or raise the memory of the workers. Lost nodes: look at the "
        "node's events.",
    ),
    Alert(
        "AnycontrastNotRunning",
        f"max by ({RUN}) (ray_anycontrast_job) unless max by ({RUN}) (ray_anycontrast_step)",
        "15m",
        "warning",
        "Run {{ $labels.run }} ({{ $labels.task }}) has waited 15 minutes for its workers",
        "The cluster lacks nodes, GPUs or CPUs for cluster.num_workers: `ray status` on the head "
        "says which. `anycontrast doctor` says what a node lacks.",
    ),
    Alert(
        "AnycontrastDataStall",
        f"max by ({RUN}) (ray_anycontrast_data_wait_share) > 0.3",
        "15m",
        "warning",
        "Run {{ $labels.run }} waits for data {{ $value | humanizePercentage }} of its time",
        "Reading or decoding is slower than training. Raise pretrain.stream.num_threads and the "
        "workers' CPUs, or keep shards in store.cache.folder on local disks.",
    ),
    Alert(
        "AnycontrastSkippedSteps",
        f"{_growth('skipped_steps', '30m')} > 10",
        "0m",
        "warning",
        "Run {{ $labels.run }} skipped {{ $value }} steps within 30 minutes",
        "Loss or gradient was not finite; the job log names the studies. Lower optim.lr, or check "
        "these studies with `anycontrast view`.",
    ),
    Alert(
        "AnycontrastQuarantine",
        f"max by ({RUN}) (ray_anycontrast_quarantined_studies) > 0",
        "0m",
        "warning",
        "Run {{ $labels.run }} left out {{ $value }} studies that could not be read",
        "quarantine.jsonl of the run names them. `anycontrast shard` makes damaged shards anew.",
    ),
    Alert(
        "AnycontrastSlow",
        f"max by ({RUN}) (ray_anycontrast_tokens_per_second) "
        f"< 0.5 * max by ({RUN}) (max_over_time(ray_anycontrast_tokens_per_second[6h]))",
        "30m",
        "warning",
        "Run {{ $labels.run }} trains at less than half of its best rate of 6 hours",
        "Compare step time and data wait by rank: one slow rank is a slow node, all ranks are "
        "network or storage.",
    ),
    Alert(
        "AnycontrastNodeMemory",
        f"max {_NODE} (ray_node_mem_used) / max {_NODE} (ray_node_mem_total) > 0.92",
        "5m",
        "warning",
        "Node {{ $labels.ip }} uses {{ $value | humanizePercentage }} of its memory",
        "Ray ends workers at 95 %. Lower pretrain.stream.num_threads or prefetch_steps, or raise "
        "the memory of the workers.",
    ),
    Alert(
        "AnycontrastNodeDisk",
        f"max {_NODE} (ray_node_disk_utilization_percentage) > 90",
        "5m",
        "warning",
        "A disk of node {{ $labels.ip }} is {{ $value | humanize }} % full",
        "Ray stops placing work at 95 %. Lower store.cache.max_bytes, or give the node a larger "
        "cache volume.",
    ),
)
