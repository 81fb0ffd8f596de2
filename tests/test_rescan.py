"""A rescan reads only what changed, and comes to what a fresh scan comes to, byte for byte."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anycontrast_datasets.ledger import Refusal, read_ledger
from anycontrast_datasets.manifest import read_manifest
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.sources import grouping
from anycontrast_datasets.sources.claims import FileClaim
from anycontrast_datasets.sources.inspection import Inspected, inspect
from anycontrast_datasets.study import ManifestError
from anycontrast_datasets.volume import write_volume

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).normal(300, 90, size=(6, 7, 5)).astype(np.float32)
    write_volume(path, voxels, AFFINE)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for subject in range(4):
        image(folder / f"sub-{subject}_T1w.nii.gz", subject)
    image(folder / "sub-1_scan.nii.gz", 9)
    write_volume(folder / "sub-0_msk.nii.gz", np.ones((6, 7, 5), dtype=np.uint8), AFFINE)
    (folder / "sub-2_FLAIR.nii.gz").write_bytes(b"cut")
    (folder / "sub-3_T1w.json").write_text(json.dumps({"EchoTime": 0.00241, "FlipAngle": 9}))
    return folder


@pytest.fixture
def config(root: Path, tmp_path: Path) -> ScanConfig:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o600)
    return ScanConfig(
        source="bids",
        root=str(root),
        dataset="d",
        check_pictures=False,
        pseudonym_key_file=str(key),
    )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that scans open, in order."""
    opened: list[str] = []

    def watched(root: Path, claim: FileClaim, *rest: object) -> Inspected | Refusal:
        opened.append(claim.location)
        return inspect(root, claim, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(grouping, "inspect", watched)
    return opened


def files_of(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def fresh(config: ScanConfig, out: Path) -> dict[str, bytes]:
    run_scan(replace(config, rescan="all"), out)
    return files_of(out)


def test_an_unchanged_source_is_not_read_again(
    config: ScanConfig, tmp_path: Path, read: list[str]
) -> None:
    run_scan(config, tmp_path / "m")
    assert len(read) == 7
    before = files_of(tmp_path / "m")
    run_scan(replace(config, num_threads=1), tmp_path / "m")
    assert len(read) == 7
    assert files_of(tmp_path / "m") == before == fresh(config, tmp_path / "fresh")
    run_scan(replace(config, rescan="all"), tmp_path / "m")
    assert len(read) == 21


def test_only_new_changed_and_newly_described_files_are_read(
    config: ScanConfig, root: Path, tmp_path: Path, read: list[str]
) -> None:
    run_scan(config, tmp_path / "m")
    read.clear()
    image(root / "sub-9_T1w.nii.gz", 20)
    image(root / "sub-0_T1w.nii.gz", 21)
    (root / "sub-3_T1w.json").write_text(json.dumps({"EchoTime": 0.003, "InversionTime": 0.9}))
    (root / "sub-1_T1w.nii.gz").unlink()
    run_scan(config, tmp_path / "m")
    assert sorted(read) == ["sub-0_T1w.nii.gz", "sub-3_T1w.nii.gz", "sub-9_T1w.nii.gz"]
    assert files_of(tmp_path / "m") == fresh(config, tmp_path / "fresh")


@pytest.mark.parametrize(
    "change", [{"faces": "allow"}, {"max_bytes": 10**9}, {"dataset": "e"}, {"check_pictures": True}]
)
def test_other_options_read_everything(
    config: ScanConfig, tmp_path: Path, read: list[str], change: dict[str, object]
) -> None:
    run_scan(config, tmp_path / "m")
    read.clear()
    try:
        run_scan(replace(config, **change), tmp_path / "m")  # type: ignore[arg-type]
    except ManifestError:
        assert change == {"check_pictures": True}
    assert len(read) == 7


def test_a_damaged_cache_is_read_around(
    config: ScanConfig, tmp_path: Path, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run_scan(config, tmp_path / "m")
    before = files_of(tmp_path / "m")
    path = tmp_path / "m/private/inspected.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:60], *lines[2:]]) + "\n")
    read.clear()
    run_scan(config, tmp_path / "m")
    assert len(read) == 1
    assert "is damaged" in caplog.text
    path.write_bytes(b"\xff\xfe of another kind")
    run_scan(config, tmp_path / "m")
    assert len(read) == 8
    assert files_of(tmp_path / "m") == before
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_scan_cut_off_goes_on_where_it_was(
    config: ScanConfig, tmp_path: Path, read: list[str]
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_scan(replace(config, num_threads=1), tmp_path / "m", on_progress=stop)
    first = set(read)
    assert len(first) >= 5
    read.clear()
    run_scan(config, tmp_path / "m")
    assert not first & set(read)
    assert files_of(tmp_path / "m") == fresh(config, tmp_path / "fresh")


def test_a_file_touched_without_a_change_is_read_and_comes_to_the_same(
    config: ScanConfig, root: Path, tmp_path: Path, read: list[str]
) -> None:
    run_scan(config, tmp_path / "m")
    before = (tmp_path / "m/manifest.parquet").read_bytes()
    read.clear()
    os.utime(root / "sub-0_T1w.nii.gz", ns=(1, 1))
    run_scan(config, tmp_path / "m")
    assert read == ["sub-0_T1w.nii.gz"]
    assert (tmp_path / "m/manifest.parquet").read_bytes() == before


def test_files_of_a_withdrawn_subject_go_to_the_ledger_unread(
    config: ScanConfig, tmp_path: Path, read: list[str]
) -> None:
    out = tmp_path / "m"
    run_scan(config, out)
    gone = next(s for s in read_manifest(out / "manifest.parquet") if s.label is not None)
    (out / "private/withdrawn.csv").write_text(f"subject_id\n{gone.subject_id}\n")
    read.clear()
    summary = run_scan(config, out)
    assert read == []
    assert summary.by_code["withdrawn"] == 2
    withdrawn = [r for r in read_ledger(out / "private/ledger.csv") if r.code == "withdrawn"]
    assert {r.location for r in withdrawn} == {"sub-0_T1w.nii.gz", "sub-0_msk.nii.gz"}
    assert gone.study_id not in {s.study_id for s in read_manifest(out / "manifest.parquet")}
    (out / "private/withdrawn.csv").write_text("subject\nx\n")
    with pytest.raises(ManifestError, match="a column subject_id is needed"):
        run_scan(config, out)
