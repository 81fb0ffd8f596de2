"""Take one subject out of everything that was made: manifest, private tables, shards.

In: the folders of `scan` and `shard` and a subject. Out: the same folders without the subject, the
shards that held it written again from their own bytes, and the list of models trained on them.
Every step can be repeated; a run killed anywhere is completed by the next one with the same
subject. `private/withdrawn.csv` is written first, so that no scan takes the subject in again.

Not touched: the source files, copies of shards made elsewhere, caches of other nodes (the hashes
of the shards that changed are in `private/withdrawals.json`), pictures and reports made earlier.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from anycontrast_datasets.disk import write_checked
from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.manifest import (
    MANIFEST_NAME,
    manifest_fingerprint,
)
from anycontrast_datasets.pseudonym import PseudonymNaming, SplitRule, load_key
from anycontrast_datasets.shard_relay import relay_shards, shards_of_studies, shards_of_subjects
from anycontrast_datasets.study import ManifestError
from anycontrast_datasets.trained_on import TrainedModels, models_trained_on
from anycontrast_datasets.withdraw_rows import (
    WITHDRAWN_NAME,
    clean_private,
    csv_bytes,
    remove_rows,
    withdrawn_subjects,
)

logger = logging.getLogger(__name__)

RECORD_NAME = "private/withdrawals.json"
KEY_NAME = "private/pseudonym.key"


@dataclass(kw_only=True)
class Withdrawal:
    """One request, as `private/withdrawals.json` keeps it; names pseudonyms only."""

    subject_ids: list[str]
    """Pseudonyms; several if the subject is in several collections."""
    datasets: list[str] = field(default_factory=list)
    studies: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    """Fingerprints of manifests that held the subject."""
    fingerprints: list[str] = field(default_factory=list)
    """Of data sets that held the subject."""
    shards: list[dict[str, str]] = field(default_factory=list)
    """Name and sha256 of every shard that held the subject: copies of them must go too."""
    affected: list[str] = field(default_factory=list)
    """Models trained on one of the data sets."""
    uncertain: list[str] = field(default_factory=list)
    """Models trained on data of a fingerprint that is not known here."""
    fingerprint_after: str = ""
    is_done: bool = False


@dataclass(frozen=True, kw_only=True)
class WithdrawSummary:
    """What a withdrawal did."""

    subject_ids: tuple[str, ...]
    num_studies: int
    num_shards: int
    """Shards that held the subject: written again, or removed if nothing else was in them."""
    fingerprint: str
    """Of the data set without the subject; empty if it must be sharded again first."""
    affected: tuple[str, ...]
    """Checkpoints and releases trained with the subject."""
    uncertain: tuple[str, ...]
    """Checkpoints and releases of which that cannot be told."""


def withdraw_subject(
    manifest_dir: Path,
    shards_dir: Path,
    subject: str,
    *,
    checkpoints_dirs: Iterable[Path] = (),
    key_file: Path | None = None,
) -> WithdrawSummary:
    """Remove a subject from a manifest and its shards; other studies keep every byte.

    Args:
        manifest_dir: What `run_scan` wrote.
        shards_dir: What `run_shard` wrote; may be missing.
        subject: Its pseudonym, or its id in the source if the pseudonym key is known.
        checkpoints_dirs: Folders to search for models trained with the subject.
        key_file: Pseudonym key, if it is not `private/pseudonym.key`.

    Raises:
        ManifestError: If there is no such subject, or the manifest cannot be used.
        ShardError: If another process writes the shards, or the disk is full.
    """
    earlier = _read_records(manifest_dir)
    entry = _find(manifest_dir, shards_dir, subject, earlier, key_file, thorough=True)
    write_checked(manifest_dir / WITHDRAWN_NAME, _withdrawn_csv(manifest_dir, entry.subject_ids))
    _note_shards(entry, shards_dir)
    records = [*[e for e in earlier if e.subject_ids != entry.subject_ids], entry]
    _write_records(records, manifest_dir)
    remove_rows(manifest_dir, entry.subject_ids, entry.manifests)
    clean_private(manifest_dir, entry.subject_ids, entry.studies)
    if shards_dir.is_dir():
        entry.fingerprint_after = relay_shards(shards_dir, manifest_dir, entry.studies)
    models = models_trained_on(
        entry.fingerprints, checkpoints_dirs, cleared=[entry.fingerprint_after or "-"]
    )
    entry.affected = sorted({*entry.affected, *models.affected})
    entry.uncertain = sorted({*entry.uncertain, *models.uncertain} - set(entry.affected))
    entry.is_done = True
    _write_records(records, manifest_dir)
    return WithdrawSummary(
        subject_ids=tuple(entry.subject_ids),
        num_studies=len(entry.studies),
        num_shards=len({shard["name"] for shard in entry.shards}),
        fingerprint=entry.fingerprint_after,
        affected=tuple(entry.affected),
        uncertain=tuple(entry.uncertain),
    )


def which_models(
    manifest_dir: Path,
    shards_dir: Path,
    subject: str,
    *,
    checkpoints_dirs: Iterable[Path] = (),
    key_file: Path | None = None,
) -> TrainedModels:
    """Find the models that a subject was part of the training data of; changes nothing.

    Args, Raises: as `withdraw_subject`.
    """
    earlier = _read_records(manifest_dir)
    entry = _find(manifest_dir, shards_dir, subject, earlier, key_file, thorough=False)
    _note_shards(entry, shards_dir)
    cleared = [entry.fingerprint_after or "-"]
    return models_trained_on(entry.fingerprints, checkpoints_dirs, cleared=cleared)


def _find(
    manifest_dir: Path,
    shards_dir: Path,
    subject: str,
    earlier: Sequence[Withdrawal],
    key_file: Path | None,
    *,
    thorough: bool,
) -> Withdrawal:
    """Return the record of a withdrawal: a new one, or the one that an earlier run began.

    Thorough finds studies that are in the shards and no longer in the manifest, too.
    """
    manifest = manifest_dir / MANIFEST_NAME
    fingerprint = manifest_fingerprint(manifest)
    table = pq.read_table(manifest, columns=["study_id", "subject_id", "dataset"])
    datasets = {*table["dataset"].unique().to_pylist(), *(n for e in earlier for n in e.datasets)}
    names = _pseudonyms(manifest_dir, subject, datasets, key_file)
    known = [entry for entry in earlier if names & set(entry.subject_ids)]
    rows = table.filter(pc.is_in(table["subject_id"], pa.array(sorted(names)))).to_pydict()
    found = list(zip(rows["study_id"], rows["subject_id"], rows["dataset"], strict=True))
    if found and not thorough:
        stored = shards_of_studies(shards_dir, rows["study_id"], names)
    else:
        stored = shards_of_subjects(shards_dir, names)
    if not found and not known and not stored:
        raise ManifestError(
            f"withdrawing from {manifest_dir}: the subject must be in the manifest or the shards, "
            f"named by its pseudonym (subject_id){_about_key(manifest_dir, key_file)}; found none",
            code="unknown_subject",
        )
    ids = {name for _, name, _ in found} | {s for shard in stored for s in shard.subjects}
    entry = known[0] if known else Withdrawal(subject_ids=sorted(ids))
    entry.datasets = sorted({*entry.datasets, *(name for _, _, name in found)})
    held = {study for shard in stored for study in shard.studies}
    entry.studies = sorted({*entry.studies, *(study for study, _, _ in found), *held})
    entry.shards += [
        {"name": shard.name, "sha256": shard.sha256}
        for shard in stored
        if shard.sha256 not in {s["sha256"] for s in entry.shards}
    ]
    if found:
        entry.manifests = sorted({*entry.manifests, fingerprint})
    return entry


def _pseudonyms(
    manifest_dir: Path, subject: str, datasets: Iterable[str], key_file: Path | None
) -> set[str]:
    """Return what the subject may be called: as given, and its pseudonym in each collection."""
    names = {subject}
    path = key_file or manifest_dir / KEY_NAME
    if path.is_file():
        key = load_key(path, path)
        for dataset in datasets:
            naming = PseudonymNaming(key, dataset, SplitRule(dataset, "", (1.0, 0.0, 0.0)))
            for spelling in {subject, subject.removeprefix("sub-")}:
                names.add(naming(spelling, "").subject_id)
    return names


def _about_key(manifest_dir: Path, key_file: Path | None) -> str:
    path = key_file or manifest_dir / KEY_NAME
    return " or its id in the source" if path.is_file() else f"; ids of the source need {path}"


def _note_shards(entry: Withdrawal, shards_dir: Path) -> None:
    """Keep the fingerprint of the data set while it still holds the subject."""
    path = shards_dir / "dataset.json"
    if path.is_file() and entry.shards:
        values = json.loads(path.read_bytes())
        hashes = {shard["sha256"] for shard in entry.shards}
        if any(shard["sha256"] in hashes for shard in values["shards"]):
            entry.fingerprints = sorted({*entry.fingerprints, str(values["fingerprint"])})


def _withdrawn_csv(manifest_dir: Path, subject_ids: Iterable[str]) -> bytes:
    names = sorted(withdrawn_subjects(manifest_dir) | set(subject_ids))
    return csv_bytes([["subject_id"], *([name] for name in names)])


def _read_records(manifest_dir: Path) -> list[Withdrawal]:
    path = manifest_dir / RECORD_NAME
    if not path.is_file():
        return []
    try:
        return [Withdrawal(**values) for values in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise ManifestError(
            f"reading {path}: not a record of withdrawals ({error}); put the file aside and "
            "withdraw again"
        ) from error


def _write_records(records: Sequence[Withdrawal], manifest_dir: Path) -> None:
    values: list[dict[str, Any]] = [asdict(entry) for entry in records]
    content = (json.dumps(values, indent=1) + "\n").encode()
    write_atomically(manifest_dir / RECORD_NAME, content, mode=0o600)
