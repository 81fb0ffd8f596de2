"""The manifest: one Parquet row per study, without paths and without original ids.

In: studies of a scan. Out: `manifest.parquet`, and beside it, private, the table that says where
the files are. Written whole or not at all; read back only if the schema is known, the content hash
agrees and every row is a valid `Study`. Rows are ordered by study id.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anycontrast_datasets.contrast import ContrastDescriptor, contrast_id
from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.pseudonym import STUDY_ID
from anycontrast_datasets.study import Affine, ContrastVote, Label, ManifestError, Study, Volume

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.parquet"
SOURCES_NAME = "private/sources.parquet"
LABEL_KEY = "label"

_Number = TypeVar("_Number", int, float)
_VERSION_KEY = b"anycontrast.schema_version"
_FINGERPRINT_KEY = b"anycontrast.fingerprint"

_text = pa.string()
# Plain lists: a fixed-size list inside a null struct (a study without label) cannot be read back.
_shape = pa.list_(pa.int32())
_affine = pa.list_(pa.float64())
_descriptor = pa.struct(
    [
        pa.field("family", _text),
        pa.field("te_s", pa.float64()),
        pa.field("tr_s", pa.float64()),
        pa.field("ti_s", pa.float64()),
        pa.field("flip_deg", pa.float64()),
        pa.field("b_value_s_mm2", pa.float64()),
        pa.field("field_t", pa.float64()),
        pa.field("has_agent", pa.bool_()),
    ]
)
_vote = pa.struct(
    [
        pa.field("source", _text, nullable=False),
        pa.field("contrast", _text, nullable=False),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("evidence", _text, nullable=False),
    ]
)
_volume = pa.struct(
    [
        pa.field("contrast", _text, nullable=False),
        pa.field("shape", _shape, nullable=False),
        pa.field("spacing_mm", pa.list_(pa.float64()), nullable=False),
        pa.field("affine", _affine, nullable=False),
        pa.field("descriptor", _descriptor, nullable=False),
        pa.field("flags", pa.list_(_text), nullable=False),
        pa.field("evidence", pa.list_(_text), nullable=False),
        pa.field("sha256", _text, nullable=False),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("votes", pa.list_(_vote), nullable=False),
        pa.field("face", _text, nullable=False),
        pa.field("voxels_sha256", _text, nullable=False),
        pa.field("image_hash", _text, nullable=False),
        pa.field("intensity", pa.list_(pa.float64())),
        pa.field("noise_sigma", pa.float64()),
    ]
)
_label = pa.struct(
    [
        pa.field("shape", _shape, nullable=False),
        pa.field("affine", _affine, nullable=False),
        pa.field("grid_of", _text, nullable=False),
        pa.field("sha256", _text, nullable=False),
    ]
)
SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("study_id", _text, nullable=False),
        pa.field("dataset", _text, nullable=False),
        pa.field("subject_id", _text, nullable=False),
        pa.field("session_id", _text, nullable=False),
        pa.field("split", _text, nullable=False),
        pa.field("volumes", pa.list_(_volume), nullable=False),
        pa.field("label", _label),
        pa.field("site", _text, nullable=False),
        pa.field("contrast_set", pa.uint64(), nullable=False),
    ]
)
"""Shapes in voxels as in the file, spacing in mm, affines row by row (voxel ijk -> RAS+ mm)."""

_SOURCES_SCHEMA = pa.schema(
    [pa.field(name, _text, nullable=False) for name in ("study_id", "role", "path")]
)


def write_manifest(studies: Sequence[Study], path: Path) -> None:
    """Write one row per study; locations are left out.

    Raises:
        ManifestError: two studies share an id, or an id has characters other than `[a-z0-9_-]`.
    """
    _check_ids([study.study_id for study in studies], path)
    rows = [_row(study) for study in sorted(studies, key=lambda s: s.study_id)]
    metadata = {_VERSION_KEY: str(SCHEMA_VERSION), _FINGERPRINT_KEY: _fingerprint(rows)}
    _write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata)), path, 0o644)


def read_manifest(path: Path) -> list[Study]:
    """Read and check a manifest; the locations of volumes and labels are empty.

    Raises:
        ManifestError: missing, not a manifest, of another schema, changed since it was written, or
            with a row that is not a valid study.
    """
    table = _read_table(path, SCHEMA)
    rows = table.to_pylist()
    if _fingerprint(rows) != manifest_fingerprint(path):
        raise ManifestError(f"reading {path}: the rows were changed after writing; scan again")
    _check_ids([row["study_id"] for row in rows], path)
    studies = []
    for number, row in enumerate(rows):
        try:
            studies.append(_study(row))
        except ValueError as error:
            raise ManifestError(f"reading {path}, row {number}: {error}; scan again") from error
    return studies


def manifest_fingerprint(path: Path) -> str:
    """Return the content hash of a manifest: equal rows, equal hash, whatever wrote the file."""
    metadata = _read_schema(path).metadata or {}
    return str(metadata.get(_FINGERPRINT_KEY, b"").decode("ascii", "replace"))


def write_locations(
    locations: Mapping[tuple[str, str], Path], manifest_dir: Path, *, fingerprint: str
) -> None:
    """Write where the files of a manifest are, readable by the owner only.

    Args:
        locations: `(study_id, contrast | "label")` -> absolute path.
        manifest_dir: Folder of the manifest.
        fingerprint: Of the manifest that this table belongs to.
    """
    rows = [
        {"study_id": study_id, "role": role, "path": str(path)}
        for (study_id, role), path in sorted(locations.items())
    ]
    metadata = {_VERSION_KEY: str(SCHEMA_VERSION), _FINGERPRINT_KEY: fingerprint}
    table = pa.Table.from_pylist(rows, schema=_SOURCES_SCHEMA.with_metadata(metadata))
    _write_table(table, manifest_dir / SOURCES_NAME, 0o600)


def read_locations(manifest_dir: Path) -> dict[tuple[str, str], Path]:
    """Return `(study_id, contrast | "label")` -> file of every volume and label of a manifest.

    Raises:
        ManifestError: the private table is missing or belongs to another manifest.
    """
    path = manifest_dir / SOURCES_NAME
    table = _read_table(path, _SOURCES_SCHEMA)
    if manifest_fingerprint(path) != manifest_fingerprint(manifest_dir / MANIFEST_NAME):
        raise ManifestError(f"reading {path}: it belongs to another manifest; scan again")
    return {(row["study_id"], row["role"]): Path(row["path"]) for row in table.to_pylist()}


def _row(study: Study) -> dict[str, Any]:
    return {
        "study_id": study.study_id,
        "dataset": study.dataset,
        "subject_id": study.subject_id,
        "session_id": study.session_id,
        "split": study.split,
        "volumes": [_volume_row(volume) for volume in study.volumes],
        "label": None if study.label is None else _label_row(study.label),
        "site": study.site,
        "contrast_set": contrast_set(study.contrasts),
    }


def contrast_set(contrasts: Iterable[str]) -> int:
    """Return a set of contrasts as bits: bit n stands for the contrast with vocabulary id n."""
    return sum({1 << contrast_id(name) for name in contrasts})


def _volume_row(volume: Volume) -> dict[str, Any]:
    descriptor = asdict(volume.descriptor)
    return {
        "contrast": volume.contrast,
        "shape": list(volume.shape),
        "spacing_mm": list(volume.spacing_mm),
        "affine": [value for row in volume.affine for value in row],
        "descriptor": {field.name: descriptor[field.name] for field in _descriptor},
        "flags": list(volume.flags),
        "evidence": list(volume.evidence),
        "sha256": volume.sha256,
        "confidence": volume.confidence,
        "votes": [asdict(vote) for vote in volume.votes],
        "face": volume.face,
        "voxels_sha256": volume.voxels_sha256,
        "image_hash": volume.image_hash,
        "intensity": None if volume.intensity is None else list(volume.intensity),
        "noise_sigma": volume.noise_sigma,
    }


def _label_row(label: Label) -> dict[str, Any]:
    return {
        "shape": list(label.shape),
        "affine": [value for row in label.affine for value in row],
        "grid_of": label.grid_of,
        "sha256": label.sha256,
    }


def _study(row: Mapping[str, Any]) -> Study:
    label = row["label"]
    return Study(
        study_id=row["study_id"],
        dataset=row["dataset"],
        subject_id=row["subject_id"],
        session_id=row["session_id"],
        split=row["split"],
        volumes=tuple(
            Volume(
                contrast=volume["contrast"],
                location="",
                shape=_triple(volume["shape"]),
                spacing_mm=_triple(volume["spacing_mm"]),
                affine=affine_rows(np.asarray(volume["affine"])),
                descriptor=ContrastDescriptor(**volume["descriptor"]),
                flags=tuple(volume["flags"]),
                evidence=tuple(volume["evidence"]),
                sha256=volume["sha256"],
                confidence=volume["confidence"],
                votes=tuple(ContrastVote(**vote) for vote in volume["votes"]),
                face=volume["face"],
                voxels_sha256=volume["voxels_sha256"],
                image_hash=volume["image_hash"],
                intensity=None if volume["intensity"] is None else _triple(volume["intensity"]),
                noise_sigma=volume["noise_sigma"],
            )
            for volume in row["volumes"]
        ),
        label=None
        if label is None
        else Label(
            location="",
            shape=_triple(label["shape"]),
            affine=affine_rows(np.asarray(label["affine"])),
            grid_of=label["grid_of"],
            sha256=label["sha256"],
        ),
    )


def _triple(values: Sequence[_Number]) -> tuple[_Number, _Number, _Number]:
    i, j, k = values
    return i, j, k


def affine_rows(affine: np.typing.ArrayLike) -> Affine:
    """Return a 4 x 4 affine (or its 16 values, row by row) as nested tuples of floats."""
    rows = np.asarray(affine, dtype=np.float64).reshape(4, 4).tolist()
    return tuple(tuple(row) for row in rows)  # type: ignore[misc]


def _check_ids(ids: Sequence[str], path: Path) -> None:
    malformed = next((name for name in ids if not STUDY_ID.fullmatch(name)), None)
    if malformed is not None:
        raise ManifestError(
            f"manifest {path.name}: study_id must match {STUDY_ID.pattern}, found {malformed!r}"
        )
    repeated = sorted(name for name, count in Counter(ids).items() if count > 1)
    if repeated:
        raise ManifestError(
            f"manifest {path.name}: study ids must be unique, found several of {repeated[:3]}; "
            "does the source hold two sessions under one name?"
        )


def _fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps([SCHEMA_VERSION, rows], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _write_table(table: pa.Table, path: Path, mode: int) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes(), mode=mode)


def _read_schema(path: Path) -> pa.Schema:
    if not path.is_file():
        raise ManifestError(f"reading the manifest: no file at {path}; run the scan first")
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"reading {path}: not a Parquet file ({error}); scan again") from error


def _read_table(path: Path, expected: pa.Schema) -> pa.Table:
    schema = _read_schema(path)
    version = (schema.metadata or {}).get(_VERSION_KEY, b"").decode("ascii", "replace")
    if not version.isdigit():
        raise ManifestError(f"reading {path}: it carries no schema version; it is not from a scan")
    if int(version) != SCHEMA_VERSION:
        remedy = "upgrade anycontrast" if int(version) > SCHEMA_VERSION else "scan again"
        raise ManifestError(
            f"reading {path}: schema version must be {SCHEMA_VERSION}, found {version}; {remedy}"
        )
    if not schema.equals(expected, check_metadata=False):
        raise ManifestError(f"reading {path}: columns differ from schema {version}; scan again")
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"reading {path}: damaged ({error}); scan again") from error
