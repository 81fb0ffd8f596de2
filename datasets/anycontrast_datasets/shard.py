"""Manifest -> shards, each study prepared once. Rerun it after any accident: it ends the same.

In: the folder `scan` wrote. Out: `shard-000000.tar` ..., `index.parquet`, `dataset.json` (written
last: the commit), `rejects.csv`. The plan is a pure function of the manifest and the config:
studies in hash order, so that every shard is a fair sample, a fixed number to a shard. One shard is
one task, in this process or on Ray; a task gets rows and paths and gives back index rows, never
pixels. `shard_task.py` keeps what an earlier run finished.

A study that cannot be prepared is refused with its reason and never stops the job; inputs = sharded
+ refused. Gives up: bytes are the same for any number of workers, but not promised across CPU types
or versions of torch and blosc, whose last bits differ; the versions are in `dataset.json`.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from anycontrast_datasets.ledger import refuse, write_ledger
from anycontrast_datasets.manifest import manifest_fingerprint, read_locations, read_manifest
from anycontrast_datasets.prepare import PREPARE_VERSION, PrepareConfig
from anycontrast_datasets.record_json import RECORD_SCHEMA_VERSION
from anycontrast_datasets.shard_commit import commit_dataset
from anycontrast_datasets.shard_task import (
    ShardReceipt,
    ShardTask,
    build_shard,
    receipt_path,
    withdraw_dataset,
)
from anycontrast_datasets.store.volume_index import SCHEMA_VERSION, sha256_json
from anycontrast_datasets.study import ShardError, Study

logger = logging.getLogger(__name__)

REJECTS_NAME = "rejects.csv"
LOCK_NAME = ".lock"
OWN_FILES = re.compile(r"\.?shard-\d{6,}\.(tar|json)(\.tmp-[0-9a-f]+)?")
MAX_RETRIES = 3

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How studies are laid out in shards and who does the work."""

    studies_per_shard: int = 32
    """Studies in one tar; about 9 MB each at 1 mm."""
    num_workers: int = 0
    """Ray tasks at a time, one CPU each; 0 or 1 works in this process without Ray."""
    codec: Literal["zstd", "lz4"] = "zstd"
    """zstd is smaller; lz4 decodes 1.4 times as fast for 25 % more bytes."""
    level: int = 5
    """Of the codec, 1..9."""

    def __post_init__(self) -> None:
        limits = {"studies_per_shard": (1, 10_000), "num_workers": (0, 10_000), "level": (1, 9)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"shard.{name}: must be {low}..{high}, got {getattr(self, name)}")
        if self.codec not in ("zstd", "lz4"):
            raise ValueError(f"shard.codec: must be zstd or lz4, got {self.codec!r}")


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
    """Prepare every study of a manifest and write the volume store.

    Args:
        manifest_dir: What `run_scan` wrote.
        out_dir: Folder of the shards, made if need be; on a cluster one that every node mounts.
        prepare: Grid and box.
        config: Layout and workers.
        on_progress: Called with (studies done, studies in all).

    Raises:
        ManifestError: If the manifest cannot be used.
        ShardError: If every study was refused, or another job writes to `out_dir`.
    """
    manifest = manifest_dir / "manifest.parquet"
    studies = read_manifest(manifest)
    out_dir = out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    with _exclusive(out_dir):
        tasks = _plan(studies, manifest_dir, out_dir, prepare, config)
        _remove_stale(out_dir, tasks)
        run = _run_on_ray if config.num_workers > 1 else _run_here
        receipts = run(tasks, config.num_workers, on_progress or (lambda done, total: None))
        origin = {
            "manifest_fingerprint": manifest_fingerprint(manifest),
            "prepare": asdict(prepare),
            "shard": {
                "studies_per_shard": config.studies_per_shard,
                "codec": config.codec,
                "level": config.level,
            },
        }
        return _finish(studies, receipts, out_dir, origin)


def _plan(
    studies: Sequence[Study],
    manifest_dir: Path,
    out_dir: Path,
    prepare: PrepareConfig,
    config: ShardConfig,
) -> list[ShardTask]:
    """Deal the studies, in the order of a hash of their ids, into shards."""
    files: dict[str, dict[str, Path]] = {}
    for (study_id, part), path in read_locations(manifest_dir).items():
        files.setdefault(study_id, {})[part] = path
    order = sorted(studies, key=lambda s: hashlib.sha256(s.study_id.encode()).hexdigest())
    tasks = []
    for number, first in enumerate(range(0, len(order), config.studies_per_shard)):
        group = tuple(order[first : first + config.studies_per_shard])
        tasks.append(
            ShardTask(
                path=out_dir / f"shard-{number:06d}.tar",
                plan_key=_plan_key(group, prepare, config),
                studies=group,
                locations={s.study_id: files.get(s.study_id, {}) for s in group},
                prepare=prepare,
                codec=config.codec,
                level=config.level,
            )
        )
    return tasks


def _plan_key(studies: Sequence[Study], prepare: PrepareConfig, config: ShardConfig) -> str:
    content = [
        [SCHEMA_VERSION, RECORD_SCHEMA_VERSION, PREPARE_VERSION, config.codec, config.level],
        asdict(prepare),
        [_identity(study) for study in studies],
    ]
    return sha256_json(content)


def _identity(study: Study) -> dict[str, Any]:
    """Return the manifest row as plain values, without where its files lie."""
    values = asdict(study)
    for part in [*values["volumes"], *([values["label"]] if study.label else [])]:
        del part["location"]
    return values


def _run_here(
    tasks: Sequence[ShardTask], num_workers: int, on_progress: OnProgress
) -> list[ShardReceipt]:
    total, done = sum(len(task.studies) for task in tasks), 0

    def on_study() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    return [build_shard(task, on_study) for task in tasks]


def _run_on_ray(
    tasks: Sequence[ShardTask], num_workers: int, on_progress: OnProgress
) -> list[ShardReceipt]:
    """Run one Ray task per shard, `num_workers` in flight; receipts in the order of the tasks."""
    if "RAY_ADDRESS" not in os.environ:
        # A cluster of our own: only who knows this token may talk to it. Read when Ray is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    total, done = sum(len(task.studies) for task in tasks), 0
    receipts: dict[int, ShardReceipt] = {}
    with _ray_cluster(num_workers):
        remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(build_shard)
        waiting = list(enumerate(tasks))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < num_workers:
                number, task = waiting.pop()
                running[remote.remote(task)] = number
            ready, _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ready[0])
            receipts[number] = ray.get(ready[0])
            done += len(tasks[number].studies)
            on_progress(done, total)
    return [receipts[number] for number in range(len(tasks))]


@contextmanager
def _ray_cluster(num_workers: int) -> Iterator[None]:
    """Use the Ray this process is in or `RAY_ADDRESS` names; else a local one, ended afterwards."""
    import ray

    if ray.is_initialized():
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="ac-shard-", dir="/tmp"))
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False)
        else:
            ray.init(
                address="local",
                num_cpus=num_workers,
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=str(folder),
            )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _finish(
    studies: Sequence[Study],
    receipts: Sequence[ShardReceipt],
    out_dir: Path,
    origin: dict[str, Any],
) -> ShardSummary:
    """Write the refusals, then commit the data set; fail if nothing is left."""
    refused = [refusal for receipt in receipts for refusal in receipt.refused]
    write_ledger(
        [refuse("", r.code, r.reason, study_id=r.study_id) for r in refused],
        out_dir / REJECTS_NAME,
    )
    by_code = dict(sorted(Counter(refusal.code for refusal in refused).items()))
    if len(refused) == len(studies):
        withdraw_dataset(out_dir)
        raise ShardError(
            f"sharding: at least one study must be prepared, refused all {len(studies)} "
            f"({by_code}); the reasons are in {out_dir / REJECTS_NAME}",
            code="all_refused",
        )
    fingerprint = commit_dataset(out_dir, studies, receipts, origin)
    written = [receipt for receipt in receipts if receipt.sha256]
    return ShardSummary(
        num_studies=len(studies),
        num_sharded=len(studies) - len(refused),
        num_refused=len(refused),
        refused_by_code=by_code,
        num_shards=len(written),
        num_reused=sum(receipt.is_reused for receipt in written),
        num_bytes=sum(receipt.bytes for receipt in written),
        fingerprint=fingerprint,
    )


@contextmanager
def _exclusive(out_dir: Path) -> Iterator[None]:
    """Hold the folder for one writer; the lock ends with the process, however it ends."""
    with (out_dir / LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"sharding: {out_dir} is being written by another process; wait for it to end, or "
                "choose another folder",
                code="shards_locked",
            ) from error
        yield


def _remove_stale(out_dir: Path, tasks: Sequence[ShardTask]) -> None:
    """Remove what killed runs and longer plans left; touches only names that shards have."""
    planned = {path for task in tasks for path in (task.path, receipt_path(task.path))}
    for path in sorted(out_dir.iterdir()):
        if OWN_FILES.fullmatch(path.name) and path not in planned:
            if path.suffix in (".tar", ".json"):
                withdraw_dataset(out_dir)
            logger.info("removing %s, left by an earlier run", path.name)
            path.unlink()
