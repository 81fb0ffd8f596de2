"""What reading a study costs, beside what others charge for it: `anycontrast bench data`.

Studies of four contrasts of 160 x 192 x 160, made here or taken from a folder, read by every way in
one process, in alternating rounds, from a warm file cache. CPU time of the whole process, because
other jobs may share the machine; wall time for two threads, beside one thread in the same rounds.

In one process the heap that one library leaves behind spares the next one its page faults. So the
store and MONAI's cache on disk are measured once more with the heap given back before every call.
"""

import ctypes
import hashlib
import importlib.util
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from anycontrast.bench import data_rivals
from anycontrast.bench.codecs import real_ratios
from anycontrast.bench.data_rivals import Rival
from anycontrast.bench.studies import BenchStudies, bench_studies, taken_studies
from anycontrast.bench.timing import Timing, alternate, at_least, at_most
from anycontrast_datasets.store.reader import StudyStore, open_store
from anycontrast_datasets.store.zarr_config import ZarrConfig
from anycontrast_datasets.store.zarr_writer import write_zarr_store

logger = logging.getLogger(__name__)

LIBRARIES = {
    "nibabel": "nibabel",
    "monai_persistent": "monai",
    "monai_cache": "monai",
    "torchio": "torchio",
    "webdataset_tar": "webdataset",
    "zarr_chunks": "zarr",
}
OWN = ("volume_store", "volume_store_2_threads", "zarr_store", "memcpy")
WAYS = (*LIBRARIES, *OWN)
NUM_THREADS = 2
RUN = 8
"""Studies that the two threads read in one call."""
CONTROL = ("hash", "hash_2_threads")


@dataclass(frozen=True, kw_only=True)
class DataBenchConfig:
    """What is read, how often, and by whom."""

    folder: str = "runs/bench"
    """Keeps the studies between runs, 42 MB each; caches of others are made there and removed."""
    studies: str = ""
    """Folder of study folders with one `.nii.gz` per contrast on one grid; empty makes studies."""
    num_studies: int = 4
    """To make; of a given folder, the first so many."""
    rounds: int = 5
    ways: tuple[str, ...] = WAYS
    """Which to measure."""
    real: str = "../shared/real_mri"
    """Folder of published skull-stripped studies for their compression; need not be there."""

    def __post_init__(self) -> None:
        if self.num_studies < 1 or self.rounds < 1:
            raise ValueError(
                f"num_studies and rounds: must be at least 1, got {self.num_studies} and "
                f"{self.rounds}"
            )
        unknown = sorted(set(self.ways) - set(WAYS))
        if unknown or "volume_store" not in self.ways:
            raise ValueError(
                f"ways: must be volume_store and any of {', '.join(WAYS)}, got {self.ways}"
            )


def run(config: DataBenchConfig) -> dict[str, Any]:
    """Measure; returns CPU and wall ms, page faults and MB of a study by every way, and `bars`.

    A way whose library is not installed is null everywhere, and `warnings` says why.

    Raises:
        ManifestError: If studies must be made and nilearn, whose tissue maps they are made from,
            is not installed.
        StudyError: If the given studies cannot be read.
    """
    import torch

    folder = Path(config.folder).resolve()
    if config.studies:
        made = taken_studies(Path(config.studies), folder, config.num_studies)
    else:
        made = bench_studies(folder, config.num_studies)
    notes: list[str] = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _ways(made, folder / "data-caches", config.ways, notes) as rivals:
            reads = {name: rival.read for name, rival in rivals.items()}
            timings = alternate({**reads, **_hashing()}, len(made.files), config.rounds)
            trimmed = _trimmed(reads, len(made.files), config.rounds)
            sizes = {name: rival.num_bytes / len(made.files) for name, rival in rivals.items()}
    finally:
        torch.set_num_threads(threads_before)
    record = open_store(made.store).records[0]
    raw_mb = 2 * np.prod(record.shape) * len(record.contrasts) / 1e6
    result = _result(config, timings, sizes, float(raw_mb))
    result["two_thread_control"] = _gain(*(timings[name] for name in CONTROL))
    result["trimmed_heap"] = {
        "cpu_ms_per_study": {n: round(t.cpu_ms, 3) for n, t in trimmed.items()},
        "page_faults_per_study": {n: median(t.page_faults) for n, t in trimmed.items()},
    }
    return {
        **result,
        "bars": _bars(timings, result, real_ratios(Path(config.real))),
        "warnings": notes,
    }


@contextmanager
def _ways(
    made: BenchStudies, caches: Path, names: tuple[str, ...], notes: list[str]
) -> Iterator[dict[str, Rival]]:
    """Set up every way that can be; say in `notes` which cannot."""
    shutil.rmtree(caches, ignore_errors=True)
    caches.mkdir(parents=True)
    store = open_store(made.store)
    record = store.records[0]
    zarr_folder = caches / "zarr"
    if {"zarr_store", "zarr_chunks"} & set(names):
        write_zarr_store(store, zarr_folder, ZarrConfig())
    ids = [record.study_id for record in store.records]
    setups: dict[str, Callable[[], Rival]] = {
        "nibabel": lambda: data_rivals.nibabel_files(made.files),
        "monai_persistent": lambda: data_rivals.monai_persistent(made.files, caches / "monai"),
        "monai_cache": lambda: data_rivals.monai_cache(made.files),
        "torchio": lambda: data_rivals.torchio_subjects(made.files),
        "webdataset_tar": lambda: data_rivals.webdataset_tar(made.store),
        "zarr_chunks": lambda: data_rivals.zarr_chunks(zarr_folder, ids, record.contrasts),
        "volume_store": lambda: _store_rival(store, made.store),
        "volume_store_2_threads": lambda: _threaded_rival(store, made.store),
        "zarr_store": lambda: _store_rival(open_store(zarr_folder), zarr_folder),
        "memcpy": lambda: data_rivals.memcpy(record.shape, len(record.contrasts)),
    }
    rivals = {}
    try:
        for name in names:
            library = LIBRARIES.get(name)
            if library is not None and importlib.util.find_spec(library) is None:
                notes.append(f"{name}: not measured, {library} is not installed (extra `bench`)")
                logger.warning("%s", notes[-1])
                continue
            rivals[name] = setups[name]()
        yield rivals
    finally:
        shutil.rmtree(caches, ignore_errors=True)


def _trimmed(
    reads: dict[str, Callable[[int], object]], num_items: int, rounds: int
) -> dict[str, Timing]:
    """Measure with the freed memory of the process given back before every call, if libc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or "monai_persistent" not in reads:
        return {}
    ways = {name: reads[name] for name in ("monai_persistent", "volume_store")}
    return alternate(ways, num_items, rounds, before=lambda: trim(0))


def _store_rival(store: StudyStore, folder: Path) -> Rival:
    slots = _slots(store)
    return Rival(lambda index: store.read(index, out=slots), data_rivals.folder_bytes(folder))


def _threaded_rival(store: StudyStore, folder: Path) -> Rival:
    """Read with `NUM_THREADS` threads, each into slots of its own; a call is `RUN` studies.

    A run of studies, as a stream reads them: only at its end does one thread wait for the other.
    """
    pool = ThreadPoolExecutor(NUM_THREADS)
    own = threading.local()

    def read_one(index: int) -> object:
        if not hasattr(own, "slots"):
            own.slots = _slots(store)
        return store.read(index, out=own.slots)

    def read(index: int) -> list[Any]:
        return list(pool.map(read_one, [(index + n) % len(store) for n in range(RUN)]))

    return Rival(read, data_rivals.folder_bytes(folder))


def _hashing() -> dict[str, Callable[[int], object]]:
    """Hash by one thread and by two: what nothing but missing cores can hold up."""
    content = bytes(32 * 2**20)
    pool = ThreadPoolExecutor(NUM_THREADS)

    def digest(number: int) -> bytes:
        return hashlib.sha256(content).digest()

    return {
        CONTROL[0]: digest,
        CONTROL[1]: lambda item: list(pool.map(digest, range(NUM_THREADS))),
    }


def _gain(one: Timing, two: Timing) -> dict[str, float]:
    return {
        "wall": round(NUM_THREADS * one.wall_ms / two.wall_ms, 3),
        "best_wall": round(NUM_THREADS * one.best_wall_ms / two.best_wall_ms, 3),
    }


def _slots(store: StudyStore) -> dict[str, Any]:
    largest = max(int(np.prod(record.shape)) for record in store.records)
    names = {name for record in store.records for name in record.contrasts}
    return {name: np.zeros(largest, dtype=np.int16) for name in names}


def _result(
    config: DataBenchConfig, timings: dict[str, Timing], sizes: dict[str, float], raw_mb: float
) -> dict[str, Any]:
    per_call = {name: RUN if name == "volume_store_2_threads" else 1 for name in WAYS}

    def each(value: Callable[[str], float]) -> dict[str, float | None]:
        return {
            name: round(value(name) / per_call[name], 3) if name in timings else None
            for name in config.ways
        }

    return {
        "num_studies": config.num_studies,
        "rounds": config.rounds,
        "raw_mb_per_study": round(raw_mb, 3),
        "cpu_ms_per_study": each(lambda name: timings[name].cpu_ms),
        "best_cpu_ms_per_study": each(lambda name: timings[name].best_cpu_ms),
        "wall_ms_per_study": each(lambda name: timings[name].wall_ms),
        "best_wall_ms_per_study": each(lambda name: timings[name].best_wall_ms),
        "page_faults_per_study": each(lambda name: median(timings[name].page_faults)),
        "mb_per_study": {
            name: round(sizes[name] / 1e6, 3) if name in sizes else None for name in config.ways
        },
    }


def _bars(
    timings: dict[str, Timing], result: dict[str, Any], real: dict[str, float]
) -> dict[str, Any]:
    """Hold the measured ratios against what is asked for; a ratio that lacks a way is left out."""
    cpu, size = result["cpu_ms_per_study"], result["mb_per_study"]
    ours = cpu["volume_store"]
    bars: dict[str, Any] = {}
    if "nibabel" in timings:
        bars["nibabel_over_volume_store_cpu"] = at_least(cpu["nibabel"] / ours, 18.0)
    if "monai_persistent" in timings:
        share = size["volume_store"] / size["monai_persistent"]
        name = "volume_store_over_monai_persistent"
        bars[f"{name}_cpu"] = at_most(ours / cpu["monai_persistent"], 1.0)
        bars[f"{name}_bytes"] = at_most(share, 0.19)
        trimmed = result["trimmed_heap"]["cpu_ms_per_study"]
        if trimmed:
            cost = trimmed["volume_store"] / trimmed["monai_persistent"]
            bars[f"{name}_cpu_trimmed"] = at_most(cost, 1.0)
    if "volume_store_2_threads" in timings:
        for name in ("wall_ms_per_study", "best_wall_ms_per_study"):
            gain = result[name]["volume_store"] / result[name]["volume_store_2_threads"]
            bars["two_threads_over_one_" + name.removesuffix("_ms_per_study")] = at_least(gain, 1.8)
    bars["compression_noisy"] = at_least(result["raw_mb_per_study"] / size["volume_store"], 2.6)
    for name, ratio in real.items():
        bars[f"compression_{name}"] = at_least(ratio, 5.0)
    return bars
