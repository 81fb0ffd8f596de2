"""The manifest: one Parquet row per study, without paths and without original ids.

In: studies of a scan. Out: `manifest.parquet`, and beside it, private, the table that says where
the files are. Written whole or not at all; read back only if the schema is known, the content hash
agrees and every row is a valid `Study`. Rows are ordered by study id. For more studies than fit as
objects, see `manifest_table.py`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa

from anycontrast_datasets.manifest_file import VerifiedFile, read_fingerprint, write_table
from anycontrast_datasets.manifest_rows import (
    affine_rows,
    contrast_set,
    studies_to_table,
    table_to_studies,
)
from anycontrast_datasets.manifest_schema import (
    MANIFEST_NAME,
    SCHEMA,
    SCHEMA_VERSION,
    SOURCES_NAME,
    SOURCES_SCHEMA,
)
from anycontrast_datasets.pseudonym import STUDY_ID
from anycontrast_datasets.study import ManifestError, Study

__all__ = [
    "LABEL_KEY",
    "MANIFEST_NAME",
    "SCHEMA",
    "SCHEMA_VERSION",
    "SOURCES_NAME",
    "affine_rows",
    "contrast_set",
    "manifest_fingerprint",
    "read_locations",
    "read_manifest",
    "write_locations",
    "write_manifest",
]

LABEL_KEY = "label"
_BATCH = 16384


def write_manifest(studies: Sequence[Study], path: Path) -> None:
    """Write one row per study; locations are left out.

    Raises:
        ManifestError: two studies share an id, or an id has characters other than `[a-z0-9_-]`.
    """
    _check_ids([study.study_id for study in studies], path)
    write_table(_batches(sorted(studies, key=lambda s: s.study_id)), SCHEMA, path)


def read_manifest(path: Path) -> list[Study]:
    """Read and check a manifest; the locations of volumes and labels are empty.

    Raises:
        ManifestError: missing, not a manifest, of another schema, changed since it was written, or
            with a row that is not a valid study.
    """
    file = VerifiedFile(path, SCHEMA)
    table = file.read()
    file.check_fingerprint()
    _check_ids(table.column("study_id").to_pylist(), path)
    return table_to_studies(
        table,
        lambda row, error: ManifestError(f"reading {path}, row {row}: {error}; scan again"),
    )


def manifest_fingerprint(path: Path) -> str:
    """Return the content hash of a manifest: equal rows, equal hash, whatever wrote the file."""
    return read_fingerprint(path)


def write_locations(
    locations: Mapping[tuple[str, str], Path], manifest_dir: Path, *, fingerprint: str
) -> None:
    """Write where the files of a manifest are, readable by the owner only.

    Args:
        locations: `(study_id, contrast | "label")` -> absolute path.
        manifest_dir: Folder of the manifest.
        fingerprint: Of the manifest that this table belongs to.
    """
    rows = sorted(locations.items())
    columns = [
        [study_id for (study_id, _), _ in rows],
        [role for (_, role), _ in rows],
        [str(path) for _, path in rows],
    ]
    table = pa.Table.from_arrays([pa.array(c, pa.string()) for c in columns], schema=SOURCES_SCHEMA)
    path = manifest_dir / SOURCES_NAME
    write_table([table], SOURCES_SCHEMA, path, mode=0o600, fingerprint=fingerprint)


def read_locations(manifest_dir: Path) -> dict[tuple[str, str], Path]:
    """Return `(study_id, contrast | "label")` -> file of every volume and label of a manifest.

    Raises:
        ManifestError: the private table is missing or belongs to another manifest.
    """
    path = manifest_dir / SOURCES_NAME
    file = VerifiedFile(path, SOURCES_SCHEMA)
    table = file.read()
    if file.fingerprint != manifest_fingerprint(manifest_dir / MANIFEST_NAME):
        raise ManifestError(f"reading {path}: it belongs to another manifest; scan again")
    columns = [table.column(name).to_pylist() for name in SOURCES_SCHEMA.names]
    return {(study, role): Path(file) for study, role, file in zip(*columns, strict=True)}


def _batches(studies: Sequence[Study]) -> Iterator[pa.Table]:
    waiting = iter(studies)
    while batch := list(islice(waiting, _BATCH)):
        yield studies_to_table(batch)


def _check_ids(ids: Sequence[str], path: Path) -> None:
    malformed = next((name for name in ids if not STUDY_ID.fullmatch(name)), None)
    if malformed is not None:
        raise ManifestError(
            f"manifest {path.name}: study_id must match {STUDY_ID.pattern}, found {malformed!r}"
        )
    if len(set(ids)) == len(ids):
        return
    repeated = sorted(name for name, count in Counter(ids).items() if count > 1)
    raise ManifestError(
        f"manifest {path.name}: study ids must be unique, found several of {repeated[:3]}; "
        "does the source hold two sessions under one name?"
    )
