"""The receipt of a shard: what it holds, made of what, and how it replaces an earlier one.

In: what a shard task did. Out: `shard-000000.json` beside the tar. A shard is finished when its
receipt is there and the tar has the hash in it. Tar and receipt change together: the next receipt
is written first (`.next`), then the tar is renamed, then the receipt. `settle` completes or undoes
whatever a kill left between these steps, so at any moment one whole pair can be had, and no study
whose source may be gone is ever lost.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from anycontrast_datasets.disk import write_checked
from anycontrast_datasets.files import sha256_file, sync_path
from anycontrast_datasets.store.volume_index import (
    DATASET_NAME,
    SCHEMA_VERSION,
    MemberRow,
    member_from_dict,
    member_to_dict,
)

logger = logging.getLogger(__name__)


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
    keys: dict[str, str]
    """Study id -> hash of everything that decides its bytes, in the order of the tar; refused
    studies included."""
    sha256: str
    """Of the tar; empty if every study was refused and there is none."""
    bytes: int
    members: tuple[MemberRow, ...]
    refused: tuple[RefusedStudy, ...]
    is_reused: bool = False
    """Found finished from an earlier run. Not stored."""
    num_prepared: int = 0
    """Studies prepared, not copied, by this run. Not stored."""
    cpu_s: float = 0.0
    """CPU time of preparing, compressing and writing those. Not stored."""

    def rows_by_study(self) -> dict[str, list[MemberRow]]:
        """Return the members of each study, in the order of the tar."""
        rows: dict[str, list[MemberRow]] = {}
        for row in self.members:
            rows.setdefault(row.study_id, []).append(row)
        return rows


def receipt_path(shard: Path) -> Path:
    """Return where the receipt of a shard lies."""
    return shard.with_suffix(".json")


def withdraw_dataset(folder: Path) -> None:
    """Take back the commit of a data set whose shards are about to change."""
    (folder / DATASET_NAME).unlink(missing_ok=True)


def read_receipt(shard: Path) -> ShardReceipt | None:
    """Return the receipt of a shard, or None if there is none that this version can read."""
    return _read(receipt_path(shard))


def replace_shard(shard: Path, receipt: ShardReceipt, put_tar: Callable[[], None]) -> None:
    """Put a new tar and its receipt in the place of the earlier pair.

    Args:
        shard: Name of the tar.
        receipt: Of the new tar.
        put_tar: Gives the new tar its name; not called when the receipt says there is none.
    """
    write_checked(_next_path(shard), _to_bytes(receipt))
    if shard.exists():
        withdraw_dataset(shard.parent)
    if receipt.sha256:
        put_tar()
    _adopt_next(shard, receipt)


def settle(shard: Path) -> None:
    """Complete the replacement of a shard that a kill interrupted, or undo it."""
    pending = _next_path(shard)
    if not pending.exists():
        return
    receipt = _read(pending)
    if receipt is not None and (not receipt.sha256 or is_intact(shard, receipt)):
        _adopt_next(shard, receipt)
    else:
        pending.unlink()


def is_intact(shard: Path, receipt: ShardReceipt) -> bool:
    """Say whether the tar is, byte for byte, the one that the receipt describes."""
    if not receipt.sha256:
        return not shard.exists()
    if not shard.is_file() or shard.stat().st_size != receipt.bytes:
        return False
    return sha256_file(shard) == receipt.sha256


def _next_path(shard: Path) -> Path:
    return shard.with_suffix(".json.next")


def _adopt_next(shard: Path, receipt: ShardReceipt) -> None:
    if not receipt.sha256:
        shard.unlink(missing_ok=True)
    _next_path(shard).replace(receipt_path(shard))
    sync_path(shard.parent)


def _to_bytes(receipt: ShardReceipt) -> bytes:
    values = {
        "schema_version": SCHEMA_VERSION,
        "shard": receipt.shard,
        "sha256": receipt.sha256,
        "bytes": receipt.bytes,
        "keys": receipt.keys,
        "refused": [asdict(refusal) for refusal in receipt.refused],
        "members": [member_to_dict(row) for row in receipt.members],
    }
    return (json.dumps(values, indent=1) + "\n").encode()


def _read(path: Path) -> ShardReceipt | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        if values.pop("schema_version") != SCHEMA_VERSION:
            return None
        values["members"] = tuple(member_from_dict(row) for row in values["members"])
        values["refused"] = tuple(RefusedStudy(**refusal) for refusal in values["refused"])
        receipt = ShardReceipt(**values, is_reused=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): writing its shard again", path.name, error)
        return None
    is_ours = receipt.shard == f"{path.name.partition('.')[0]}.tar"
    return receipt if is_ours and isinstance(receipt.keys, dict) else None
