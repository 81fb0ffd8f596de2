"""Shard tasks on Ray: a bounded number in flight, progress study by study, lost workers survived.

A task gets rows and paths and gives back index rows, never pixels. A worker that dies is started
again up to three times; when it dies every time over the same study, that study is refused and the
shard goes on without it. A task tells how far it is by a file beside the shard that grows by one
byte a study: no extra process, and nothing to clean up but a file with a name shards have.
"""

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from anycontrast_datasets.disk import full_disk_named
from anycontrast_datasets.shard_receipt import ShardReceipt
from anycontrast_datasets.shard_task import ShardTask, build_shard

logger = logging.getLogger(__name__)

MAX_RETRIES = 3
POLL_S = 0.5


def run_on_ray(
    tasks: Sequence[ShardTask], num_workers: int, on_progress: Callable[[int, int], None]
) -> list[ShardReceipt]:
    """Run one Ray task per shard, `num_workers` in flight; receipts in the order of the tasks.

    Raises:
        ShardError: What a task raises, e.g. that the disk is full.
    """
    ray = load_ray()
    total, finished, last = sum(len(task.studies) for task in tasks), 0, -1
    receipts: dict[int, ShardReceipt] = {}
    with ray_cluster(num_workers):
        remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_build_told)
        waiting = list(enumerate(tasks))[::-1]
        running: dict[Any, tuple[int, ShardTask]] = {}
        while waiting or running:
            while waiting and len(running) < num_workers:
                number, task = waiting.pop()
                running[remote.remote(task)] = (number, task)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
            for reference in ready:
                number, task = running.pop(reference)
                receipt = _result(reference, task)
                if isinstance(receipt, ShardTask):
                    waiting.append((number, receipt))
                    continue
                receipts[number] = receipt
                finished += len(task.studies)
            done = finished + sum(_told(task.path) for _, task in running.values())
            if done != last:
                on_progress(done, total)
                last = done
    return [receipts[number] for number in range(len(tasks))]


def load_ray() -> Any:
    """Import Ray; a cluster of our own is closed to whoever does not know its token."""
    if "RAY_ADDRESS" not in os.environ:
        protect_own_cluster()
    import ray

    return ray


def protect_own_cluster() -> None:
    """Choose a token for a cluster that this process may start; before Ray is imported.

    It is kept in the environment, so that no token file appears in the user's home. Ray reads these
    when it is imported: a token chosen later would lock this process out of its own cluster. There
    Ray is left to choose, which it does unless RAY_AUTH_MODE=disabled.
    """
    if "ray" in sys.modules and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        logger.warning("Ray was imported before anycontrast: its own choice of a token stands")
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def progress_path(shard: Path) -> Path:
    """Return the file whose size is the number of studies a running task is through with."""
    return shard.with_suffix(".progress")


def _build_told(task: ShardTask) -> ShardReceipt:
    path = progress_path(task.path)
    with full_disk_named(path, len(task.studies)), path.open("wb", buffering=0) as file:

        def on_study() -> None:
            file.write(b".")

        receipt = build_shard(task, on_study)
    path.unlink(missing_ok=True)
    return receipt


def _told(shard: Path) -> int:
    try:
        return progress_path(shard).stat().st_size
    except FileNotFoundError:
        return 0


def _result(reference: Any, task: ShardTask) -> ShardReceipt | ShardTask:
    """Return the receipt, or the task to try next when a worker died over one of its studies."""
    import ray

    try:
        receipt: ShardReceipt = ray.get(reference)
        return receipt
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        left = [study.study_id for study in task.studies]
        place = _told(task.path)
        if place >= len(left) or left[place] in task.lost:
            raise
        logger.warning(
            "workers died %d times over study %s (%s): going on without it",
            MAX_RETRIES + 1,
            left[place],
            type(error).__name__,
        )
        return replace(task, lost=(*task.lost, left[place]))


@contextmanager
def ray_cluster(num_workers: int) -> Iterator[None]:
    """Use the Ray this process is in or `RAY_ADDRESS` names; else a local one, ended afterwards."""
    ray = load_ray()
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
