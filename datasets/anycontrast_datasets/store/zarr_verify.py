"""Compare a Zarr store on disk with its table: every shard, every `zarr.json`, nothing beside them.

Metadata files are not parsed but made again from the record and compared, so that a hostile one is
found without having been believed.
"""

import hashlib
from collections.abc import Sequence

from anycontrast_datasets.record_json import record_from_json
from anycontrast_datasets.store.byte_source import ByteSource, LocalSource
from anycontrast_datasets.store.zarr_index import AGAIN, ArrayRow
from anycontrast_datasets.store.zarr_metadata import (
    CHUNK_KEY,
    HIERARCHY,
    image_path,
    study_metadata,
)
from anycontrast_datasets.study import ShardError

MAX_METADATA_BYTES = 2**24


def study_problems(source: ByteSource, rows: Sequence[ArrayRow]) -> list[str]:
    """Hash every file of a study.

    Args:
        source: Where the store lies.
        rows: Of the study, its record last.

    Returns:
        One line per file that is missing or is not the one that was written.
    """
    expected = expected_files(rows)
    limits = {_shard_name(rows, row): row.table.shard_bytes for row in rows[:-1]}
    problems = []
    for name, wanted in expected.items():
        try:
            content = source.read_all(name, limits.get(name, MAX_METADATA_BYTES))
            found = f"found {hashlib.sha256(content).hexdigest()[:16]}"
        except FileNotFoundError:
            found = "is missing"
        except ShardError as error:
            found = str(error)
        if found != f"found {wanted[:16]}":
            where = f"study {rows[-1].study_id}: {name}"
            problems.append(f"{where} must have sha256 {wanted[:16]}, {found}; {AGAIN}")
    return problems


def strangers(source: LocalSource, rows: Sequence[ArrayRow]) -> list[str]:
    """Return one line per file in a study's folder that the store did not write."""
    study_id = rows[-1].study_id
    expected = expected_files(rows)
    found = {
        path.relative_to(source.root).as_posix()
        for path in (source.root / HIERARCHY / study_id).rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    return [
        f"study {study_id}: {name} was not written by this store; {AGAIN}"
        for name in sorted(found - set(expected))
    ]


def expected_files(rows: Sequence[ArrayRow]) -> dict[str, str]:
    """Return every file of a study by name, with its sha256.

    Raises:
        ShardError: If a row is not one that the store's writer makes.
    """
    record = record_from_json(rows[-1].record or "")
    layouts = {(row.contrast, row.resolution): row.layout for row in rows[:-1]}
    files = {
        f"{HIERARCHY}/{path}": hashlib.sha256(content).hexdigest()
        for path, content in study_metadata(record, layouts).items()
    }
    for row in rows[:-1]:
        files[_shard_name(rows, row)] = row.sha256
    return files


def _shard_name(rows: Sequence[ArrayRow], row: ArrayRow) -> str:
    record = record_from_json(rows[-1].record or "")
    return f"{HIERARCHY}/{image_path(record, row.contrast)}/{row.resolution}/{CHUNK_KEY}"
