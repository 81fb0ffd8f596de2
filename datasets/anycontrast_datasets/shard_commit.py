"""The last step of sharding: receipts -> `index.parquet`, then `dataset.json`.

Rows are put in manifest order, whatever shard they lie in, so that the number of a study does not
depend on the layout. Until `dataset.json` is there, readers refuse the folder.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anycontrast_datasets.files import write_durably
from anycontrast_datasets.shard_task import ShardReceipt
from anycontrast_datasets.store.volume_index import (
    DATASET_NAME,
    INDEX_NAME,
    LABEL_MEMBER,
    RECORD_MEMBER,
    SCHEMA_VERSION,
    MemberRow,
    index_bytes,
    sha256_json,
)
from anycontrast_datasets.study import ShardError, Study

LIBRARIES = ("anycontrast", "numpy", "scipy", "torch", "numcodecs", "pyarrow")


def commit_dataset(
    out_dir: Path,
    studies: Sequence[Study],
    receipts: Sequence[ShardReceipt],
    origin: Mapping[str, Any],
) -> str:
    """Write the index and `dataset.json`; return the data set's fingerprint.

    Args:
        out_dir: Folder of the shards.
        studies: The manifest, in its order.
        receipts: One per planned shard, in the order of the plan.
        origin: What the shards were made from and how; copied into `dataset.json`.

    Raises:
        ShardError: If a shard that a worker wrote cannot be seen from here.
    """
    written = [receipt for receipt in receipts if receipt.sha256]
    _check_visible(written, out_dir)
    rows = _in_manifest_order(studies, written)
    sharded = list(dict.fromkeys(row.study_id for row in rows))
    kept = set(sharded)
    refused = [refusal for receipt in receipts for refusal in receipt.refused]
    assert len(sharded) + len(refused) == len(studies), "inputs = sharded + refused"
    index = index_bytes(rows)
    shards = [{"name": r.shard, "bytes": r.bytes, "sha256": r.sha256} for r in written]
    fingerprint = sha256_json([SCHEMA_VERSION, [r.sha256 for r in written], sharded])
    dataset = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "counts": {
            "studies": len(studies),
            "sharded": len(sharded),
            "refused": len(refused),
            "refused_by_code": _count(refusal.code for refusal in refused),
            "by_split": _count(s.split for s in studies if s.study_id in kept),
            "by_contrast": _count(r.contrast for r in rows if r.dtype == "int16"),
            "labels": sum(row.contrast == LABEL_MEMBER for row in rows),
        },
        "shards": shards,
        "refused": [{"study_id": r.study_id, "code": r.code} for r in refused],
        **origin,
        "versions": _versions(),
    }
    write_durably(out_dir / INDEX_NAME, index)
    write_durably(out_dir / DATASET_NAME, (json.dumps(dataset, indent=1) + "\n").encode())
    return fingerprint


def _in_manifest_order(
    studies: Sequence[Study], receipts: Sequence[ShardReceipt]
) -> list[MemberRow]:
    members: dict[str, list[MemberRow]] = {}
    for receipt in receipts:
        for row in receipt.members:
            members.setdefault(row.study_id, []).append(row)
    for study_id, rows in members.items():
        assert [r.contrast for r in rows].index(RECORD_MEMBER) == len(rows) - 1, study_id
    return [row for study in studies for row in members.get(study.study_id, [])]


def _check_visible(receipts: Sequence[ShardReceipt], out_dir: Path) -> None:
    for receipt in receipts:
        path = out_dir / receipt.shard
        if not path.is_file() or path.stat().st_size != receipt.bytes:
            raise ShardError(
                f"sharding: {receipt.shard} was written by a worker but is not in {out_dir} here; "
                "the output folder must be one that every node mounts"
            )


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
