"""Write shards again without some of their studies, from their own bytes alone.

In: a folder of shards and study ids. Out: the folder as `run_shard` would leave it for a manifest
without them; no source file is needed, no other shard and no other study changes a byte. Killed
anywhere and run again, it ends the same.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from anycontrast_datasets.manifest import MANIFEST_NAME, manifest_fingerprint, read_manifest
from anycontrast_datasets.shard import exclusive, remove_stale
from anycontrast_datasets.shard_commit import Outcome, commit_dataset
from anycontrast_datasets.shard_plan import (
    Layout,
    admit,
    deal,
    read_layout,
    study_key,
    write_layout,
)
from anycontrast_datasets.shard_receipt import ShardReceipt, read_receipt, withdraw_dataset
from anycontrast_datasets.shard_task import relay_shard
from anycontrast_datasets.store.volume_index import DATASET_NAME, INDEX_NAME
from anycontrast_datasets.study import ShardError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeldSubjects:
    """A shard that holds studies of the subjects asked for."""

    name: str
    sha256: str
    subjects: frozenset[str]
    studies: frozenset[str]


def shards_of_subjects(folder: Path, subjects: Collection[str]) -> list[HeldSubjects]:
    """Return the shards of a folder that hold studies of some subjects, by all its receipts."""
    receipts = (_read(path) for path in sorted(folder.glob("shard-*.json")))
    return [held for receipt in receipts if receipt and (held := _held(receipt, subjects))]


def shards_of_studies(
    folder: Path, study_ids: Collection[str], subjects: Collection[str]
) -> list[HeldSubjects]:
    """Return the shards that hold some studies, by the layout alone: fast for a million studies.

    Args:
        folder: What `run_shard` wrote.
        study_ids: Looked for in the layout.
        subjects: Whose studies they are.
    """
    layout = read_layout(folder)
    wanted = set(study_ids)
    names = [] if layout is None else [n for n, held in layout.shards.items() if wanted & {*held}]
    receipts = (read_receipt(folder / name) for name in names)
    return [held for receipt in receipts if receipt and (held := _held(receipt, subjects))]


def relay_shards(folder: Path, manifest_dir: Path, leave_out: Collection[str]) -> str:
    """Remove studies from a folder of shards and make it a data set again.

    Args:
        folder: What `run_shard` wrote, finished or not.
        manifest_dir: Folder of the manifest, already without those studies.
        leave_out: Study ids; those that are not there are ignored.

    Returns:
        The new fingerprint; empty if the shards are not all there, or not those of the manifest,
        so that `run_shard` must finish them. The studies are gone in either case.

    Raises:
        ShardError: If another process writes the folder, the disk is full, or the shards are of
            another schema.
    """
    with exclusive(folder):
        earlier = read_layout(folder)
        if earlier is None:
            _refuse_unknown(folder)
            return ""
        kept = [i for held in earlier.shards.values() for i in held if i not in leave_out]
        layout = deal(earlier, earlier.origin, kept)
        if layout != earlier:
            write_layout(layout, folder)
        remove_stale(folder, layout)
        receipts = [relay_shard(folder / name, leave_out) for name in layout.shards]
        return _commit(folder, manifest_dir, layout, receipts)


def _commit(
    folder: Path, manifest_dir: Path, layout: Layout, receipts: list[ShardReceipt | None]
) -> str:
    manifest = manifest_dir / MANIFEST_NAME
    studies = read_manifest(manifest)
    faces = str(layout.origin["shard"]["faces"])
    admitted, refused, dropped = admit(studies, faces)
    keys = {study.study_id: study_key(study, layout.key) for study in admitted}
    present = [receipt for receipt in receipts if receipt is not None]
    if {i: key for receipt in present for i, key in receipt.keys.items()} != keys:
        _withdraw_whole(folder)
        logger.warning(
            "the shards in %s are not, or not all, those of the manifest: the studies are removed, "
            "now run `anycontrast shard`",
            folder,
        )
        return ""
    if not keys:
        _withdraw_whole(folder)
        return ""
    outcome = Outcome(
        splits={study.study_id: study.split for study in studies},
        receipts=tuple(present),
        refused=(*refused, *(r for receipt in present for r in receipt.refused)),
        dropped=tuple(dropped),
    )
    return commit_dataset(folder, outcome, manifest_fingerprint(manifest), layout.origin)


def _withdraw_whole(folder: Path) -> None:
    """Take back the commit and the index, which still lists who was removed."""
    withdraw_dataset(folder)
    (folder / INDEX_NAME).unlink(missing_ok=True)


def _read(path: Path) -> ShardReceipt | None:
    return read_receipt(path.with_suffix(".tar"))


def _held(receipt: ShardReceipt, subjects: Collection[str]) -> HeldSubjects | None:
    held: dict[str, str] = {}
    for row in receipt.members:
        if row.record and any(subject in row.record for subject in subjects):
            subject = str(json.loads(row.record)["subject_id"])
            if subject in subjects:
                held[row.study_id] = subject
    if not held:
        return None
    return HeldSubjects(
        name=receipt.shard,
        sha256=receipt.sha256,
        subjects=frozenset(held.values()),
        studies=frozenset(held),
    )


def _refuse_unknown(folder: Path) -> None:
    """Refuse a folder whose shards this version cannot take apart; an empty one is fine."""
    if (folder / DATASET_NAME).is_file() or any(folder.glob("shard-*.tar")):
        raise ShardError(
            f"withdrawing from {folder}: the shards must have a layout that this version reads, "
            "found none; remove the folder and run `anycontrast shard` again"
        )
