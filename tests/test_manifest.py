"""The manifest: round trip, privacy, and every way a file can be wrong."""

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anycontrast_datasets.contrast import ContrastDescriptor
from anycontrast_datasets.manifest import (
    SCHEMA,
    SCHEMA_VERSION,
    manifest_fingerprint,
    read_locations,
    read_manifest,
    write_locations,
    write_manifest,
)
from anycontrast_datasets.manifest_schema import DESCRIPTOR, LABEL, VOLUME, VOTE
from anycontrast_datasets.study import Affine, Label, ManifestError, Study, Volume

AFFINE: Affine = (
    (-1.5, 0.1, 0.0, 90.25),
    (0.1, 1.5, 0.0, -126.0),
    (0.0, 0.0, 3.0, -72.0),
    (0.0, 0.0, 0.0, 1.0),
)


def volume(contrast: str) -> Volume:
    return Volume(
        contrast=contrast,
        location=f"Jane_Doe/{contrast}.nii.gz",
        shape=(5, 6, 7),
        spacing_mm=(1.5, 1.5, 3.0),
        affine=AFFINE,
        descriptor=ContrastDescriptor(te_s=0.09, has_agent=False),
        flags=("contrast_disagreement",),
        evidence=("file name token 't2': T2w",),
        sha256="ab" * 32,
    )


def study(study_id: str, *, with_label: bool = False) -> Study:
    label = Label(location="m.nii", shape=(5, 6, 7), affine=AFFINE, grid_of="T2w", sha256="cd" * 32)
    return Study(
        study_id=study_id,
        dataset="ds",
        subject_id="subj",
        session_id="",
        split="train",
        volumes=(volume("T1w"), volume("T2w")),
        label=label if with_label else None,
    )


def without_locations(value: Study) -> Study:
    label = None if value.label is None else replace(value.label, location="")
    return replace(
        value, volumes=tuple(replace(v, location="") for v in value.volumes), label=label
    )


def test_studies_read_back_exactly_but_for_their_locations(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    studies = [study("b", with_label=True), study("a")]
    write_manifest(studies, path)
    assert read_manifest(path) == [without_locations(s) for s in studies[::-1]]
    assert b"Jane_Doe" not in path.read_bytes()


def test_same_studies_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    write_manifest([study("a"), study("b")], one)
    write_manifest([study("b"), study("a")], two)
    assert one.read_bytes() == two.read_bytes()


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    write_manifest([study("a")], one)
    write_manifest([replace(study("a"), split="val")], two)
    assert manifest_fingerprint(one) != manifest_fingerprint(two)
    assert len(manifest_fingerprint(one)) == 64


def test_repeated_and_malformed_study_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="unique"):
        write_manifest([study("a"), study("a")], tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="study_id must match"):
        write_manifest([study("Sub 01")], tmp_path / "m.parquet")
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path, table: pa.Table, **metadata: str) -> None:
    kept = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    prefixed = {f"anycontrast.{key}": value for key, value in metadata.items()}
    pq.write_table(table.replace_schema_metadata({**kept, **prefixed}), path)


def test_newer_schema_version_says_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest([study("a")], path)
    rewrite(path, pq.read_table(path), schema_version=str(SCHEMA_VERSION + 1))
    for read in (read_manifest, manifest_fingerprint):
        with pytest.raises(ManifestError, match=f"found {SCHEMA_VERSION + 1}; upgrade anycontrast"):
            read(path)


def test_changed_row_and_changed_columns_are_found(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest([study("a")], path)
    table = pq.read_table(path)
    split = table.schema.get_field_index("split")
    changed = table.set_column(split, SCHEMA.field("split"), [["test"]])
    rewrite(path, changed)
    with pytest.raises(ManifestError, match="changed after writing"):
        read_manifest(path)
    rewrite(path, table.drop_columns(["split"]))
    with pytest.raises(ManifestError, match="columns differ"):
        read_manifest(path)


def test_missing_foreign_and_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(ManifestError, match="run the scan first"):
        read_manifest(path)
    path.write_text("not parquet")
    with pytest.raises(ManifestError, match="not a Parquet file"):
        read_manifest(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ManifestError, match="no schema version"):
        read_manifest(path)
    write_manifest([study(f"s{i}") for i in range(50)], path)
    raw = bytearray(path.read_bytes())
    raw[60] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ManifestError, match=r"damaged|changed"):
        read_manifest(path)


def test_locations_belong_to_their_manifest_and_are_private(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    path = tmp_path / "manifest.parquet"
    write_manifest([study("a")], path)
    locations = {("a", "T1w"): Path("/data/x.nii"), ("a", "label"): Path("/data/m.nii")}
    write_locations(locations, tmp_path, fingerprint=manifest_fingerprint(path))
    assert read_locations(tmp_path) == locations
    assert (tmp_path / "private" / "sources.parquet").stat().st_mode & 0o077 == 0
    write_manifest([study("b")], path)
    with pytest.raises(ManifestError, match="another manifest"):
        read_locations(tmp_path)


def test_the_documentation_lists_the_columns() -> None:
    text = (Path(__file__).parents[1] / "docs" / "manifest.md").read_text()
    for heading, columns in (("column", SCHEMA), ("field of a volume", VOLUME)):
        table = text.partition(f"| {heading} | type | meaning |")[2].partition("\n\n")[0]
        cells = re.findall(r"^\| (`.+?`) \|", table, re.M)
        assert re.findall(r"`(\w+)`", " ".join(cells)) == [column.name for column in columns]
    for inner in (DESCRIPTOR, VOTE):
        assert f"`{', '.join(field.name for field in inner)}`" in text
    label = next(line for line in text.splitlines() if line.startswith("| `label`"))
    assert all(f"`{field.name}`" in label for field in LABEL)
    assert f"| `anycontrast.schema_version` | {SCHEMA_VERSION};" in text
