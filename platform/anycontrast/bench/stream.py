"""What the stream adds to reading, and how near a cold disk comes to its plain rate.

In one process, in alternating rounds, on studies of 4 x 160 x 192 x 160: every study read from the
store, the same studies served by the stream as packs of 16^3 patches with one and two threads, and
both from a disk whose file cache was emptied. CPU time is that of the whole process. The stream
serves flipped studies as in training; reading ahead is off where CPU time is taken, so that no work
of one way falls into another's time.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anycontrast.bench.studies import bench_studies
from anycontrast.bench.timing import at_least, at_most
from anycontrast_datasets.store.volume_store import VolumeStore
from anycontrast_datasets.stream import StudyStream
from anycontrast_datasets.stream_config import StreamConfig

PATCH_VOX = (16, 16, 16)
MAX_OVERHEAD = 0.15
MIN_COLD_RATE = 0.8


@dataclass(frozen=True, kw_only=True)
class StreamBenchConfig:
    """What is read, how often."""

    folder: str = "runs/bench"
    """Keeps the studies between runs, 42 MB each."""
    num_studies: int = 8
    """Studies in an epoch."""
    studies_per_step: int = 2
    """Studies in a pack; divides `num_studies`."""
    rounds: int = 7
    """Rounds that count; each reads every study in every way."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: must be at least 1, got {self.rounds}")
        if self.studies_per_step < 1 or self.num_studies % self.studies_per_step:
            raise ValueError(
                f"studies_per_step: must divide num_studies={self.num_studies}, "
                f"got {self.studies_per_step}"
            )


@dataclass(frozen=True)
class _Ways:
    """Functions that each read every study once, and their times in seconds per study."""

    ways: dict[str, Callable[[], object]]
    num_studies: int

    def alternate(self, rounds: int) -> dict[str, dict[str, float]]:
        """Run every way in every round after one that is not counted; return ms per study."""
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in self.ways}
        for number in range(rounds + 1):
            for name, way in self.ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                way()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                if number:
                    taken[name].append((cpu, wall))
        scale = 1e3 / self.num_studies
        return {
            name: {
                "cpu_ms": scale * statistics.median(cpu for cpu, _ in times),
                "cpu_ms_least": scale * min(cpu for cpu, _ in times),
                "wall_ms": scale * statistics.median(wall for _, wall in times),
                "wall_ms_least": scale * min(wall for _, wall in times),
            }
            for name, times in taken.items()
        }


def run(config: StreamBenchConfig) -> dict[str, Any]:
    """Measure; returns milliseconds and MB/s per way, and the bars with what they came to.

    Raises:
        ManifestError: If nilearn, whose tissue maps the studies are made from, is not installed.
    """
    folder = bench_studies(Path(config.folder), config.num_studies).store
    store = VolumeStore(folder)
    slots = {
        name: np.empty(max(int(np.prod(record.shape)) for record in store.records), dtype=np.int16)
        for record in store.records
        for name in record.contrasts
    }
    num_steps = config.num_studies // config.studies_per_step
    streams = {n: _stream(store, config, num_threads=n) for n in (1, 2)}
    ways: dict[str, Callable[[], object]] = {
        "store_read": lambda: _read_all(store, None),
        "store_read_into_slots": lambda: _read_all(store, slots),
        "stream_1_thread": lambda: _serve(streams[1], num_steps),
        "stream_2_threads": lambda: _serve(streams[2], num_steps),
    }
    times = _Ways(ways, config.num_studies).alternate(config.rounds)
    for stream in streams.values():
        stream.close()
    cold = _cold_rates(folder, store, config)
    return {
        "num_studies": config.num_studies,
        "ms_per_study": times,
        "overhead_by_least_cpu": _ratio(times, "cpu_ms_least", "stream_1_thread", "store_read"),
        "overhead_over_slots": _ratio(times, "cpu_ms", "stream_1_thread", "store_read_into_slots"),
        "cold_mb_per_s": cold,
        "bars": _bars(times, cold),
    }


def _bars(times: dict[str, dict[str, float]], cold: dict[str, float]) -> dict[str, Any]:
    overhead = _ratio(times, "cpu_ms", "stream_1_thread", "store_read")
    share = cold["stream_cold"] / min(cold["plain_cold"], cold["stream_warm"])
    return {
        "stream_overhead": at_most(overhead, MAX_OVERHEAD),
        "cold_disk_share": at_least(share, MIN_COLD_RATE),
    }


def _ratio(times: dict[str, dict[str, float]], what: str, one: str, two: str) -> float:
    """Return how much more `one` takes than `two`, as a share of it."""
    return times[one][what] / times[two][what] - 1.0


def _stream(
    store: VolumeStore, config: StreamBenchConfig, *, num_threads: int, ahead: int = 0
) -> StudyStream:
    stream_config = StreamConfig(
        studies_per_step=config.studies_per_step, num_threads=num_threads, prefetch_steps=ahead
    )
    return StudyStream(store, stream_config, PATCH_VOX, seed=0)


def _read_all(store: VolumeStore, slots: dict[str, Any] | None) -> None:
    for index in range(len(store)):
        arrays = store.read(index, out=slots)
    del arrays


def _serve(stream: StudyStream, num_steps: int) -> None:
    for _ in range(num_steps):
        packs = next(stream)
    del packs


def _cold_rates(folder: Path, store: VolumeStore, config: StreamBenchConfig) -> dict[str, float]:
    """Return MB of shards per second, median over the rounds.

    The stream reads ahead with two threads; plain reads take the same bytes one after the other.
    """
    rates: dict[str, list[float]] = {
        name: [] for name in ("plain_cold", "stream_cold", "stream_warm")
    }
    num_mb = sum(shard["bytes"] for shard in store.dataset["shards"]) / 1e6
    for _ in range(config.rounds):
        _forget(folder)
        rates["plain_cold"].append(num_mb / _read_plainly(folder))
        _forget(folder)
        rates["stream_cold"].append(num_mb / _serve_ahead(store, config))
        rates["stream_warm"].append(num_mb / _serve_ahead(store, config))
    return {name: statistics.median(found) for name, found in rates.items()}


def _forget(folder: Path) -> None:
    """Drop the shards from the file cache; they must be on disk for that."""
    for path in folder.glob("*.tar"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _read_plainly(folder: Path, piece_bytes: int = 14 * 2**20) -> float:
    """Read the shards piece by piece, a study's size each, into the same memory; return seconds."""
    buffer = bytearray(piece_bytes)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                continue
    return time.perf_counter() - started


def _serve_ahead(store: VolumeStore, config: StreamBenchConfig) -> float:
    """Serve one epoch, reading ahead with two threads; return the seconds until its last pack."""
    started = time.perf_counter()
    with _stream(store, config, num_threads=2, ahead=2) as stream:
        _serve(stream, config.num_studies // config.studies_per_step)
        return time.perf_counter() - started
