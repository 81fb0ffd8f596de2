"""Numbers of a run: summed over packs and ranks, one JSON line per logged step, and TensorBoard.

Keys of `metrics.jsonl`: `step`, `epoch`, `time_s`, `loss`, `loss/contrast/<name>`,
`loss/set/<names joined by +>`, `lr`, `grad_norm`, `skipped_steps`, `step_s` (mean, of the slowest
rank, with what came between the steps), `tokens_per_s`, `studies_per_s` (every mask of a study
counts), `data_wait_s` (mean per step, of the slowest rank),
`data_wait_share` (of the time, of the slowest rank), `memory_bytes` (peak, of the fullest rank),
`mix/dataset/<name>`, `mix/contrast/<name>` and `mix/set/<names>` (share of the studies served; of
the sets the most frequent), and whatever a validation returned.
"""

import json
import math
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from anycontrast.training.process_group import gather_objects
from anycontrast.training.task import Micro, Parts
from anycontrast_datasets.mixing import MAX_SETS


class Meter:
    """Sums of this rank since the last log line; `flush` makes them the run's."""

    own: Mapping[str, float] = MappingProxyType({})
    """What the last `flush` found of this rank alone: times and memory, by the same keys."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._restart()

    def _restart(self) -> None:
        self._sums = {}
        self._tokens = 0
        self._studies = 0
        self._wait_s = 0.0
        self._steps = 0
        self._mix: Counter[str] = Counter()
        self._start_s = time.perf_counter()

    def add_step(
        self,
        micros: list[Micro],
        parts: list[Parts],
        *,
        data_wait_s: float,
        is_applied: bool,
        mix: Mapping[str, int] | None = None,
    ) -> None:
        """Count one step, with `StepPacks.mix`; the losses of a skipped step are left out."""
        self._mix.update(mix or {})
        self._steps += 1
        self._wait_s += data_wait_s
        self._tokens += sum(micro.num_tokens for micro in micros)
        self._studies += sum(len(micro.study_ids) for micro in micros)
        for name, (total, count) in (item for p in parts for item in p.items()):
            if is_applied:
                before, counted = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (before + total.double(), counted + count.double())

    def flush(self) -> dict[str, float]:
        """Return the values over all ranks and start anew; every rank must call it."""
        elapsed_s, steps = time.perf_counter() - self._start_s, max(self._steps, 1)
        own = {
            "sums": {name: (float(a), float(b)) for name, (a, b) in self._sums.items()},
            "tokens": self._tokens,
            "studies": self._studies,
            "steps": steps,
            "waited_s": self._wait_s,
            "elapsed_s": elapsed_s,
            "mix": self._mix,
            "memory_bytes": peak_memory_bytes(),
        }
        self.own = {key: float(value) for key, value in _times([own]).items()}
        self._restart()
        return _combine(gather_objects(own))


def _combine(ranks: list[dict[str, Any]]) -> dict[str, float]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in ranks:
        for name, (total, count) in one["sums"].items():
            sums[name][0] += total
            sums[name][1] += count
    elapsed_s = max(max(one["elapsed_s"] for one in ranks), 1e-9)
    return {
        **{name: total / count for name, (total, count) in sorted(sums.items()) if count > 0},
        "tokens_per_s": sum(one["tokens"] for one in ranks) / elapsed_s,
        "studies_per_s": sum(one["studies"] for one in ranks) / elapsed_s,
        **_times(ranks),
        **_mix_shares(sum((one["mix"] for one in ranks), Counter())),
    }


def _times(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Of the slowest rank, and the memory of the fullest."""
    elapsed_s = max(max(one["elapsed_s"] for one in ranks), 1e-9)
    return {
        "step_s": max(one["elapsed_s"] / one["steps"] for one in ranks),
        "data_wait_s": max(one["waited_s"] / one["steps"] for one in ranks),
        "data_wait_share": max(one["waited_s"] for one in ranks) / elapsed_s,
        "memory_bytes": max(one["memory_bytes"] for one in ranks),
    }


def _mix_shares(counts: Counter[str]) -> dict[str, float]:
    num_studies = sum(count for name, count in counts.items() if name.startswith("dataset/"))
    sets = Counter({name: count for name, count in counts.items() if name.startswith("set/")})
    logged = [name for name in counts if name not in sets]
    logged += [name for name, _ in sets.most_common(MAX_SETS)]
    return {f"mix/{name}": counts[name] / num_studies for name in sorted(logged)}


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on its GPU, or resident on the host."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """`metrics.jsonl` and TensorBoard of one run; written by rank 0 only.

    Args:
        folder: the run folder.
        start_step: steps already done; later lines, left by a run that died after its newest
            checkpoint, are dropped, so each step is logged once.
    """

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        drop_lines_after(self.path, start_step)
        self._lines = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one object; a value that is not finite is written as null."""
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, "time_s": round(time.time(), 3), **clean})
        self._lines.write(line + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        """Close both files."""
        self._lines.close()
        self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a `metrics.jsonl`; a last line cut by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrite a file of JSON lines without those of later steps."""
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(path)
