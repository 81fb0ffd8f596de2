"""The ledger: round trip, cells that spreadsheets must not run, atomic writing, remedies."""

import csv
import re
from pathlib import Path

import pytest

from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.ledger import (
    DEFAULT_REMEDY,
    REMEDIES,
    Refusal,
    read_ledger,
    refuse,
    write_ledger,
)
from anycontrast_datasets.study import ManifestError

ROOT = Path(__file__).parents[1]


def test_ledger_reads_back_what_was_written_ordered_by_location(tmp_path: Path) -> None:
    refusals = [
        refuse("b/x.nii", "not_3d", 'four "dimensions", found', study_id="abc"),
        refuse("a/y.nii", "rgb_voxels", "colours"),
    ]
    write_ledger(refusals, tmp_path / "ledger.csv")
    assert read_ledger(tmp_path / "ledger.csv") == refusals[::-1]
    assert (tmp_path / "ledger.csv").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "'", "'="])
def test_cell_that_starts_a_formula_is_escaped_and_reads_back(tmp_path: Path, start: str) -> None:
    refusal = Refusal(f"{start}cmd|calc.nii", "truncated", f"{start}SUM(A1)", "none")
    write_ledger([refusal], tmp_path / "ledger.csv")
    with (tmp_path / "ledger.csv").open(newline="") as stream:
        cells = list(csv.reader(stream))[1]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    assert read_ledger(tmp_path / "ledger.csv") == [refusal]


def test_control_characters_become_visible(tmp_path: Path) -> None:
    write_ledger([refuse("a\x1b[31m\nb\udcff.nii", "truncated", "r")], tmp_path / "ledger.csv")
    raw = (tmp_path / "ledger.csv").read_bytes()
    assert b"\x1b" not in raw
    assert raw.count(b"\n") == 2
    assert read_ledger(tmp_path / "ledger.csv")[0].location == r"a\x1b[31m\nb\udcff.nii"


def test_every_code_has_a_remedy_and_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/manifest.md").read_text(), re.M))
    assert set(REMEDIES) <= documented
    assert refuse("a", "some_new_code", "r").remedy == DEFAULT_REMEDY


def test_every_code_of_the_volume_reader_has_a_remedy_of_its_own() -> None:
    package = ROOT / "datasets" / "anycontrast_datasets"
    files = [package / "volume.py", *package.glob("nifti_*.py")]
    lines = re.findall(r"\bcode=(.*)", "\n".join(path.read_text() for path in files))
    codes = {code for line in lines for code in re.findall(r'"(\w+)"', line)}
    assert {"not_3d", "gzip_corrupt", "spacing_out_of_range"} <= codes
    assert codes <= set(REMEDIES)


def test_missing_or_foreign_ledger_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="run the scan first"):
        read_ledger(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ManifestError, match="columns must be"):
        read_ledger(tmp_path / "other.csv")


def test_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
