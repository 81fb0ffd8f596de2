"""The mapping table: written by a scan, edited by a person, applied by the next scan."""

import csv
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from anycontrast_datasets.ledger import read_ledger
from anycontrast_datasets.manifest import read_locations, read_manifest
from anycontrast_datasets.mapping import COLUMNS, read_decisions
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.study import ManifestError
from anycontrast_datasets.volume import write_volume


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name in ("sub-1_T1w", "sub-1_T2w", "sub-2_scan", "sub-2_FLAIR", "=cmd_sub-3_T1w"):
        rng = np.random.default_rng(crc32(name.encode()))
        voxels = rng.integers(0, 999, size=(6, 7, 5)).astype(np.int16)
        folder.mkdir(exist_ok=True)
        write_volume(folder / f"{name}.nii.gz", voxels, np.diag([2.0, 2.0, 3.0, 1.0]))
    return folder


def config(root: Path) -> ScanConfig:
    return ScanConfig(source="bids", root=str(root), dataset="d", check_pictures=False)


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as stream:
        return {row["location"]: row for row in csv.DictReader(stream)}


def decide(path: Path, **decisions: str) -> None:
    """Fill the decision column as a person would, by the end of the file name."""
    rows = rows_of(path)
    for end, decision in decisions.items():
        (name,) = (name for name in rows if name.endswith(f"{end}.nii.gz"))
        rows[name]["decision"] = decision
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows.values())


def contrasts_of(out: Path) -> dict[str, str]:
    return {path.name: role for (_, role), path in read_locations(out).items()}


def test_scan_writes_one_row_per_image_and_no_cell_runs_as_a_formula(
    root: Path, tmp_path: Path
) -> None:
    run_scan(config(root), tmp_path / "m")
    path = tmp_path / "m/private/mapping.csv"
    rows = rows_of(path)
    assert len(rows) == 5
    assert path.stat().st_mode & 0o777 == 0o600
    assert "'=cmd_sub-3_T1w.nii.gz" in rows
    assert rows["sub-1_T1w.nii.gz"]["contrast"] == "T1w"
    assert rows["sub-1_T1w.nii.gz"]["confidence"] == "0.92"
    assert rows["sub-2_scan.nii.gz"]["status"] == "unknown_contrast"
    assert {row["decision"] for row in rows.values()} == {""}


def test_decisions_are_applied_as_votes_of_a_person_and_kept(root: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "m", tmp_path / "m/private/mapping.csv"
    run_scan(config(root), out)
    decide(path, scan="t2 flair", FLAIR="refuse", T2w="swi")
    applying = replace(config(root), mapping=str(path))
    run_scan(applying, out)
    assert contrasts_of(out) == {
        "sub-1_T1w.nii.gz": "T1w",
        "sub-1_T2w.nii.gz": "SWI",
        "sub-2_scan.nii.gz": "FLAIR",
        "=cmd_sub-3_T1w.nii.gz": "T1w",
    }
    codes = {r.location: r.code for r in read_ledger(out / "private/ledger.csv")}
    assert codes == {"sub-2_FLAIR.nii.gz": "refused_by_person"}
    volumes = [v for s in read_manifest(out / "manifest.parquet") for v in s.volumes]
    (swi,) = (volume for volume in volumes if volume.contrast == "SWI")
    assert [vote.source for vote in swi.votes] == ["mapping", "bids"]
    assert "contrast_disagreement" in swi.flags
    kept = rows_of(path)
    assert kept["sub-2_scan.nii.gz"]["decision"] == "FLAIR"
    assert kept["sub-2_scan.nii.gz"]["contrast"] == "FLAIR"
    before = path.read_bytes()
    run_scan(applying, out)
    assert path.read_bytes() == before


def test_a_rescan_without_the_mapping_keeps_the_decisions_and_says_they_do_not_count(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, path = tmp_path / "m", tmp_path / "m/private/mapping.csv"
    run_scan(config(root), out)
    decide(path, T2w="swi")
    (root / "sub-2_FLAIR.nii.gz").unlink()
    run_scan(config(root), out)
    assert contrasts_of(out)["sub-1_T2w.nii.gz"] == "T2w"
    assert rows_of(path)["sub-1_T2w.nii.gz"]["decision"] == "SWI"
    assert "1 decisions in the mapping table are not applied" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("location,decision\nsub-1_T1w.nii.gz,FLAYR\n", "row 2: decision 'FLAYR' .* FLAIR"),
        ("location,decision\nsub-1_T1w.nii.gz,unknown\n", "row 2: decision 'unknown' decides"),
        ("location,decision\nsub-9_T1w.nii.gz,T1w\n", "found 1 that do not, e.g. 'sub-9_T1w"),
        ("location,decision\na,T1w\na,T2w\n", "row 3: 'a' has a decision already"),
        ("location,contrast\na,T1w\n", r"\['decision'\] not among"),
        ("location,decision\na,T1w,x\n", "row 2: 3 cells for 2 columns"),
        ("", "columns location and decision are needed"),
    ],
)
def test_a_wrong_mapping_is_one_clear_error(
    root: Path, tmp_path: Path, text: str, said: str
) -> None:
    table = tmp_path / "mine.csv"
    table.write_text(text)
    with pytest.raises(ManifestError, match=said) as caught:
        run_scan(replace(config(root), mapping=str(table)), tmp_path / "m")
    assert "mine.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m/manifest.parquet").exists()


def test_missing_binary_and_spreadsheet_tables(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no file at .*correct scan\.mapping"):
        run_scan(replace(config(root), mapping=str(tmp_path / "none.csv")), tmp_path / "m")
    table = tmp_path / "t.csv"
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="save it as CSV UTF-8"):
        read_decisions(table)
    table.write_text("location;status;decision\na b;x; T2-weighted \n;;\nc;x;\n", "utf-8-sig")
    assert read_decisions(table) == {"a b": "T2w"}


def test_what_a_spreadsheet_makes_of_the_table_is_read_the_same(root: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "m", tmp_path / "m/private/mapping.csv"
    run_scan(config(root), out)
    decide(path, scan="FLAIR", FLAIR="refuse", **{"cmd_sub-3_T1w": "swi"})
    rows, saved = rows_of(path), tmp_path / "saved by a spreadsheet.csv"
    with saved.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, delimiter=";", quoting=csv.QUOTE_ALL, lineterminator="\r\n")
        writer.writerow(COLUMNS[::-1])
        writer.writerows([row[name] for name in COLUMNS[::-1]] for row in rows.values())
    assert read_decisions(saved) == read_decisions(path)
    assert read_decisions(saved)["=cmd_sub-3_T1w.nii.gz"] == "SWI"
    run_scan(replace(config(root), mapping=str(saved)), out)
    assert contrasts_of(out)["sub-2_scan.nii.gz"] == "FLAIR"
