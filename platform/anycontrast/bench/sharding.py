"""What sharding a study costs, step by step: `anycontrast bench sharding`.

Studies of four 160 x 192 x 160 int16 `.nii.gz` at 1 mm: one skull-stripped, one with noise in the
air, and one whose last contrast lies oblique to the others and coarser. Every step is timed inside
one run of `run_shard` by the profiler, in CPU time of one process; the rate on two workers is wall
time of a run on Ray with its workers up.
"""

import cProfile
import logging
import pstats
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anycontrast.bench.studies import AFFINE, FORMAT, NOISE, make_volumes
from anycontrast.bench.timing import at_most
from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.manifest import manifest_fingerprint, write_locations, write_manifest
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.shard import ShardConfig, ShardSummary, run_shard
from anycontrast_datasets.shard_ray import ray_cluster
from anycontrast_datasets.study import Affine, Study, Volume
from anycontrast_datasets.volume import read_header, write_volume

logger = logging.getLogger(__name__)

STEPS: dict[str, tuple[tuple[str, str], ...]] = {
    "decode": (("volume.py", "read_volume"),),
    "resample": (("resample.py", "resample"),),
    "compress": (("codec.py", "encode"),),
    "foreground": (("foreground.py", "foreground_mask"),),
    "quantise": (("intensity.py", "encode"), ("intensity.py", "pack_occupancy")),
    "hash_and_write": (
        ("files.py", "sha256_file"),
        ("volume_writer.py", "_write"),
        ("codec.py", "checksum"),
        ("volume_writer.py", "finish"),
        ("shard_receipt.py", "replace_shard"),
        ("shard_commit.py", "commit_dataset"),
    ),
}
"""Step -> functions (file, name) whose time, with all they call, is that step's."""
NEEDED = ("decode", "resample", "compress")
"""What sharding is for; the rest is overhead."""


@dataclass(frozen=True, kw_only=True)
class ShardingBenchConfig:
    """What is sharded, and where."""

    folder: str = "runs/bench"
    """Keeps the studies between runs, 30 MB each; shards are written there and removed."""
    num_studies: int = 6
    """Kinds of study follow each other: stripped, with air, oblique."""
    num_workers: int = 2
    """For the rate in parallel; 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.num_studies < 1:
            raise ValueError(f"num_studies: must be at least 1, got {self.num_studies}")


def run(config: ShardingBenchConfig) -> dict[str, Any]:
    """Measure; returns CPU milliseconds per study by step, rates, and `bars`.

    Raises:
        ManifestError: If nilearn, whose tissue maps the studies are made from, is not installed.
    """
    folder = Path(config.folder).resolve()
    manifest = _manifest(folder / f"sharding-{FORMAT}", config.num_studies)
    shards = folder / "sharding-shards"
    _shard(manifest, shards, 0)  # Loads libraries, builds tables, fills the file cache.
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    summary = _shard(manifest, shards, 0)
    profile.disable()
    start_s = time.perf_counter()
    _shard(manifest, shards, 0)
    wall_s = time.perf_counter() - start_s
    stats: Any = pstats.Stats(profile)
    total_ms = stats.total_tt * 1e3 / config.num_studies
    steps = {name: _step_ms(stats, name) / config.num_studies for name in STEPS}
    steps["other"] = total_ms - sum(steps.values())
    share = 1 - sum(steps[name] for name in NEEDED) / total_ms
    result: dict[str, Any] = {
        "studies": config.num_studies,
        "mb_per_study": summary.num_bytes / 1e6 / config.num_studies,
        "cpu_ms_per_study": {name: round(ms, 1) for name, ms in steps.items()},
        "cpu_ms_total": round(total_ms, 1),
        "bars": {"share_outside_decode_resample_compress": at_most(share, 0.25)},
        "wall_s_per_study": round(wall_s / config.num_studies, 3),
    }
    if config.num_workers > 1:
        result["workers"] = _parallel(manifest, shards, config, wall_s)
    shutil.rmtree(shards)
    return result


def _parallel(
    manifest: Path, shards: Path, config: ShardingBenchConfig, alone_s: float
) -> dict[str, Any]:
    """Time a run on Ray whose workers are up and have loaded what they need."""
    with ray_cluster(config.num_workers):
        _shard(manifest, shards, config.num_workers)
        start_s = time.perf_counter()
        _shard(manifest, shards, config.num_workers)
        wall_s = time.perf_counter() - start_s
    return {
        "num_workers": config.num_workers,
        "wall_s_per_study": round(wall_s / config.num_studies, 3),
        "studies_per_s": round(config.num_studies / wall_s, 3),
        "times_one_process": round(alone_s / wall_s, 2),
    }


def _shard(manifest: Path, shards: Path, num_workers: int) -> ShardSummary:
    shutil.rmtree(shards, ignore_errors=True)
    config = ShardConfig(studies_per_shard=1, num_workers=num_workers)
    return run_shard(manifest, shards, PrepareConfig(), config)


def _step_ms(stats: Any, step: str) -> float:
    """Return cumulative milliseconds of a step's functions, none of which calls another of them."""
    seconds = sum(
        cumulative
        for (file, _, name), (_, _, _, cumulative, _) in stats.stats.items()
        if (Path(file).name, name) in STEPS[step] and "anycontrast_datasets" in file
    )
    return 1e3 * float(seconds)


def _manifest(folder: Path, num_studies: int) -> Path:
    """Make the files, unless they are there, and a manifest of them; return its folder."""
    studies: list[Study] = []
    files: dict[tuple[str, str], Path] = {}
    for number in range(num_studies):
        study_id = f"bench-{number:03d}"
        home = folder / study_id
        if not (home / "done").is_file():
            logger.info("making study %d of %d", number + 1, num_studies)
            _write_files(home, number)
        paths = {path.name.removesuffix(".nii.gz"): path for path in sorted(home.glob("*.nii.gz"))}
        files |= {(study_id, contrast): path for contrast, path in paths.items()}
        studies.append(_study(study_id, paths))
    manifest = folder / f"manifest-{num_studies}"
    (manifest / "private").mkdir(parents=True, exist_ok=True)
    write_manifest(studies, manifest / "manifest.parquet")
    fingerprint = manifest_fingerprint(manifest / "manifest.parquet")
    write_locations(files, manifest, fingerprint=fingerprint)
    return manifest


def _write_files(home: Path, number: int) -> None:
    home.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([FORMAT, number, 1])
    volumes = make_volumes(number)
    oblique = list(volumes)[-1] if number % 3 == 2 else None
    for contrast, volume in volumes.items():
        affine = np.array(AFFINE, dtype=np.float64)
        if number % 3:
            volume = _with_air(volume, rng)
        if contrast == oblique:
            volume, affine = _tilted(volume, affine)
        stored = np.rint(volume).astype(np.int16)
        write_volume(home / f"{contrast}.nii.gz", stored, affine)
    (home / "done").touch()


def _with_air(volume: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Fill the zero background with the noise of a magnitude image."""
    sigma = NOISE * float(np.percentile(volume[volume > 0], 99))
    noise = np.hypot(*rng.standard_normal((2, *volume.shape), dtype=np.float32)) * np.float32(sigma)
    return np.where(volume > 0, volume, noise)


def _tilted(
    volume: npt.NDArray[np.float32], affine: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Keep every third slice, and turn the grid by 12 degrees about the left-right axis."""
    cos, sin = np.cos(np.deg2rad(12)), np.sin(np.deg2rad(12))
    turn = np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]])
    return np.ascontiguousarray(volume[:, :, ::3]), turn @ affine @ np.diag([1.0, 1.0, 3.0, 1.0])


def _study(study_id: str, paths: dict[str, Path]) -> Study:
    volumes = []
    for contrast, path in paths.items():
        header = read_header(path)
        x, y, z = header.shape
        i, j, k = np.linalg.norm(header.affine[:3, :3], axis=0)
        affine: Affine = tuple(
            (float(a), float(b), float(c), float(d)) for a, b, c, d in header.affine
        )
        volumes.append(
            Volume(
                contrast=contrast,
                location="",
                shape=(x, y, z),
                spacing_mm=(float(i), float(j), float(k)),
                affine=affine,
                sha256=sha256_file(path),
            )
        )
    return Study(
        study_id=study_id,
        dataset="bench",
        subject_id=study_id,
        session_id="1",
        split="train",
        volumes=tuple(volumes),
    )
