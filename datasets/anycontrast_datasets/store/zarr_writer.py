"""Copy an opened store into a Zarr v3 store. Rerun it after any accident: it ends the same.

In: any `StudyStore`. Out: `studies.zarr/` (the hierarchy, see `zarr_metadata`), one receipt per
study, `index.parquet`, `dataset.json` (written last: the commit). A study is written into a folder
of its own under a temporary name and renamed when it is whole and on disk; its receipt comes after.
A rerun keeps a study whose content and configuration are the receipt's and whose files are those
that were written. Studies that the source has no more are removed. One writer at a time.

The fingerprint is the source's: same studies, same voxels, same order.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anycontrast_datasets.disk import full_disk_named, write_checked
from anycontrast_datasets.files import sync_path
from anycontrast_datasets.store.byte_source import LocalSource
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.store.volume_index import (
    DATASET_NAME,
    INDEX_NAME,
    KEY_PATTERN,
    SCHEMA_VERSION,
)
from anycontrast_datasets.store.zarr_config import ZarrConfig
from anycontrast_datasets.store.zarr_index import (
    KIND,
    ZARR_VERSION,
    ArrayRow,
    index_bytes,
    row_from_dict,
    row_to_dict,
)
from anycontrast_datasets.store.zarr_metadata import (
    HIERARCHY,
    root_metadata,
)
from anycontrast_datasets.store.zarr_study import content_key, study_files
from anycontrast_datasets.store.zarr_verify import strangers, study_problems
from anycontrast_datasets.study import ShardError

logger = logging.getLogger(__name__)

RECEIPTS = "receipts"
PARTIAL = ".partial"
LOCK_NAME = ".lock"
OnProgress = Callable[[int, int], None]


def write_zarr_store(
    source: StudyStore,
    out: Path,
    config: ZarrConfig,
    *,
    manifest_fingerprint: str = "",
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write every study of `source` into a Zarr store.

    Args:
        source: Opened store; read from `config.num_threads` threads.
        out: Folder of the Zarr store, made if need be.
        config: Layout.
        manifest_fingerprint: Of the manifest that the studies are in, to tell later; blank if not
            known.
        on_progress: Called with (studies done, studies in all).

    Returns:
        JSON-ready: `num_studies`, `num_reused`, `num_bytes`, `fingerprint`, `hierarchy`.

    Raises:
        ShardError: If a study of the source cannot be read or stored, or another process writes
            to `out`. Finished studies are kept.
    """
    total, done = len(source.records), 0
    hierarchy = out / HIERARCHY
    hierarchy.mkdir(parents=True, exist_ok=True)
    with _exclusive(out):
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        for folder in (out / PARTIAL, out / RECEIPTS):
            folder.mkdir(exist_ok=True)
        _remove_stale(out, {record.study_id for record in source.records})
        write_checked(hierarchy / "zarr.json", root_metadata())
        receipts = []
        with ThreadPoolExecutor(config.num_threads) as pool:
            tasks = [pool.submit(_convert, source, n, out, config) for n in range(total)]
            try:
                for task in tasks:
                    receipts.append(task.result())
                    done += 1
                    if on_progress is not None:
                        on_progress(done, total)
            finally:
                pool.shutdown(cancel_futures=True)
        shutil.rmtree(out / PARTIAL)
        return _commit(source, out, config, receipts, manifest_fingerprint)


@dataclass(frozen=True)
class _Receipt:
    key: str
    """Hash of content and configuration: another key, another study."""
    rows: tuple[ArrayRow, ...]
    num_bytes: int
    """Of the study's folder."""
    is_reused: bool = False


def _convert(source: StudyStore, index: int, out: Path, config: ZarrConfig) -> _Receipt:
    """Write one study, or find it written."""
    arrays = source.read(index, label=True)
    study_id = arrays.record.study_id
    if not KEY_PATTERN.fullmatch(study_id):
        raise ShardError(
            f"study {study_id!r}: an id must match {KEY_PATTERN.pattern} to be a folder",
            code="bad_study_id",
        )
    key = content_key(arrays, config)
    folder, receipt_path = out / HIERARCHY / study_id, out / RECEIPTS / f"{study_id}.json"
    kept = _finished(out, receipt_path, key)
    if kept is not None:
        return kept
    files, rows = study_files(arrays, config)
    partial = out / PARTIAL / study_id
    num_bytes = sum(map(len, files.values()))
    with full_disk_named(folder, num_bytes):
        _write_files(partial, files)
    _withdraw(out)
    receipt_path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync_path(folder.parent)
    receipt = _Receipt(key, tuple(rows), num_bytes)
    write_checked(receipt_path, _receipt_text(receipt))
    return receipt


def _finished(out: Path, receipt_path: Path, key: str) -> _Receipt | None:
    """Return the receipt of an earlier run if it is of this content and the folder is whole."""
    if not receipt_path.is_file():
        return None
    try:
        values = json.loads(receipt_path.read_bytes())
        if values["key"] != key:
            return None
        rows = tuple(row_from_dict(row) for row in values["rows"])
        receipt = _Receipt(key, rows, int(values["num_bytes"]), is_reused=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): writing the study again", receipt_path.name, error)
        return None
    source = LocalSource(out)
    problems = study_problems(source, rows) + strangers(source, rows)
    if problems:
        logger.warning("%s: writing the study again", problems[0])
        return None
    return receipt


def _commit(
    source: StudyStore,
    out: Path,
    config: ZarrConfig,
    receipts: list[_Receipt],
    manifest_fingerprint: str,
) -> dict[str, Any]:
    index = index_bytes([row for receipt in receipts for row in receipt.rows])
    contrasts = Counter(name for record in source.records for name in record.contrasts)
    dataset = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "zarr_version": ZARR_VERSION,
        "fingerprint": source.fingerprint,
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "counts": {
            "studies": len(receipts),
            "by_split": dict(sorted(Counter(r.split for r in source.records).items())),
            "by_contrast": dict(sorted(contrasts.items())),
            "labels": sum(record.has_label for record in source.records),
        },
        "bytes": sum(receipt.num_bytes for receipt in receipts),
        "manifest_fingerprint": manifest_fingerprint,
        "zarr": {k: v for k, v in asdict(config).items() if k != "num_threads"},
        "versions": {
            name: importlib.metadata.version(name) for name in ("numcodecs", "numpy", "pyarrow")
        },
    }
    text = (json.dumps(dataset, indent=1) + "\n").encode()
    if not _holds(out / DATASET_NAME, text) or not _holds(out / INDEX_NAME, index):
        _withdraw(out)
        write_checked(out / INDEX_NAME, index)
        write_checked(out / DATASET_NAME, text)
    return {
        "num_studies": len(receipts),
        "num_reused": sum(receipt.is_reused for receipt in receipts),
        "num_bytes": dataset["bytes"],
        "fingerprint": source.fingerprint,
        "hierarchy": str(out / HIERARCHY),
    }


def _remove_stale(out: Path, wanted: set[str]) -> None:
    """Remove studies that the source has no more; refuse what this writer did not make."""
    for path in sorted((out / HIERARCHY).iterdir()):
        if path.name in wanted or path.name == "zarr.json":
            continue
        if not KEY_PATTERN.fullmatch(path.name) or not (path / "zarr.json").is_file():
            raise ShardError(
                f"writing the zarr store: {path} is not a study of this store; move it away or "
                "choose another folder"
            )
        _withdraw(out)
        logger.info("removing study %s, which the source has no more", path.name)
        (out / RECEIPTS / f"{path.name}.json").unlink(missing_ok=True)
        shutil.rmtree(path)


def _withdraw(out: Path) -> None:
    """Take back the commit of a store that is about to change."""
    (out / DATASET_NAME).unlink(missing_ok=True)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a new folder and make them durable."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        sync_path(Path(parent))


def _receipt_text(receipt: _Receipt) -> bytes:
    rows = [row_to_dict(row) for row in receipt.rows]
    values = {"key": receipt.key, "num_bytes": receipt.num_bytes, "rows": rows}
    return (json.dumps(values) + "\n").encode()


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Hold the folder for one writer; the lock ends with the process, however it ends."""
    with (out / LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"writing the zarr store: {out} is being written by another process; wait for it "
                "to end, or choose another folder",
                code="shards_locked",
            ) from error
        yield
