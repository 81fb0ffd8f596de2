"""The whole scan: files written, counts, privacy, determinism, splits, and clear refusals."""

import base64
import hashlib
import hmac
import json
import os
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from anycontrast_datasets.ledger import Refusal, read_ledger
from anycontrast_datasets.manifest import read_locations, read_manifest
from anycontrast_datasets.pseudonym import PseudonymNaming, SplitRule
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.sources import bids
from anycontrast_datasets.sources.claims import SourceOptions
from anycontrast_datasets.sources.phantom_config import PhantomConfig
from anycontrast_datasets.study import ManifestError, Study
from anycontrast_datasets.volume import write_volume


def image(path: Path, seed: int | None = None) -> None:
    """A file of noise; two names, two pictures, unless a seed is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(crc32(path.name.encode()) if seed is None else seed)
    voxels = rng.integers(0, 999, size=(6, 7, 5)).astype(np.int16)
    write_volume(path, voxels, np.diag([2.0, 2.0, 3.0, 1.0]))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two subjects, one with two sessions and a label; one file too many, one of another kind."""
    folder = tmp_path / "JaneDoe-data"
    for name in ("sub-JaneDoe_ses-20240131_T1w", "sub-JaneDoe_ses-20240131_FLAIR"):
        image(folder / f"{name}.nii.gz")
    image(folder / "sub-JaneDoe_ses-20240501_T1w.nii.gz")
    image(folder / "sub-JohnRoe_T1w.nii.gz")
    mask = np.zeros((6, 7, 5), dtype=np.uint8)
    write_volume(folder / "sub-JohnRoe_msk.nii.gz", mask, np.diag([2.0, 2.0, 3.0, 1.0]))
    (folder / "sub-JohnRoe_T2w.nii.gz").write_bytes(b"cut")
    (folder / "slice.dcm").write_bytes(b"x")
    return folder


def config(root: Path) -> ScanConfig:
    return ScanConfig(source="bids", root=str(root), dataset="clinic", check_pictures=False)


def test_scan_accounts_for_every_file_and_writes_what_others_read(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run" / "manifest"
    calls: list[tuple[int, int]] = []
    summary = run_scan(config(root), out, on_progress=lambda *c: calls.append(c))
    assert (summary.inputs, summary.accepted, summary.refused) == (7, 5, 2)
    assert (summary.studies, summary.subjects, summary.labels) == (3, 2, 1)
    assert summary.by_contrast == {"FLAIR": 1, "T1w": 3}
    assert summary.by_contrast_set == {"T1w": 2, "T1w+FLAIR": 1}
    assert sum(summary.by_code.values()) == 2
    assert sum(summary.by_split.values()) == 3
    assert json.loads((out / "summary.json").read_text())["inputs"] == 7
    assert calls[-1] == (7, 7)
    studies = read_manifest(out / "manifest.parquet")
    locations = read_locations(out)
    wanted = {(s.study_id, v.contrast) for s in studies for v in s.volumes}
    wanted |= {(s.study_id, "label") for s in studies if s.label}
    assert set(locations) == wanted
    assert all(path.is_file() and path.is_absolute() for path in locations.values())
    refused = {r.location: r.code for r in read_ledger(out / "private" / "ledger.csv")}
    assert refused["slice.dcm"] == "needs_dicom_source"
    assert "sub-JohnRoe_T2w.nii.gz" in refused


def test_nothing_public_names_a_person_or_a_path_and_the_rest_is_private(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "manifest"
    run_scan(config(root), out)
    public = (out / "manifest.parquet").read_bytes() + (out / "summary.json").read_bytes()
    table = repr(read_manifest(out / "manifest.parquet")).encode()
    for text in (b"JaneDoe", b"JohnRoe", b"20240131", b"20240501", str(tmp_path).encode(), b".nii"):
        assert text not in public
        assert text not in table
    assert (out / "private").stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in (out / "private").iterdir())
    assert len((out / "private" / "pseudonym.key").read_bytes().strip()) == 64


def test_scanning_again_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "manifest"
    run_scan(config(root), out)
    first = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    run_scan(replace(config(root), num_threads=1), out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == first


def test_another_key_gives_other_names_but_the_same_splits(root: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_scan(config(root), tmp_path / name)
    one, two = (read_manifest(tmp_path / n / "manifest.parquet") for n in ("one", "two"))
    assert {s.study_id for s in one}.isdisjoint({s.study_id for s in two})
    assert sorted(s.split for s in one) == sorted(s.split for s in two)


def test_a_given_key_is_used_and_a_wrong_one_is_refused(root: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    key.chmod(0o600)
    with_key = replace(config(root), pseudonym_key_file=str(key))
    run_scan(with_key, tmp_path / "one")
    run_scan(with_key, tmp_path / "two")
    assert (tmp_path / "one/manifest.parquet").read_bytes() == (
        tmp_path / "two/manifest.parquet"
    ).read_bytes()
    assert not (tmp_path / "one/private/pseudonym.key").exists()
    key.write_text("short")
    with pytest.raises(ManifestError, match="at least 16 bytes, found 5"):
        run_scan(with_key, tmp_path / "three")
    key.unlink()
    with pytest.raises(ManifestError, match=r"correct scan\.pseudonym_key_file"):
        run_scan(with_key, tmp_path / "three")


def test_a_dictionary_of_a_million_ids_finds_no_one_without_the_key() -> None:
    key = os.urandom(32)
    naming = PseudonymNaming(key, "ds", SplitRule("ds", "salt", (0.8, 0.1, 0.1)))
    names = {naming(f"{i:06d}", "1").subject_id for i in range(0, 1_000_000, 2000)}
    assert len(names) == 500
    digests = {base64.b32decode(name.upper()) for name in names}  # of 10 bytes each
    # What is hashed for subject "000000" of data set "ds", up to the id.
    start = b"".join(len(part).to_bytes(4, "big") + part for part in (b"subject", b"ds"))
    start += (6).to_bytes(4, "big")
    ids = [b"%06d" % i for i in range(1_000_000)]
    keyed = (hmac.digest(key, start + i, "sha256")[:10] for i in ids[::2000])
    assert digests == set(keyed), "whoever has the key must find them all"
    assert digests.isdisjoint(hashlib.sha256(i).digest()[:10] for i in ids)
    assert digests.isdisjoint(hashlib.sha256(start + i).digest()[:10] for i in ids)


def test_split_is_by_subject_near_its_fractions_and_follows_the_salt() -> None:
    rule = SplitRule("ds", "salt", (0.8, 0.1, 0.1))
    splits = [rule(str(i)) for i in range(3000)]
    assert abs(splits.count("train") / 3000 - 0.8) < 0.03
    assert abs(splits.count("val") / 3000 - 0.1) < 0.03
    other = SplitRule("ds", "other", (0.8, 0.1, 0.1))
    assert [other(str(i)) for i in range(3000)] != splits
    assert {SplitRule("ds", "salt", (1.0, 0.0, 0.0))(str(i)) for i in range(50)} == {"train"}


def test_all_sessions_of_a_subject_share_a_split_and_new_data_move_nobody(
    root: Path, tmp_path: Path
) -> None:
    run_scan(config(root), tmp_path / "m")
    before = {s.study_id: s.split for s in read_manifest(tmp_path / "m/manifest.parquet")}
    for number in range(20):
        image(root / f"sub-new{number}_T1w.nii.gz")
    run_scan(config(root), tmp_path / "m")
    after = read_manifest(tmp_path / "m/manifest.parquet")
    assert {s.study_id: s.split for s in after if s.study_id in before} == before
    by_subject: dict[str, set[str]] = {}
    for study in after:
        by_subject.setdefault(study.subject_id, set()).add(study.split)
    assert all(len(splits) == 1 for splits in by_subject.values())


def test_missing_folder_file_for_folder_and_empty_folder_are_one_clear_line(
    tmp_path: Path,
) -> None:
    for name, said in (
        ("none", "no such folder"),
        ("file", "must be a folder"),
        ("empty", "no image"),
    ):
        path = tmp_path / name
        if name == "file":
            path.write_text("x")
        if name == "empty":
            path.mkdir()
            (path / "README.md").write_text("nothing")
        with pytest.raises(ManifestError, match=said) as caught:
            run_scan(config(path), tmp_path / "out")
        assert str(path) in str(caught.value)
        assert "scan.root" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_nothing_accepted_is_an_error_after_the_ledger_is_written(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    run_scan(config(root), out)
    for path in root.glob("*.nii.gz"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ManifestError, match=r"none of 7 files was accepted.*ledger\.csv"):
        run_scan(config(root), out)
    assert len(read_ledger(out / "private" / "ledger.csv")) == 7
    assert not (out / "manifest.parquet").exists()


def test_a_file_that_a_source_loses_is_an_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(root: Path, options: SourceOptions) -> list[Study | Refusal]:
        return [found for found in scan_bids(root, options) if isinstance(found, Study)]

    scan_bids = bids.scan
    monkeypatch.setattr(bids, "scan", lossy)
    with pytest.raises(ManifestError, match="found 2 that are not"):
        run_scan(config(root), tmp_path / "m")
    assert not (tmp_path / "m" / "manifest.parquet").exists()


def test_key_that_others_can_read_is_warned_about(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    key.chmod(0o644)
    run_scan(replace(config(root), pseudonym_key_file=str(key)), tmp_path / "m")
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"source": "bids"}, r"scan\.root"),
        ({"source": "folder", "root": "x"}, r"scan\.table must name"),
        ({"source": "bids", "root": "x", "table": "t.csv"}, r"scan\.table is read by"),
        ({"contrasts": ["FLAYR"]}, "FLAIR"),
        ({"split_fractions": (0.8, 0.1, 0.2)}, r"scan\.split_fractions must"),
        ({"num_threads": 0}, r"scan\.num_threads must be at least 1"),
    ],
)
def test_wrong_setting_names_the_field(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ScanConfig(**values)  # type: ignore[arg-type]


def test_phantom_is_written_beside_the_manifest_and_keeps_its_ids(tmp_path: Path) -> None:
    phantom = PhantomConfig(num_studies=3, spacing_mm=(6.0, 6.0, 6.0), seed=1)
    summary = run_scan(ScanConfig(phantom=phantom), tmp_path / "run" / "manifest")
    assert (tmp_path / "run" / "source").is_dir()
    assert (summary.studies, summary.refused) == (3, 0)
    studies = read_manifest(tmp_path / "run" / "manifest" / "manifest.parquet")
    assert [s.study_id for s in studies] == [f"phantom-000{i}-1" for i in (1, 2, 3)]
    assert "contrast_disagreement" not in summary.by_flag
    assert all(volume.descriptor.te_s is not None for volume in studies[0].volumes)


def test_the_same_voxels_twice_are_refused_in_a_study_and_flagged_across_people(
    root: Path, tmp_path: Path
) -> None:
    image(root / "sub-JohnRoe_FLAIR.nii.gz", 7)
    image(root / "sub-JohnRoe_PDw.nii.gz", 7)
    image(root / "sub-Other_FLAIR.nii.gz", 7)
    image(root / "sub-Third_T1w.nii.gz", 8)
    out = tmp_path / "m"
    summary = run_scan(replace(config(root), split_fractions=(0.34, 0.33, 0.33)), out)
    assert summary.by_code["duplicate_volume"] == 1
    assert summary.duplicates == 2
    refused = {r.location: r for r in read_ledger(out / "private" / "ledger.csv")}
    assert "sub-JohnRoe_FLAIR" in refused["sub-JohnRoe_PDw.nii.gz"].reason
    studies = read_manifest(out / "manifest.parquet")
    shared = [
        study
        for study in studies
        for volume in study.volumes
        if "duplicate_of_other_subject" in volume.flags
    ]
    assert len({study.subject_id for study in shared}) == 2
    assert len({study.split for study in shared}) == 1


def test_summary_counts_faces_confidence_and_near_duplicates(root: Path, tmp_path: Path) -> None:
    summary = run_scan(config(root), tmp_path / "m")
    assert summary.by_face == {"defaced": 4}
    assert summary.by_confidence == {"high": 4}
    assert (summary.disagreements, summary.duplicates, summary.near_duplicates) == (0, 0, 0)
    written = json.loads((tmp_path / "m" / "summary.json").read_text())
    assert written["by_confidence"] == {"high": 4}


def test_a_sidecar_higher_up_and_a_description_settle_what_a_name_does_not_say(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    image(folder / "sub-1" / "sub-1_scan.nii.gz")
    image(folder / "sub-2" / "sub-2_T1w.nii.gz")
    image(folder / "sub-3" / "sub-3_series.nii.gz")
    physics = {"EchoTime": 0.095, "RepetitionTime": 9.0, "InversionTime": 2.5}
    (folder / "scan.json").write_text(json.dumps(physics))
    (folder / "T1w.json").write_text(json.dumps({"SeriesDescription": "JaneDoe t1 post gd"}))
    (folder / "series.json").write_text(json.dumps({"ProtocolName": "gre field map phase"}))
    summary = run_scan(config(folder), tmp_path / "m")
    assert summary.by_contrast == {"FLAIR": 1, "T1wCE": 1}
    assert summary.by_code == {"phase_image": 1}
    volumes = [v for s in read_manifest(tmp_path / "m/manifest.parquet") for v in s.volumes]
    sources = {v.contrast: [vote.source for vote in v.votes] for v in volumes}
    assert sources == {"FLAIR": ["physics"], "T1wCE": ["bids", "description"]}
    assert "JaneDoe" not in repr(volumes)
