"""Time a call on CPU or GPU, and what the same machine reaches at best."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 * 2**20
"""More than the second-level cache of any GPU: written between calls so that none finds its data
there."""

SLEEP_CYCLES = 4_000_000
"""About 2 ms of a GPU: it sleeps while the host launches, so that launching is not in the time."""
MIN_CALLS = 5
MAX_CALLS = 100


class Seconds(NamedTuple):
    """Time of one call: medians over the repetitions."""

    wall: float
    cpu: float
    """Of the whole process, threads included; on a GPU, what the host spent on the launch."""

    def used(self, device: torch.device) -> float:
        """What a throughput is taken from: wall time of a GPU, CPU time of a CPU.

        Load by others stretches the wall time of a CPU; its CPU time gives the speed of one core.
        """
        return self.wall if device.type == "cuda" else self.cpu


class Ceiling(NamedTuple):
    """What large matrix products and copies reach here, in the same run; of one core on a CPU."""

    flop_per_s: float
    bytes_per_s: float


def time_together(
    calls: Mapping[str, Callable[[], object]], device: torch.device, budget_s: float
) -> tuple[dict[str, Seconds], dict[str, str]]:
    """Time several calls; on a CPU in alternating rounds, so that load by others meets all alike.

    Args:
        calls: name -> what to time.
        device: where they run.
        budget_s: time to spend on each, 5 calls at least.

    Returns:
        Times, and why the calls that failed did.
    """
    failures: dict[str, str] = {}
    samples: dict[str, list[Seconds]] = {}
    for name, call in calls.items():
        # Whatever a foreign kernel or its compiler throws belongs into the table.
        try:
            call()
        except Exception as failure:
            failures[name] = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        else:
            samples[name] = []
    if device.type == "cuda":
        for name, found in samples.items():
            # Again, uncounted: the way before may have left other kernels below an operator.
            calls[name]()
            while not _is_enough([found], budget_s):
                found.append(_time_on_gpu(calls[name]))
    else:
        while samples and not _is_enough(list(samples.values()), budget_s):
            for name, found in samples.items():
                found.append(_time_on_cpu(calls[name]))
    return {
        name: Seconds(*(statistics.median(column) for column in zip(*found, strict=True)))
        for name, found in samples.items()
    }, failures


def measure_ceiling(device: torch.device, dtype: torch.dtype, budget_s: float) -> Ceiling:
    """Time a square matrix product and a copy that no cache holds."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    num_bytes = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(a, b, out=product),
        "copy": lambda: target.copy_(source),
    }
    times, _ = time_together(calls, device, budget_s)
    return Ceiling(
        2 * side**3 / times["product"].used(device), 2 * num_bytes / times["copy"].used(device)
    )


def _is_enough(samples: list[list[Seconds]], budget_s: float) -> bool:
    """Whether calls in rounds have taken their time, on average over the ways."""
    rounds = min(len(found) for found in samples)
    spent = sum(seconds.wall for found in samples for seconds in found)
    return rounds >= MIN_CALLS and (spent >= budget_s * len(samples) or rounds >= MAX_CALLS)


def _time_on_cpu(call: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Seconds(wall, cpu)


def _time_on_gpu(call: Callable[[], object]) -> Seconds:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    start, stop = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    cpu = time.process_time()
    call()
    cpu = time.process_time() - cpu
    stop.record()
    torch.cuda.synchronize()
    return Seconds(1e-3 * start.elapsed_time(stop), cpu)
