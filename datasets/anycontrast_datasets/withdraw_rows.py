"""What a scan wrote, without some subjects: rows, locations, counts, converted volumes, caches."""

import csv
import io
import json
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.ledger import unescape_cell
from anycontrast_datasets.manifest import (
    MANIFEST_NAME,
    SOURCES_NAME,
    manifest_fingerprint,
    read_manifest,
    write_locations,
    write_manifest,
)
from anycontrast_datasets.pseudonym import STUDY_ID
from anycontrast_datasets.study import ManifestError, Study

WITHDRAWN_NAME = "private/withdrawn.csv"
CONVERTED_NAME = "private/converted"
CACHE_NAME = "private/inspected.jsonl"
TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{32}")
"""What a killed writer leaves."""


def remove_rows(
    manifest_dir: Path, subject_ids: Collection[str], earlier_manifests: Collection[str]
) -> None:
    """Remove subjects' rows from the manifest, then the locations and counts that go with them.

    Args:
        manifest_dir: What `run_scan` wrote.
        subject_ids: Pseudonyms; none of them need be there any more.
        earlier_manifests: Fingerprints of manifests that held the subjects: a table of locations
            that belongs to one of them is brought up to date, any other is left alone.
    """
    path, sources = manifest_dir / MANIFEST_NAME, manifest_dir / SOURCES_NAME
    studies = read_manifest(path)
    kept = [study for study in studies if study.subject_id not in subject_ids]
    if len(kept) < len(studies):
        write_manifest(kept, path)
    fingerprint = manifest_fingerprint(path)
    if manifest_fingerprint(sources) in earlier_manifests:
        table = pq.read_table(sources).to_pydict()
        ids = {study.study_id for study in kept}
        rows = zip(table["study_id"], table["role"], table["path"], strict=True)
        locations = {(study, role): Path(file) for study, role, file in rows if study in ids}
        write_locations(locations, manifest_dir, fingerprint=fingerprint)
    _rewrite_summary(manifest_dir, kept)


def _rewrite_summary(manifest_dir: Path, studies: Sequence[Study]) -> None:
    """Count the studies anew; counts of files stay those of the scan."""
    from anycontrast_datasets.scan import SUMMARY_NAME, summarise

    path = manifest_dir / SUMMARY_NAME
    if not path.is_file():
        return
    now = asdict(summarise(studies, []))
    values = json.loads(path.read_bytes())
    of_files = ("inputs", "accepted", "refused", "by_code")
    values |= {name: now[name] for name in now if name in values and name not in of_files}
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def clean_private(
    manifest_dir: Path, subject_ids: Collection[str], study_ids: Collection[str]
) -> None:
    """Remove converted volumes, rows of private tables that name the subjects, and what is cached.

    A cache names nobody, so that nothing in it can be told apart; the next scan makes it anew.

    Args:
        manifest_dir: What `run_scan` wrote.
        subject_ids: Pseudonyms.
        study_ids: Of all their studies.
    """
    (manifest_dir / CACHE_NAME).unlink(missing_ok=True)
    for folder in (manifest_dir, manifest_dir / "private"):
        for path in folder.iterdir():
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
    for study_id in filter(STUDY_ID.fullmatch, study_ids):
        shutil.rmtree(manifest_dir / CONVERTED_NAME / study_id, ignore_errors=True)
    for path in sorted((manifest_dir / "private").glob("*.csv")):
        if path != manifest_dir / WITHDRAWN_NAME:
            _drop_rows(path, {*study_ids, *subject_ids})


def _drop_rows(path: Path, names: Collection[str]) -> None:
    """Remove the rows with a cell that is one of the names; a person may have saved the table."""
    text = path.read_text(encoding="utf-8-sig")
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    kept = [row for row in rows if not any(cell.lstrip("'") in names for cell in row)]
    if len(kept) < len(rows):
        write_atomically(path, csv_bytes(kept, delimiter), mode=0o600)


def withdrawn_subjects(manifest_dir: Path) -> frozenset[str]:
    """Return the pseudonyms that a scan into this folder must leave out.

    Raises:
        ManifestError: the list has lost its heading.
    """
    path = manifest_dir / WITHDRAWN_NAME
    if not path.is_file():
        return frozenset()
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    if rows and "subject_id" not in rows[0]:
        raise ManifestError(
            f"reading {path}: a column subject_id is needed, found {sorted(map(str, rows[0]))}; "
            "correct the first line"
        )
    return frozenset(unescape_cell(row["subject_id"] or "").strip() for row in rows) - {""}


def csv_bytes(rows: Iterable[Sequence[str]], delimiter: str = ",") -> bytes:
    """Return rows as CSV, the way every table of the private folder is written."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode("utf-8")
