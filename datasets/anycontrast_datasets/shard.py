"""Manifest -> shards, each study prepared once. Rerun it after any accident: it ends the same.

In: the folder `scan` wrote. Out: `shard-000000.tar` ... with their receipts, `layout.json`,
`index.parquet`, `dataset.json` (written last: the commit), `rejects.csv`, and `sharding.json` with
what the work cost, which no hash covers. `shard_plan.py` deals studies into shards, `shard_task.py`
writes one, `shard_ray.py` has many written at a time, `shard_commit.py` makes them a data set.
Studies may be added, changed and removed: only shards that hold them are written again.

A study that cannot be prepared is refused with its reason and never stops the job; inputs = sharded
+ refused. Gives up: bytes are the same for any number of workers, but not promised across CPU types
or versions of torch and blosc, whose last bits differ; the versions are in `dataset.json`.
"""

import fcntl
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from anycontrast_datasets.disk import write_checked
from anycontrast_datasets.manifest import manifest_fingerprint, read_locations, read_manifest
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.shard_commit import Outcome, commit_dataset
from anycontrast_datasets.shard_plan import (
    Layout,
    admit,
    deal,
    read_layout,
    study_key,
    write_layout,
)
from anycontrast_datasets.shard_ray import run_on_ray
from anycontrast_datasets.shard_receipt import ShardReceipt, receipt_path, withdraw_dataset
from anycontrast_datasets.shard_task import ShardTask, build_shard
from anycontrast_datasets.store.codec import DEFAULT_CODEC, DEFAULT_LEVEL
from anycontrast_datasets.study import ShardError, Study

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
COST_NAME = "sharding.json"
SHARD_FILES = re.compile(r"shard-\d{6,}\.(tar|json|json\.next|progress)")
TEMPORARY = re.compile(
    r"\.?(shard-\d{6,}|layout|index|dataset|rejects|sharding)\.[a-z.]+\.tmp-[0-9a-f]+"
)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How studies are laid out in shards and who does the work."""

    studies_per_shard: int = 32
    """Studies in one tar; about 9 MB each at 1 mm."""
    num_workers: int = 0
    """Ray tasks at a time, one CPU each; 0 or 1 works in this process without Ray."""
    codec: Literal["zstd", "lz4", "lz4hc"] = DEFAULT_CODEC
    """lz4hc is read twice as fast as zstd, which is 8 to 13 % smaller; lz4 is written fastest."""
    level: int = DEFAULT_LEVEL
    """Of the codec, 1..9."""
    faces: Literal["refuse", "allow"] = "refuse"
    """Whether volumes known to show a face may enter; diffusion is too coarse to tell."""

    def __post_init__(self) -> None:
        limits = {"studies_per_shard": (1, 10_000), "num_workers": (0, 10_000), "level": (1, 9)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"shard.{name}: must be {low}..{high}, got {getattr(self, name)}")
        if self.codec not in ("zstd", "lz4", "lz4hc"):
            raise ValueError(f"shard.codec: must be zstd, lz4 or lz4hc, got {self.codec!r}")
        if self.faces not in ("refuse", "allow"):
            raise ValueError(f"shard.faces: must be refuse or allow, got {self.faces!r}")


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What a run of `run_shard` ended with; num_studies = num_sharded + num_refused."""

    num_studies: int
    num_sharded: int
    num_refused: int
    refused_by_code: dict[str, int]
    num_shards: int
    num_reused: int
    """Shards kept from an earlier run."""
    num_prepared: int
    """Studies that this run prepared; the others were there already."""
    num_bytes: int
    fingerprint: str


def run_shard(
    manifest_dir: Path,
    out_dir: Path,
    prepare: PrepareConfig,
    config: ShardConfig,
    *,
    on_progress: OnProgress | None = None,
) -> ShardSummary:
    """Prepare every study of a manifest that is not there yet and write the volume store.

    Args:
        manifest_dir: What `run_scan` wrote.
        out_dir: Folder of the shards, made if need be; on a cluster one that every node mounts.
        prepare: Grid and box.
        config: Layout and workers.
        on_progress: Called with (studies done, studies in all).

    Raises:
        ManifestError: If the manifest cannot be used.
        ShardError: If every study was refused, the disk is full, or another job writes to
            `out_dir`.
    """
    manifest = manifest_dir / "manifest.parquet"
    studies = read_manifest(manifest)
    admitted, refused, dropped = admit(studies, config.faces)
    out_dir = out_dir.resolve()
    origin = _origin(prepare, config)
    with exclusive(out_dir):
        earlier = read_layout(out_dir)
        layout = deal(earlier, origin, [study.study_id for study in admitted])
        if layout != earlier:
            write_layout(layout, out_dir)
        remove_stale(out_dir, layout)
        tasks = _tasks(layout, admitted, manifest_dir, out_dir, prepare, config)
        start_s = time.monotonic()
        run = run_on_ray if config.num_workers > 1 else _run_here
        receipts = run(tasks, config.num_workers, on_progress or (lambda done, total: None))
        remove_stale(out_dir, layout)  # What workers left that died on the way.
        _write_cost(receipts, out_dir, config.num_workers, time.monotonic() - start_s)
        outcome = Outcome(
            splits={study.study_id: study.split for study in studies},
            receipts=tuple(receipts),
            refused=(*refused, *(r for receipt in receipts for r in receipt.refused)),
            dropped=tuple(dropped),
        )
        fingerprint = commit_dataset(out_dir, outcome, manifest_fingerprint(manifest), origin)
        return _summary(outcome, fingerprint)


@contextmanager
def exclusive(out_dir: Path) -> Iterator[None]:
    """Hold the folder for one writer; the lock ends with the process, however it ends.

    Raises:
        ShardError: If the folder cannot be made or written to, or is another writer's.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        file = (out_dir / LOCK_NAME).open("w")
    except OSError as error:
        raise ShardError(
            f"sharding: {out_dir} must be a folder that can be written to, found: "
            f"{error.strerror}; correct the path or its permissions",
            code="folder_not_writable",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"sharding: {out_dir} is being written by another process; wait for it to end, or "
                "choose another folder",
                code="shards_locked",
            ) from error
        yield


def remove_stale(out_dir: Path, layout: Layout) -> None:
    """Remove what killed runs and other layouts left; touches only names that shards have."""
    tars = {out_dir / name for name in layout.shards}
    receipts = {receipt_path(path) for path in tars}
    kept = tars | receipts | {path.with_suffix(".json.next") for path in receipts}
    for path in sorted(out_dir.iterdir()):
        is_ours = SHARD_FILES.fullmatch(path.name) or TEMPORARY.fullmatch(path.name)
        if is_ours and path not in kept:
            if path.suffix == ".tar":
                withdraw_dataset(out_dir)
            logger.info("removing %s, left by an earlier run", path.name)
            path.unlink()


def _origin(prepare: PrepareConfig, config: ShardConfig) -> dict[str, Any]:
    """Return the settings as they come back from JSON, without who does the work."""
    shard = asdict(config)
    del shard["num_workers"]
    values: dict[str, Any] = json.loads(json.dumps({"prepare": asdict(prepare), "shard": shard}))
    return values


def _tasks(
    layout: Layout,
    studies: Sequence[Study],
    manifest_dir: Path,
    out_dir: Path,
    prepare: PrepareConfig,
    config: ShardConfig,
) -> list[ShardTask]:
    files: dict[str, dict[str, Path]] = {}
    for (study_id, part), path in read_locations(manifest_dir).items():
        files.setdefault(study_id, {})[part] = path
    by_id: Mapping[str, Study] = {study.study_id: study for study in studies}
    key = layout.key
    return [
        ShardTask(
            path=out_dir / name,
            studies=tuple(by_id[study_id] for study_id in held),
            keys={study_id: study_key(by_id[study_id], key) for study_id in held},
            locations={study_id: files.get(study_id, {}) for study_id in held},
            prepare=prepare,
            codec=config.codec,
            level=config.level,
        )
        for name, held in layout.shards.items()
    ]


def _run_here(
    tasks: Sequence[ShardTask], num_workers: int, on_progress: OnProgress
) -> list[ShardReceipt]:
    total, done = sum(len(task.studies) for task in tasks), 0

    def on_study() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    return [build_shard(task, on_study) for task in tasks]


def _write_cost(
    receipts: Sequence[ShardReceipt], out_dir: Path, num_workers: int, wall_s: float
) -> None:
    """Record what preparing a study cost, for `plan` to extrapolate; kept if nothing was made."""
    num_prepared = sum(receipt.num_prepared for receipt in receipts)
    if num_prepared:
        cost = {
            "studies": num_prepared,
            "cpu_s_per_study": sum(receipt.cpu_s for receipt in receipts) / num_prepared,
            "wall_s_per_study": wall_s / num_prepared,
            "num_workers": max(1, num_workers),
        }
        write_checked(out_dir / COST_NAME, (json.dumps(cost, indent=1) + "\n").encode())


def _summary(outcome: Outcome, fingerprint: str) -> ShardSummary:
    written = [receipt for receipt in outcome.receipts if receipt.sha256]
    return ShardSummary(
        num_studies=len(outcome.splits),
        num_sharded=len(outcome.splits) - len(outcome.refused),
        num_refused=len(outcome.refused),
        refused_by_code=outcome.refused_by_code(),
        num_shards=len(written),
        num_reused=sum(receipt.is_reused for receipt in written),
        num_prepared=sum(receipt.num_prepared for receipt in outcome.receipts),
        num_bytes=sum(receipt.bytes for receipt in written),
        fingerprint=fingerprint,
    )
