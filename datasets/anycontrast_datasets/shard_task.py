"""One shard: prepare its studies, write the tar and the receipt, or find them already there.

In: a `ShardTask`, rows and paths of a few studies. Out: a `ShardReceipt`, index rows and refusals.
Knows no Ray; runs in any process. A finished shard whose tar is intact and whose studies are the
same is kept; in one that must be written again, every study that did not change is copied out of
the earlier tar, each member against its checksum, and only the others are prepared.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import extract_tb

import torch

from anycontrast_datasets.prepare import PrepareConfig, prepare_study
from anycontrast_datasets.shard_receipt import (
    RefusedStudy,
    ShardReceipt,
    is_intact,
    read_receipt,
    replace_shard,
    settle,
)
from anycontrast_datasets.store.codec import CodecName, checksum
from anycontrast_datasets.store.volume_index import MemberRow
from anycontrast_datasets.store.volume_writer import ShardWriter
from anycontrast_datasets.study import Study, StudyArrays, StudyError

logger = logging.getLogger(__name__)

WORKER_LOST = "worker_lost"


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Everything one shard is made of."""

    path: Path
    """Of the tar, in a folder that driver and worker share."""
    studies: tuple[Study, ...]
    keys: dict[str, str]
    """Study id -> hash of everything that decides its bytes, in the order of the tar."""
    locations: dict[str, dict[str, Path]]
    """Study id -> contrast or "label" -> file."""
    prepare: PrepareConfig
    codec: CodecName
    level: int
    lost: tuple[str, ...] = ()
    """Studies that a worker died over, again and again; refused unread."""


def build_shard(task: ShardTask, on_study: Callable[[], None] | None = None) -> ShardReceipt:
    """Write one shard, unless it is there already.

    Args:
        task: What to write and where.
        on_study: Called after each study that was prepared, copied or refused.

    Returns:
        The receipt. A study that cannot be prepared, for whatever reason, is refused, never fatal.

    Raises:
        ShardError: If the disk is full.
    """
    tell = on_study or (lambda: None)
    with _one_torch_thread():
        settle(task.path)
        earlier = read_receipt(task.path)
        if earlier is None or not _is_finished(task, earlier):
            return _write(task, earlier, tell)
        for _ in task.studies:
            tell()
        return earlier


def relay_shard(path: Path, leave_out: Collection[str]) -> ShardReceipt | None:
    """Write a finished shard again without some of its studies; no other byte of it changes.

    Args:
        path: Of the tar.
        leave_out: Study ids; a shard that holds none of them is not touched.

    Returns:
        The receipt of what is left, without the studies that are damaged; None if the shard has
        no receipt: an unfinished one.
    """
    settle(path)
    earlier = read_receipt(path)
    if earlier is None or not set(leave_out) & set(earlier.keys):
        return earlier
    keys = {i: key for i, key in earlier.keys.items() if i not in leave_out}
    with ShardWriter(path) as writer:
        for study_id, rows in earlier.rows_by_study().items():
            if study_id in keys and not _try_copy(path, rows, writer):
                del keys[study_id]
        refused = tuple(r for r in earlier.refused if r.study_id in keys)
        return _replace(path, writer, keys, refused)


def _write(
    task: ShardTask, earlier: ShardReceipt | None, on_study: Callable[[], None]
) -> ShardReceipt:
    refused: list[RefusedStudy] = []
    num_prepared, start_s = 0, time.process_time()
    stored = {} if earlier is None else earlier.rows_by_study()
    with ShardWriter(task.path, codec=task.codec, level=task.level) as writer:
        for study in task.studies:
            study_id = study.study_id
            is_same = earlier is not None and earlier.keys.get(study_id) == task.keys[study_id]
            rows = stored.get(study_id) if is_same else None
            if rows is None or not _try_copy(task.path, rows, writer):
                num_prepared += 1
                refusal = _try_add(task, study, writer)
                if refusal is not None:
                    refused.append(refusal)
            on_study()
        receipt = _replace(task.path, writer, task.keys, tuple(refused))
    return replace(receipt, num_prepared=num_prepared, cpu_s=time.process_time() - start_s)


def _replace(
    path: Path, writer: ShardWriter, keys: dict[str, str], refused: tuple[RefusedStudy, ...]
) -> ShardReceipt:
    sha256 = writer.finish() if writer.rows else ""
    receipt = ShardReceipt(
        shard=path.name,
        keys=keys,
        sha256=sha256,
        bytes=writer.num_bytes,
        members=tuple(writer.rows),
        refused=refused,
    )
    replace_shard(path, receipt, writer.publish)
    return receipt


def _try_copy(path: Path, rows: Sequence[MemberRow], writer: ShardWriter) -> bool:
    """Take a study over from the earlier tar; say no if it is not, bit by bit, what was written."""
    payloads = []
    try:
        with path.open("rb") as file:
            for row in rows:
                file.seek(row.offset)
                payloads.append(file.read(row.bytes))
    except OSError as error:
        logger.warning("%s cannot be read: %s", path.name, error)
        return False
    for row, payload in zip(rows, payloads, strict=True):
        if len(payload) != row.bytes or checksum(payload) != row.xxh3_64:
            logger.warning(
                "%s, study %s, member %s: damaged", path.name, row.study_id, row.contrast
            )
            return False
    writer.add_stored(rows, payloads)
    return True


def _try_add(task: ShardTask, study: Study, writer: ShardWriter | None) -> RefusedStudy | None:
    """Prepare a study and add it to the shard, if there is one; say why if that is refused."""
    try:
        arrays = _prepare(task, study)
        if writer is not None:
            writer.add(arrays)
    except StudyError as error:
        if error.code == "disk_full":
            raise
        logger.warning("refused study %s (%s): %s", study.study_id, error.code, error)
        return RefusedStudy(study_id=study.study_id, code=error.code, reason=str(error))
    return None


def _prepare(task: ShardTask, study: Study) -> StudyArrays:
    """Prepare a study; whatever goes wrong with it becomes a reason that names no path."""
    if study.study_id in task.lost:
        raise StudyError(
            f"study {study.study_id}: the worker must survive preparing it, found it dead each "
            "time (too little memory?); leave the study out, or give workers more memory and "
            f"remove {task.path.with_suffix('.json').name}",
            code=WORKER_LOST,
        )
    try:
        return prepare_study(study, task.locations.get(study.study_id, {}), task.prepare)
    except StudyError:
        raise
    except Exception as error:
        # The text of a foreign error may hold a path or a value of the file; its kind may not.
        frame = extract_tb(error.__traceback__)[-1]
        raise StudyError(
            f"study {study.study_id}: preparing it must not fail, found {type(error).__name__} in "
            f"{Path(frame.filename).name}:{frame.lineno}; leave the study out and report this",
            code="prepare_failed",
        ) from None


def _is_finished(task: ShardTask, earlier: ShardReceipt) -> bool:
    """Say whether an earlier run left exactly this shard, whole, and would refuse the same."""
    if list(earlier.keys.items()) != list(task.keys.items()):
        return False
    if not is_intact(task.path, earlier):
        logger.warning("%s is missing or damaged: writing it again", task.path.name)
        return False
    reasons = {refusal.study_id: refusal.code for refusal in earlier.refused}
    for study in task.studies:
        code = reasons.get(study.study_id)
        if code not in (None, WORKER_LOST) and _try_add(task, study, None) is None:
            logger.info("%s can be prepared now: writing its shard again", study.study_id)
            return False
    return True


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Hold torch to one thread: a matrix product split over threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
