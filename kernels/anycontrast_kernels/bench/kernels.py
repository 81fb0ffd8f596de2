"""Attention, loss and patch kernels side by side on the machine at hand: `bench kernels`.

Every back end that runs here, and what people do without them, on packs of equal lengths and on a
realistic mixed one, forward and backward; useful work only, against what large matrix products and
copies reach in the same run.
"""

import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from anycontrast_kernels.bench import tables
from anycontrast_kernels.bench.attention_ways import Case, attention_ways
from anycontrast_kernels.bench.clock import Ceiling, Seconds, measure_ceiling, time_together
from anycontrast_kernels.bench.environment import environment
from anycontrast_kernels.bench.memory_ways import memory_cases
from anycontrast_kernels.bench.mixed import mixed_lengths
from anycontrast_kernels.bench.plot import throughput_plot

logger = logging.getLogger(__name__)

BACKWARD_FLOP = 2.5
"""Useful work of the backward pass over that of the forward pass."""
GOALS_TFLOP_S = {(64, "forward"): 390.0, (128, "forward"): 440.0, (64, "backward"): 290.0}
GOALS_TFLOP_S[128, "backward"] = 320.0
"""Of our Triton kernels on an H100 or H200, bfloat16, sequences of 4096 tokens and more."""
GOAL_LENGTH = 4096
GOAL_VARLEN = 0.9
GOAL_COPY = 0.8


@dataclass(frozen=True, kw_only=True)
class KernelsBenchConfig:
    """What is measured. 0 and empty mean: as the device can bear, much less on a CPU."""

    folder: str = "runs/bench/kernels"
    """Where the tables are saved: kernels.json, kernels.md, kernels-*.svg."""
    device: str = ""
    """`cuda` or `cpu`; empty takes a GPU if there is one."""
    dtype: Literal["bfloat16", "float16", "float32", ""] = ""
    """Empty: bfloat16 on a GPU, float32 on a CPU."""
    head_dims: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = ()
    """Equal lengths to try; empty: 512 to 32768 on a GPU, 256 to 2048 on a CPU."""
    num_tokens: int = 0
    """Tokens of a pack: 32768 on a GPU, 2048 on a CPU."""
    width: int = 0
    """Heads x head dim: 2048 on a GPU, 384 on a CPU."""
    num_patches: int = 0
    """Patches of 16 x 16 x 16 voxels for loss and patches: 16384 on a GPU, 512 on a CPU."""
    ways: tuple[str, ...] = ()
    """Ways to measure, of those that run here; empty: all."""
    budget_s: float = 0.2
    """Time for one way on one case, 5 calls at least."""

    def __post_init__(self) -> None:
        if self.device not in ("", "cpu", "cuda"):
            raise ValueError(f"device: must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: there is no CUDA device here; use device=cpu")
        if self.dtype not in ("", "bfloat16", "float16", "float32"):
            raise ValueError(f"dtype: must be bfloat16, float16 or float32, got {self.dtype!r}")
        if min(self.num_tokens, self.width, self.num_patches) < 0 or self.budget_s <= 0:
            raise ValueError("num_tokens, width, num_patches: must be >= 0, and budget_s > 0")
        if not self.head_dims or any(n < 32 or n % 8 for n in self.head_dims):
            raise ValueError(f"head_dims: must be multiples of 8 from 32, got {self.head_dims}")


def run(config: KernelsBenchConfig) -> dict[str, Any]:
    """Measure, save and return the tables as numbers and as Markdown."""
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, config.dtype or ("bfloat16" if on_gpu else "float32"))
    ceiling = measure_ceiling(device, dtype, config.budget_s)
    attention: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for case in _cases(config, device, dtype):
        rows, refusals = _attention_rows(case, config, ceiling)
        attention += rows
        left_out |= refusals
    num_patches = config.num_patches or (16384 if on_gpu else 512)
    memory = _memory_rows(device, dtype, num_patches, config.budget_s, ceiling)
    result = {
        "environment": environment(device, dtype),
        "ceiling": {
            "tflop_s": ceiling.flop_per_s / 1e12,
            "gb_s": ceiling.bytes_per_s / 1e9,
        },
        "attention": attention,
        "left_out": left_out,
        "memory": memory,
        "bars": _bars(attention, memory) if on_gpu else {},
    }
    result["markdown"] = tables.kernel_tables(result)
    result["files"] = _save(Path(config.folder), result)
    return result


def _cases(config: KernelsBenchConfig, device: torch.device, dtype: torch.dtype) -> list[Case]:
    on_gpu = device.type == "cuda"
    num_tokens = config.num_tokens or (32768 if on_gpu else 2048)
    width = config.width or (2048 if on_gpu else 384)
    shortest, longest = (512, 32768) if on_gpu else (256, 2048)
    doubled = [shortest << n for n in range(16) if shortest << n <= min(longest, num_tokens)]
    uniform = {str(n): (n,) * max(1, num_tokens // n) for n in config.lengths or doubled}
    packs = {**uniform, "mixed": mixed_lengths(num_tokens)}
    return [
        Case(name, head_dim, max(1, width // head_dim), lengths, dtype, device)
        for head_dim in config.head_dims
        for name, lengths in packs.items()
    ]


def _attention_rows(
    case: Case, config: KernelsBenchConfig, ceiling: Ceiling
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time every way forward and backward; returns rows, and why ways are missing."""
    logger.info("attention: head dim %d, lengths %s", case.head_dim, case.name)
    ways, refusals = attention_ways(case, config.ways)
    q, k, v, grad = case.inputs()
    forward = {name: partial(way, q, k, v) for name, way in ways.items()}
    times, failures = time_together(forward, case.device, config.budget_s)
    kept = {name: ways[name](q, k, v) for name in times}
    backward = {
        name: partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
        for name, out in kept.items()
    }
    backward_times, backward_failures = time_together(backward, case.device, config.budget_s)
    refusals |= failures | {f"{name} backward": why for name, why in backward_failures.items()}
    rows = []
    for name, forward_time in times.items():
        row: dict[str, Any] = {"head_dim": case.head_dim, "lengths": case.name, "way": name}
        row |= _speed("forward", forward_time, case, 1.0, 4, ceiling)
        if name in backward_times:
            row |= _speed("backward", backward_times[name], case, BACKWARD_FLOP, 8, ceiling)
        rows.append(row)
    return rows, refusals


def _speed(
    name: str, time: Seconds, case: Case, work: float, tensors: int, ceiling: Ceiling
) -> dict[str, float]:
    """Numbers of one direction: `work` times the FLOP of the case, `tensors` read or written."""
    flop_per_s = work * case.flop / time.used(case.device)
    return {
        f"{name}_ms": 1e3 * time.wall,
        f"{name}_cpu_ms": 1e3 * time.cpu,
        f"{name}_tflop_s": flop_per_s / 1e12,
        f"{name}_gb_s": tensors * case.tensor_bytes / time.used(case.device) / 1e9,
        f"{name}_share": flop_per_s / ceiling.flop_per_s,
    }


def _memory_rows(
    device: torch.device, dtype: torch.dtype, num_patches: int, budget_s: float, ceiling: Ceiling
) -> list[dict[str, Any]]:
    cases = {f"{c.name}, {c.way}": c for c in memory_cases(device, dtype, num_patches)}
    times, failures = time_together({n: c.call for n, c in cases.items()}, device, budget_s)
    rows: list[dict[str, Any]] = []
    for key, case in cases.items():
        row: dict[str, Any] = {"operation": case.name, "way": case.way}
        if key in failures:
            rows.append({**row, "failed": failures[key]})
            continue
        bytes_per_s = case.num_bytes / times[key].used(device)
        row |= {"ms": 1e3 * times[key].wall, "cpu_ms": 1e3 * times[key].cpu}
        row["gb_s"] = bytes_per_s / 1e9
        rows.append({**row, "share": bytes_per_s / ceiling.bytes_per_s})
    return rows


def _bars(attention: list[dict[str, Any]], memory: list[dict[str, Any]]) -> dict[str, Any]:
    """What our kernels reached of the goals for an H100 or H200."""
    bars: dict[str, Any] = {}
    ours = [row for row in attention if row["way"] == "triton"]
    for (head_dim, direction), goal in GOALS_TFLOP_S.items():
        key = f"{direction}_tflop_s"
        speeds = {r["lengths"]: r.get(key, 0.0) for r in ours if r["head_dim"] == head_dim}
        long = [speed for n, speed in speeds.items() if n.isdigit() and int(n) >= GOAL_LENGTH]
        if long:
            bars[f"triton_{direction}_{head_dim}"] = _at_least(min(long), goal)
        if "mixed" in speeds and str(GOAL_LENGTH) in speeds:
            share = speeds["mixed"] / speeds[str(GOAL_LENGTH)]
            bars[f"triton_varlen_{direction}_{head_dim}"] = _at_least(share, GOAL_VARLEN)
    for row in memory:
        if row["way"] == "ours" and "share" in row:
            bars[f"copy_share_{row['operation']}"] = _at_least(row["share"], GOAL_COPY)
    return bars


def _at_least(value: float, bar: float) -> dict[str, Any]:
    return {"value": round(value, 4), "bar": f">= {bar:g}", "met": value >= bar}


def _save(folder: Path, result: dict[str, Any]) -> list[str]:
    """Write JSON, Markdown and a plot per head dim and direction; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "kernels.json": json.dumps(
            {key: value for key, value in result.items() if key != "markdown"}, indent=1
        ),
        "kernels.md": tables.page(result),
    }
    for head_dim in sorted({row["head_dim"] for row in result["attention"]}):
        for direction in ("forward", "backward"):
            name = f"kernels-{direction}-{head_dim}.svg"
            texts[name] = throughput_plot(result, head_dim, direction)
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return [str(folder / name) for name in texts]
