"""The manifest as columns: same content as the objects, filters, damage found upon use."""

import resource
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from anycontrast.bench.synthetic_manifest import write_synthetic_manifest
from anycontrast_datasets.contrast import ContrastDescriptor, UnknownContrastError, contrast_id
from anycontrast_datasets.manifest import read_manifest, write_manifest
from anycontrast_datasets.manifest_file import VerifiedFile
from anycontrast_datasets.manifest_schema import SCHEMA, SCHEMA_VERSION
from anycontrast_datasets.manifest_table import ManifestTable
from anycontrast_datasets.study import Affine, Label, ManifestError, Study, Volume

AFFINE: Affine = (
    (-1.5, 0.1, 0.0, 90.25),
    (0.1, 1.5, 0.0, -126.0),
    (0.0, 0.0, 3.0, -72.0),
    (0.0, 0.0, 0.0, 1.0),
)


def volume(contrast: str, number: int) -> Volume:
    return Volume(
        contrast=contrast,
        location="",
        shape=(5, 6, 7 + number),
        spacing_mm=(1.5, 1.5, 3.0),
        affine=AFFINE,
        descriptor=ContrastDescriptor(te_s=0.09),
        flags=("contrast_disagreement",) if number else (),
        face="stripped" if number else "unknown",
        intensity=(1.0, 2.0, 3.0 + number) if number else None,
        noise_sigma=0.5 if number else None,
    )


def studies() -> list[Study]:
    rows = [
        ("a", "north", "train", ("T1w", "FLAIR")),
        ("b", "north", "val", ("T1w",)),
        ("c", "south", "train", ("T2w", "FLAIR", "ADC")),
        ("d", "south", "train", ("T1w", "FLAIR")),
    ]
    return [
        Study(
            study_id=study_id,
            dataset=dataset,
            subject_id=study_id,
            session_id="1",
            split=split,
            volumes=tuple(volume(c, n) for n, c in enumerate(contrasts)),
            label=Label(location="", shape=(5, 6, 7), affine=AFFINE, grid_of="T1w")
            if study_id == "a"
            else None,
            site="s1" if dataset == "north" else "",
        )
        for study_id, dataset, split, contrasts in rows
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_manifest(studies(), tmp_path / "manifest.parquet")
    return tmp_path / "manifest.parquet"


def test_columns_say_what_the_objects_say(path: Path) -> None:
    for table in (ManifestTable.open(path), ManifestTable.from_studies(studies()[::-1])):
        assert table.study_ids.to_pylist() == ["a", "b", "c", "d"]
        assert table.datasets.to_pylist() == ["north", "north", "south", "south"]
        assert table.sites.to_pylist() == ["s1", "s1", "", ""]
        assert table.num_volumes.tolist() == [2, 1, 3, 2]
        columns = table.volumes
        assert columns.study_row.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
        names = ["T1w", "FLAIR", "T1w", "T2w", "FLAIR", "ADC", "T1w", "FLAIR"]
        assert columns.contrast_id.tolist() == [contrast_id(name) for name in names]
        assert columns.shape[5].tolist() == [5, 6, 9]
        assert columns.spacing_mm[0].tolist() == [1.5, 1.5, 3.0]
        assert columns.face.to_pylist()[:2] == ["unknown", "stripped"]
        assert columns.flags.to_pylist()[:2] == [[], ["contrast_disagreement"]]
        assert np.isnan(columns.intensity[0]).all()
        assert columns.intensity[5].tolist() == [1.0, 2.0, 5.0]
        assert np.isnan(columns.noise_sigma[[0, 2, 3]]).all()
        assert [table.study(row) for row in range(4)] == studies()
        assert table.table.num_rows == len(table) == 4


def test_file_and_memory_have_one_fingerprint(path: Path) -> None:
    assert ManifestTable.open(path).fingerprint == ManifestTable.from_studies(studies()).fingerprint


def test_filters(path: Path) -> None:
    table = ManifestTable.open(path)
    assert table.select().tolist() == [0, 1, 2, 3]
    assert table.select(split="train").tolist() == [0, 2, 3]
    assert table.select(datasets=["south", "west"]).tolist() == [2, 3]
    assert table.select(any_of=["ADC", "T1w"], split="train").tolist() == [0, 2, 3]
    assert table.select(all_of=["T1w", "FLAIR"]).tolist() == [0, 3]
    assert table.select(none_of=["FLAIR"]).tolist() == [1]
    assert table.select(split="test").tolist() == []
    with pytest.raises(UnknownContrastError, match="nearest is 'FLAIR'"):
        table.select(any_of=["FLAIRE"])


def test_counts(path: Path) -> None:
    table = ManifestTable.open(path)
    assert table.count_by_contrast_set() == {
        ("T1w", "FLAIR"): 2,
        ("T1w",): 1,
        ("T2w", "FLAIR", "ADC"): 1,
    }
    assert table.count_by_contrast() == {"T1w": 3, "T2w": 1, "FLAIR": 3, "ADC": 1}


def test_a_manifest_of_many_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_synthetic_manifest(path, 40_000)
    table = ManifestTable.open(path)
    assert len(table) == 40_000
    assert table.num_volumes.mean() == pytest.approx(2.6, abs=0.1)
    rows = table.select(split="train", all_of=["T1w", "FLAIR"], none_of=["ADC"])
    row = int(rows[-1])
    study = table.study(row)
    assert study.study_id == f"synthetic-{row:08d}"
    assert {"T1w", "FLAIR"} <= set(study.contrasts)
    place = int(np.flatnonzero(table.volumes.study_row == row)[0])
    assert table.volumes.shape[place].tolist() == list(study.volumes[0].shape)
    with pytest.raises(IndexError, match="no row 40000"):
        table.study(40_000)


def test_a_manifest_without_studies_opens(tmp_path: Path) -> None:
    write_manifest([], tmp_path / "m.parquet")
    table = ManifestTable.open(tmp_path / "m.parquet")
    assert len(table) == 0
    assert table.select(any_of=["T1w"]).tolist() == []
    assert table.volumes.shape.shape == (0, 3)
    assert read_manifest(tmp_path / "m.parquet") == []


def test_the_fingerprint_does_not_follow_batches(tmp_path: Path) -> None:
    many = [replace(studies()[0], study_id=f"s{n:05d}", label=None) for n in range(300)]
    write_manifest(many, tmp_path / "one.parquet")
    whole = VerifiedFile(tmp_path / "one.parquet", SCHEMA)
    metadata = {k: v for k, v in pq.read_metadata(whole.path).metadata.items() if k[:1] == b"a"}
    table = whole.read().replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "two.parquet", row_group_size=7, compression="none")
    assert read_manifest(tmp_path / "two.parquet") == many
    assert ManifestTable.open(tmp_path / "two.parquet").fingerprint == whole.fingerprint


def rewritten(path: Path, column: str, values: list[object], **metadata: str) -> Path:
    """Write the file again with another column, keeping the hashes it carried."""
    stored = {k.decode(): v.decode() for k, v in pq.read_metadata(path).metadata.items()}
    stored = {k: v for k, v in stored.items() if k.startswith("anycontrast.")}
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    table = table.set_column(place, SCHEMA.field(column), [values])
    pq.write_table(table.replace_schema_metadata({**stored, **metadata}), path)
    return path


def test_a_changed_column_is_found_when_it_is_read(path: Path) -> None:
    rewritten(path, "subject_id", ["a", "b", "c", "x"])
    table = ManifestTable.open(path)
    with pytest.raises(ManifestError, match=r"changed after writing \(column subject_id\)"):
        table.column("subject_id")
    with pytest.raises(ManifestError, match=r"changed after writing \(column subject_id\)"):
        read_manifest(path)
    rewritten(path, "split", ["test"] * 4)
    with pytest.raises(ManifestError, match=r"changed after writing \(column split\)"):
        ManifestTable.open(path)


def test_another_schema_version_says_what_to_do(path: Path) -> None:
    key = "anycontrast.schema_version"
    rewritten(path, "site", [""] * 4, **{key: str(SCHEMA_VERSION + 1)})
    with pytest.raises(ManifestError, match="upgrade anycontrast"):
        ManifestTable.open(path)
    rewritten(path, "site", [""] * 4, **{key: str(SCHEMA_VERSION - 1)})
    with pytest.raises(ManifestError, match="scan again"):
        ManifestTable.open(path)


def test_flipped_bytes_anywhere_are_one_clear_line(path: Path) -> None:
    raw = path.read_bytes()
    expected = ManifestTable.open(path)
    found = 0
    for place in range(4, len(raw), 97):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x41]) + raw[place + 1 :])
        try:
            table = ManifestTable.open(path)
            assert table.study_ids.equals(expected.study_ids)
            assert read_manifest(path) == studies()
        except ManifestError as error:
            found += 1
            assert "\n" not in str(error)
            assert str(path) in str(error)
    assert found > 50


def test_a_full_disk_is_one_clear_line_and_keeps_the_old_manifest(path: Path) -> None:
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(ManifestError, match="no room on the disk"):
            write_manifest(studies()[:2], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
