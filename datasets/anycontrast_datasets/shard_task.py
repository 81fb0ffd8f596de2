"""One shard: prepare its studies, write the tar and the receipt, or find them already there.

In: a `ShardTask`, rows and paths of a few studies. Out: a `ShardReceipt`, index rows and refusals.
Knows no Ray; runs in any process. The receipt (`shard-000000.json`) is written after the tar and is
what makes a shard finished: a rerun keeps the pair if the plan key and the tar's hash still hold
and every study refused then is refused still.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from anycontrast_datasets.files import sha256_file, write_durably
from anycontrast_datasets.prepare import PrepareConfig, prepare_study
from anycontrast_datasets.store.codec import CodecName
from anycontrast_datasets.store.volume_index import (
    DATASET_NAME,
    SCHEMA_VERSION,
    MemberRow,
    member_from_dict,
    member_to_dict,
)
from anycontrast_datasets.store.volume_writer import ShardWriter
from anycontrast_datasets.study import Study, StudyError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Everything one shard is made of."""

    path: Path
    """Of the tar, in a folder that driver and worker share."""
    plan_key: str
    """Hash of the studies, the configuration and the format: another key, another shard."""
    studies: tuple[Study, ...]
    locations: dict[str, dict[str, Path]]
    """Study id -> contrast or "label" -> file."""
    prepare: PrepareConfig
    codec: CodecName
    level: int


@dataclass(frozen=True, kw_only=True)
class RefusedStudy:
    """A study that could not be prepared."""

    study_id: str
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardReceipt:
    """What became of a shard task."""

    shard: str
    plan_key: str
    sha256: str
    """Of the tar; empty if every study was refused and there is none."""
    bytes: int
    members: tuple[MemberRow, ...]
    refused: tuple[RefusedStudy, ...]
    is_reused: bool = False
    """Found finished from an earlier run. Not stored."""


def build_shard(task: ShardTask, on_study: Callable[[], None] | None = None) -> ShardReceipt:
    """Write one shard, unless it is there already.

    Args:
        task: What to write and where.
        on_study: Called after each study that was prepared or refused.

    Returns:
        The receipt. A study that raises `StudyError` is refused, never fatal.
    """
    tell = on_study or (lambda: None)
    with _one_torch_thread():
        receipt = _finished(task)
        if receipt is None:
            return _write(task, tell)
        for _ in task.studies:
            tell()
        return receipt


def receipt_path(shard: Path) -> Path:
    """Return where the receipt of a shard lies."""
    return shard.with_suffix(".json")


def withdraw_dataset(folder: Path) -> None:
    """Take back the commit of a data set whose shards are about to change."""
    (folder / DATASET_NAME).unlink(missing_ok=True)


def _write(task: ShardTask, on_study: Callable[[], None]) -> ShardReceipt:
    refused: list[RefusedStudy] = []
    sha256 = ""
    with ShardWriter(task.path, codec=task.codec, level=task.level) as writer:
        for study in task.studies:
            refusal = _try_add(task, study, writer)
            if refusal is not None:
                refused.append(refusal)
            on_study()
        withdraw_dataset(task.path.parent)
        receipt_path(task.path).unlink(missing_ok=True)
        if writer.rows:
            sha256 = writer.commit()
        else:
            task.path.unlink(missing_ok=True)
    receipt = ShardReceipt(
        shard=task.path.name,
        plan_key=task.plan_key,
        sha256=sha256,
        bytes=task.path.stat().st_size if sha256 else 0,
        members=tuple(writer.rows),
        refused=tuple(refused),
    )
    write_durably(receipt_path(task.path), _receipt_bytes(receipt))
    return receipt


def _try_add(task: ShardTask, study: Study, writer: ShardWriter | None) -> RefusedStudy | None:
    """Prepare a study and add it to the shard, if there is one; say why if that is refused."""
    try:
        locations = task.locations.get(study.study_id, {})
        arrays = prepare_study(study, locations, task.prepare)
        if writer is not None:
            writer.add(arrays)
    except StudyError as error:
        logger.warning("refused study %s (%s): %s", study.study_id, error.code, error)
        return RefusedStudy(study_id=study.study_id, code=error.code, reason=str(error))
    except Exception as error:
        error.add_note(f"while preparing study {study.study_id} for {task.path.name}")
        raise
    return None


def _finished(task: ShardTask) -> ShardReceipt | None:
    """Return the receipt of an earlier run if the shard beside it is whole and still right."""
    receipt = _read_receipt(receipt_path(task.path))
    if receipt is None or receipt.plan_key != task.plan_key:
        return None
    if receipt.sha256:
        if not task.path.is_file() or task.path.stat().st_size != receipt.bytes:
            return None
        if sha256_file(task.path) != receipt.sha256:
            logger.warning("%s is damaged: writing it again", task.path.name)
            return None
    was_refused = {refusal.study_id for refusal in receipt.refused}
    for study in task.studies:
        if study.study_id in was_refused and _try_add(task, study, None) is None:
            logger.info("%s can be prepared now: writing its shard again", study.study_id)
            return None
    return receipt


def _receipt_bytes(receipt: ShardReceipt) -> bytes:
    values = {
        "schema_version": SCHEMA_VERSION,
        "shard": receipt.shard,
        "plan_key": receipt.plan_key,
        "sha256": receipt.sha256,
        "bytes": receipt.bytes,
        "refused": [asdict(refusal) for refusal in receipt.refused],
        "members": [member_to_dict(row) for row in receipt.members],
    }
    return (json.dumps(values, indent=1) + "\n").encode()


def _read_receipt(path: Path) -> ShardReceipt | None:
    """Return the receipt, or None if there is none that this version can read."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        if values.pop("schema_version") != SCHEMA_VERSION:
            return None
        values["members"] = tuple(member_from_dict(row) for row in values["members"])
        values["refused"] = tuple(RefusedStudy(**refusal) for refusal in values["refused"])
        return ShardReceipt(**values, is_reused=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): writing its shard again", path.name, error)
        return None


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Hold torch to one thread: a matrix product split over threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
