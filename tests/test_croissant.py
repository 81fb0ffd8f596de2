"""The Croissant description: references resolve, checksums are the files', nothing leaks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from anycontrast_datasets.croissant import export_croissant
from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.manifest import manifest_fingerprint
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.shard import ShardConfig, run_shard
from anycontrast_datasets.sources.phantom import PhantomConfig
from anycontrast_datasets.study import ManifestError, ShardError, StudyError

SPACING = (10.0, 10.0, 10.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scanned and sharded phantom of three studies, described."""
    folder = tmp_path_factory.mktemp("jane_doe")
    config = ScanConfig(
        source="phantom",
        root=str(folder / "source"),
        phantom=PhantomConfig(num_studies=3, spacing_mm=SPACING),
    )
    run_scan(config, folder / "manifest")
    prepare = PrepareConfig(spacing_mm=SPACING)
    run_shard(folder / "manifest", folder / "shards", prepare, ShardConfig(studies_per_shard=2))
    export_croissant(
        folder / "manifest",
        folder / "shards",
        folder / "croissant.json",
        name="phantom",
        licence="CC0-1.0",
        base_url="https://example.org/data/",
    )
    return folder


@pytest.fixture
def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "croissant.json").read_text())
    return found


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of the document, without its context."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            yield from nodes(child)


def body(document: dict[str, Any]) -> list[dict[str, Any]]:
    return list(nodes({key: value for key, value in document.items() if key != "@context"}))


def test_it_says_what_the_data_set_is(document: dict[str, Any], folder: Path) -> None:
    assert document["@type"] == "sc:Dataset"
    assert "http://mlcommons.org/croissant/1.1" in document["conformsTo"]
    assert document["license"] == "https://spdx.org/licenses/CC0-1.0"
    fingerprint = manifest_fingerprint(folder / "manifest" / "manifest.parquet")
    assert document["identifier"].endswith(fingerprint)
    assert "3 studies" in document["description"]


def test_every_reference_names_a_node_and_names_are_unique(document: dict[str, Any]) -> None:
    defined = [node["@id"] for node in body(document) if "@id" in node and "@type" in node]
    used = {node["@id"] for node in body(document) if set(node) == {"@id"}}
    assert len(defined) == len(set(defined))
    assert used and used <= set(defined)


def test_every_file_has_the_checksum_and_size_it_has(
    document: dict[str, Any], folder: Path
) -> None:
    files = [node for node in document["distribution"] if node["@type"] == "cr:FileObject"]
    assert [f["name"] for f in files] == [
        "manifest.parquet",
        "index.parquet",
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    for file in files:
        part = "manifest" if file["name"] == "manifest.parquet" else "shards"
        path = folder / part / file["name"]
        assert file["sha256"] == sha256_file(path)
        assert file.get("contentSize", f"{path.stat().st_size} B") == f"{path.stat().st_size} B"
        assert file["contentUrl"] == f"https://example.org/data/{file['name']}"


def test_every_column_is_one_of_its_file(document: dict[str, Any], folder: Path) -> None:
    schemas = {
        "manifest.parquet": pq.read_schema(folder / "manifest" / "manifest.parquet"),
        "index.parquet": pq.read_schema(folder / "shards" / "index.parquet"),
    }
    fields = [node for node in body(document) if node.get("@type") == "cr:Field"]
    sourced = [field for field in fields if "source" in field]
    assert len(sourced) > 20
    for field in sourced:
        schema = schemas[field["source"]["fileObject"]["@id"]]
        column = schema.field(field["source"]["extract"]["column"])
        if "transform" in field["source"]:
            name = field["source"]["transform"]["jsonPath"].removeprefix("$[*].")
            column = column.type.value_type.field(name)
        assert field.get("isArray", False) == str(column.type).startswith("list")


def test_splits_are_counted_and_referred_to(document: dict[str, Any]) -> None:
    splits, studies = document["recordSet"][0], document["recordSet"][1]
    assert splits["dataType"] == "cr:Split"
    assert sum(row["splits/studies"] for row in splits["data"]) == 3
    (split,) = [field for field in studies["field"] if field["name"] == "split"]
    assert split["references"] == {"field": {"@id": "splits/name"}}


def test_nothing_private_is_in_it(folder: Path) -> None:
    text = (folder / "croissant.json").read_text()
    assert "jane_doe" not in text
    assert "private" not in text
    assert "phantom-0001" not in text


def test_a_manifest_without_shards_is_described_alone(folder: Path, tmp_path: Path) -> None:
    out = export_croissant(folder / "manifest", None, tmp_path / "c.json", name="phantom")
    document = json.loads(out.read_text())
    assert [node["name"] for node in document["distribution"]] == ["manifest.parquet"]
    assert [node["name"] for node in document["recordSet"]] == ["splits", "studies"]
    assert "license" not in document
    assert document["distribution"][0]["contentUrl"] == "manifest.parquet"


def test_what_cannot_be_described_is_refused(folder: Path, tmp_path: Path) -> None:
    out, manifest = tmp_path / "c.json", folder / "manifest"
    with pytest.raises(StudyError, match="SPDX identifier"):
        export_croissant(manifest, None, out, name="x", licence="ask the owner")
    with pytest.raises(StudyError, match="name must not be empty"):
        export_croissant(manifest, None, out, name=" ")
    with pytest.raises(ManifestError, match="run the scan first"):
        export_croissant(tmp_path, None, out, name="x")
    dataset = json.loads((folder / "shards" / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**dataset, "manifest_fingerprint": "00"}))
    with pytest.raises(ShardError, match="another manifest"):
        export_croissant(manifest, tmp_path, out, name="x")
    assert not out.exists()
