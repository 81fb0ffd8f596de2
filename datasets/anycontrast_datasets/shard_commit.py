"""The last step of sharding: receipts -> `index.parquet`, then `dataset.json`.

Rows are put in manifest order, whatever shard they lie in, so that neither the number of a study
nor the fingerprint depends on the layout. Until `dataset.json` is there, readers refuse the folder.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anycontrast_datasets.disk import write_checked
from anycontrast_datasets.ledger import Refusal, refuse, write_ledger
from anycontrast_datasets.shard_receipt import RefusedStudy, ShardReceipt, withdraw_dataset
from anycontrast_datasets.store.codec import DEFAULT_CODEC, DEFAULT_LEVEL, CodecName
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
from anycontrast_datasets.store.volume_writer import ShardWriter
from anycontrast_datasets.study import ShardError, StudyArrays

REJECTS_NAME = "rejects.csv"
LIBRARIES = ("anycontrast", "numpy", "scipy", "torch", "numcodecs", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of every study of a manifest."""

    splits: dict[str, str]
    """Study id -> split, in the order of the manifest."""
    receipts: tuple[ShardReceipt, ...]
    """One per planned shard, in the order of the plan."""
    refused: tuple[RefusedStudy, ...]
    """Before and while preparing."""
    dropped: tuple[Refusal, ...]
    """Volumes left out of studies that stay."""

    def refused_by_code(self) -> dict[str, int]:
        """Count refused studies by reason."""
        return _count(refusal.code for refusal in self.refused)


def commit_dataset(
    out_dir: Path, outcome: Outcome, manifest_fingerprint: str, origin: Mapping[str, Any]
) -> str:
    """Write the refusals, the index and `dataset.json`; return the data set's fingerprint.

    Args:
        out_dir: Folder of the shards.
        outcome: Of every study.
        manifest_fingerprint: Of the manifest that the studies are in.
        origin: How the shards were made; copied into `dataset.json`.

    Raises:
        ShardError: If nothing is left, a shard that a worker wrote cannot be seen from here, or
            the disk is full.
    """
    refused = [refuse("", r.code, r.reason, study_id=r.study_id) for r in outcome.refused]
    write_ledger([*refused, *outcome.dropped], out_dir / REJECTS_NAME)
    if len(refused) == len(outcome.splits):
        withdraw_dataset(out_dir)
        raise ShardError(
            f"sharding: at least one study must be prepared, refused all {len(outcome.splits)} "
            f"({outcome.refused_by_code()}); the reasons are in {out_dir / REJECTS_NAME}",
            code="all_refused",
        )
    written = [receipt for receipt in outcome.receipts if receipt.sha256]
    _check_visible(written, out_dir)
    rows = _in_manifest_order(outcome.splits, written)
    index = index_bytes(rows)
    dataset = _dataset(outcome, rows, hashlib.sha256(index).hexdigest())
    dataset |= {"manifest_fingerprint": manifest_fingerprint, **origin, "versions": _versions()}
    write_checked(out_dir / INDEX_NAME, index)
    write_checked(out_dir / DATASET_NAME, (json.dumps(dataset, indent=1) + "\n").encode())
    return str(dataset["fingerprint"])


def write_arrays(
    folder: Path,
    shards: Sequence[Sequence[StudyArrays]],
    *,
    codec: CodecName = DEFAULT_CODEC,
    level: int = DEFAULT_LEVEL,
) -> list[ShardReceipt]:
    """Write studies that are prepared already as a finished data set, ordered by study id.

    Args:
        folder: Made if need be; holds no data set yet.
        shards: The studies of each shard.
        codec: Compressor of the voxels.
        level: Of the compressor, 1..9.
    """
    folder.mkdir(parents=True, exist_ok=True)
    receipts = []
    for number, studies in enumerate(shards):
        path = folder / f"shard-{number:06d}.tar"
        with ShardWriter(path, codec=codec, level=level) as writer:
            for arrays in studies:
                writer.add(arrays)
            receipts.append(
                ShardReceipt(
                    shard=path.name,
                    keys={arrays.record.study_id: "" for arrays in studies},
                    sha256=writer.commit(),
                    bytes=writer.num_bytes,
                    members=tuple(writer.rows),
                    refused=(),
                )
            )
    records = sorted((a.record for studies in shards for a in studies), key=lambda r: r.study_id)
    outcome = Outcome(
        splits={record.study_id: record.split for record in records},
        receipts=tuple(receipts),
        refused=(),
        dropped=(),
    )
    commit_dataset(folder, outcome, "", {})
    return receipts


def dataset_fingerprint(rows: Iterable[MemberRow]) -> str:
    """Return the hash of what the studies hold, in manifest order, whatever shards they lie in."""
    studies: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        studies.setdefault(row.study_id, []).append((row.contrast, row.xxh3_64))
    return sha256_json([SCHEMA_VERSION, list(studies.items())])


def _dataset(outcome: Outcome, rows: Sequence[MemberRow], index_sha256: str) -> dict[str, Any]:
    kept = {row.study_id for row in rows}
    assert len(kept) + len(outcome.refused) == len(outcome.splits), "inputs = sharded + refused"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "volume",
        "fingerprint": dataset_fingerprint(rows),
        "index_sha256": index_sha256,
        "counts": {
            "studies": len(outcome.splits),
            "sharded": len(kept),
            "refused": len(outcome.refused),
            "refused_by_code": outcome.refused_by_code(),
            "volumes_left_out": _count(refusal.code for refusal in outcome.dropped),
            "by_split": _count(split for name, split in outcome.splits.items() if name in kept),
            "by_contrast": _count(r.contrast for r in rows if r.dtype == "int16"),
            "labels": sum(row.contrast == LABEL_MEMBER for row in rows),
        },
        "shards": [
            {"name": r.shard, "bytes": r.bytes, "sha256": r.sha256}
            for r in outcome.receipts
            if r.sha256
        ],
        "refused": [{"study_id": r.study_id, "code": r.code} for r in outcome.refused],
    }


def _in_manifest_order(studies: Iterable[str], receipts: Sequence[ShardReceipt]) -> list[MemberRow]:
    members: dict[str, list[MemberRow]] = {}
    for receipt in receipts:
        for study_id, rows in receipt.rows_by_study().items():
            assert [r.contrast for r in rows].index(RECORD_MEMBER) == len(rows) - 1, study_id
            assert study_id not in members, f"{study_id} lies in two shards"
            members[study_id] = rows
    return [row for study_id in studies for row in members.get(study_id, [])]


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
