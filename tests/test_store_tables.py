"""Tables of a volume store that are damaged, foreign or hostile: refused at opening, by name."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.store.volume_index import MemberRow, index_bytes
from anycontrast_datasets.study import ShardError, StudyArrays

SHAPE = (16, 8, 24)
SETS = (("T1w", "FLAIR", "ADC"), ("T2w",), ("T1wCE", "T2starw"))


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, study_of: Callable[..., StudyArrays]
) -> tuple[Path, list[MemberRow]]:
    """Three studies in two shards, and the rows of the index in manifest order."""
    folder = tmp_path_factory.mktemp("store") / "shards"
    codes = np.random.default_rng(0).integers(1, 4096, SHAPE).astype(np.int16)
    studies = [study_of(dict.fromkeys(names, codes), f"case-{n}") for n, names in enumerate(SETS)]
    receipts = write_arrays(folder, [[studies[2], studies[0]], [studies[1]]])
    rows = [row for receipt in receipts for row in receipt.members]
    return folder, sorted(rows, key=lambda row: row.study_id)


@pytest.fixture
def folder(pristine: tuple[Path, list[MemberRow]], tmp_path: Path) -> Path:
    return shutil.copytree(pristine[0], tmp_path / "shards")


@pytest.fixture
def rows(pristine: tuple[Path, list[MemberRow]]) -> list[MemberRow]:
    return pristine[1]


@pytest.mark.parametrize("name", ["dataset.json", "index.parquet"])
def test_missing_or_damaged_table_is_a_clear_error(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ShardError, match=name.replace(".", r"\.")):
        open_store(folder)
    (folder / name).unlink()
    with pytest.raises(ShardError, match=name.replace(".", r"\.")):
        open_store(folder)


def test_newer_schema_is_refused_with_the_remedy(folder: Path) -> None:
    values = json.loads((folder / "dataset.json").read_text())
    values["schema_version"] = 99
    (folder / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(ShardError, match=r"newer than.*upgrade"):
        open_store(folder)


def test_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="not a folder"):
        open_store(tmp_path / "nowhere")


def rewritten_index(folder: Path, rows: list[MemberRow]) -> None:
    """Replace the index by one that is consistent in itself but not with the records."""
    change_dataset(folder, index_bytes(rows))


def change_dataset(folder: Path, index: bytes) -> None:
    (folder / "index.parquet").write_bytes(index)
    values = json.loads((folder / "dataset.json").read_text())
    values["index_sha256"] = hashlib.sha256(index).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(values))


def test_contrast_missing_from_the_index_is_found(folder: Path, rows: list[MemberRow]) -> None:
    rows = [r for r in rows if (r.study_id, r.contrast) != ("case-0", "FLAIR")]
    rewritten_index(folder, rows)
    with pytest.raises(ShardError, match=r"case-0.*must list"):
        open_store(folder).read(0)


def test_record_that_differs_from_the_one_in_the_tar_is_found(
    folder: Path, rows: list[MemberRow]
) -> None:
    other = [
        replace(row, record=row.record.replace('"split":"train"', '"split":"val"'))
        if row.study_id == "case-0" and row.record
        else row
        for row in rows
    ]
    assert other != rows
    rewritten_index(folder, other)
    with pytest.raises(ShardError, match="differs from the record"):
        open_store(folder).read(0)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"shard": "../shard-000000.tar"}, "not listed"),
        ({"shard": "/etc/passwd"}, "not listed"),
        ({"shard": "shard-000001.tar"}, "another shard"),
        ({"study_id": "case-1"}, "another study"),
        ({"offset": -512}, "beyond its end"),
        ({"offset": 2**62}, "beyond its end"),
        ({"bytes": -1}, "beyond its end"),
        ({"bytes": 0}, "beyond its end"),
        ({"bytes": 2**62}, "beyond its end"),
        ({"offset": 2**62, "bytes": 2**62}, "beyond its end"),
        ({"offset": 512}, "members out of order"),
        ({"shape": (2**20, 2**20, 2**20)}, "a shape"),
        ({"shape": (16, -8, 24)}, "a shape"),
        ({"shape": (16, 0, 24)}, "a shape"),
        ({"shape": (1, 1, 1)}, "a shape"),
        ({"shape": (3072, 1)}, "a shape"),
        ({"shape": ()}, "a shape"),
        ({"dtype": "object"}, "a shape or type"),
        ({"xxh3_64": None}, "null"),
    ],
)
def test_index_that_no_writer_makes_is_refused_at_opening(
    folder: Path, rows: list[MemberRow], changed: dict[str, Any], why: str
) -> None:
    assert (rows[1].study_id, rows[1].contrast) == ("case-0", "FLAIR")
    whole_study = why == "not listed"
    rows = [
        replace(row, **changed) if n == 1 or (whole_study and row.study_id == "case-0") else row
        for n, row in enumerate(rows)
    ]
    rewritten_index(folder, rows)
    with pytest.raises(ShardError, match=rf"case-.*{why}.*anycontrast shard"):
        open_store(folder)


@pytest.mark.parametrize("missing", ["record", "column"])
def test_index_without_a_record_or_a_column_is_refused(
    folder: Path, rows: list[MemberRow], missing: str
) -> None:
    content = index_bytes(rows[:-1])
    if missing == "column":
        buffer = io.BytesIO()
        pq.write_table(pq.read_table(io.BytesIO(index_bytes(rows))).drop(["offset"]), buffer)
        content = buffer.getvalue()
    change_dataset(folder, content)
    with pytest.raises(ShardError, match=r"the last study has no record|not one of ours"):
        open_store(folder)


@pytest.mark.parametrize(
    "name", ["../shard-000000.tar", "/etc/passwd", "a/b.tar", "", "shard.tar\n", "SHARD.tar", 7]
)
def test_shard_names_that_could_lead_elsewhere_are_refused(folder: Path, name: object) -> None:
    values = json.loads((folder / "dataset.json").read_text())
    values["shards"][0]["name"] = name
    (folder / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(ShardError, match="no name of a shard"):
        open_store(folder)


@pytest.mark.parametrize("shards", [None, 3, [{}], [{"name": "a.tar", "bytes": -1, "sha256": ""}]])
def test_list_of_shards_that_is_none_is_refused(folder: Path, shards: object) -> None:
    values = json.loads((folder / "dataset.json").read_text())
    values["shards"] = shards
    (folder / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(ShardError, match="not those of a writer of ours"):
        open_store(folder)


@pytest.mark.parametrize("content", [b"[]", b"7", b'{"schema_version": []}', b"[" * 100_000])
def test_dataset_that_is_no_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"dataset\.json is damaged"):
        open_store(folder)


@pytest.mark.parametrize("kind", ["volume", "zarr"])
def test_a_store_without_a_fingerprint_is_damaged(folder: Path, kind: str) -> None:
    dataset = json.loads((folder / "dataset.json").read_text())
    del dataset["fingerprint"]
    (folder / "dataset.json").write_text(json.dumps({**dataset, "kind": kind}))
    with pytest.raises(ShardError, match=r"dataset\.json is damaged \(no fingerprint\)"):
        open_store(folder)


def test_unknown_kind_of_store_is_refused(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"kind": "cloud"}')
    with pytest.raises(ShardError, match=r"of kind 'cloud'.*upgrade"):
        open_store(folder)
