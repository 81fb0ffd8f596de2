"""`anycontrast doctor`: examine the cluster that a configuration trains on, or this machine."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast.doctor.findings import Diagnosis, Finding
from anycontrast.doctor.machine import examine_machine
from anycontrast.doctor.node import Question, new_probe
from anycontrast.doctor.nodes import examine_cluster

if TYPE_CHECKING:
    from anycontrast.training.config import Config

logger = logging.getLogger(__name__)

_JOB_PORT = Finding(
    "fail",
    "cluster",
    "this is the address that jobs are submitted to, not one that a process can join",
    "submit the doctor: `ray job submit -- anycontrast doctor CONFIG`",
)


def run_doctor(config: "Config") -> Diagnosis:
    """Examine where `config.cluster` says training would run.

    That is the cluster of `cluster.address` or `RAY_ADDRESS` (inside a submitted job the one it
    runs on), else this machine. Folders that are missing are made, as training would; nothing else
    stays behind.
    """
    question = _question(config)
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if config.cluster.mode == "process" or not (address or _is_connected()):
        findings = list(examine_machine(question, config.cluster))
        return Diagnosis("this machine", (*findings, *_store(config)))
    place = f"the cluster at {address}" if address else "the cluster"
    if (address or "").startswith(("http://", "https://")):
        return Diagnosis(place, (_JOB_PORT,))
    try:
        with _connected(address):
            findings = list(examine_cluster(question, config.cluster))
    except (ConnectionError, RuntimeError, ValueError) as error:
        return Diagnosis(place, (_no_cluster(error),))
    return Diagnosis(place, (*findings, *_store(config)))


def _question(config: "Config") -> Question:
    root = str(Path(config.root).expanduser().absolute())
    folders, storage = [root], config.cluster.storage
    if storage and "://" not in storage:
        folders.append(str(Path(storage).expanduser().absolute()))
    disks = {"runs": root, "Ray": os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()}
    if config.store.cache.folder:
        disks["the cache"] = str(config.store.cache.folder)
    return Question(new_probe(), tuple(folders), disks)


def _store(config: "Config") -> Iterator[Finding]:
    """Whether the prepared studies can be read from here, where they are not the run's own."""
    from anycontrast.shards import shards_location, shown_location
    from anycontrast_datasets.store.reader import describe_store
    from anycontrast_datasets.study import ShardError

    if config.store.location is None:
        return
    shown = shown_location(config)
    try:
        describe_store(shards_location(config))
    except (ShardError, OSError) as error:
        reason = " ".join(str(error).split())
        yield Finding(
            "fail",
            "store",
            f"{shown}: {reason}",
            "check store.location, the credentials and the way out of this network",
        )
        return
    yield Finding("ok", "store", f"{shown}: read")


def _is_connected() -> bool:
    import sys

    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    if _is_connected():
        yield
        return
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _no_cluster(error: Exception) -> Finding:
    reason = " ".join(str(error).split())
    remedy = "check cluster.address and RAY_AUTH_TOKEN, or submit `anycontrast doctor` as a job"
    if "ersion mismatch" in reason:
        remedy = "use one image for the head, the workers and this process"
    return Finding("fail", "cluster", reason, remedy)
