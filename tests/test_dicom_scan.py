"""Folders of DICOM scanned as a user does it: every file accounted for, volumes reused."""

import errno
import gzip
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.ledger import read_ledger
from anycontrast_datasets.manifest import read_locations, read_manifest
from anycontrast_datasets.scan import ScanConfig, ScanSummary, run_scan
from anycontrast_datasets.sources import dicom_convert
from anycontrast_datasets.sources.dicom_listing import list_files
from anycontrast_datasets.study import ManifestError
from anycontrast_datasets.volume import read_volume

REAL = Path(__file__).parents[2] / "shared" / "real_mri"
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(0o600)
    return path


@pytest.fixture
def scan(tmp_path: Path, key: Path) -> Callable[..., ScanSummary]:
    """`scan(**changes)` of `<tmp>/in` into `<tmp>/out`."""

    def run(**changes: Any) -> ScanSummary:
        values = {"root": str(tmp_path / "in"), "dataset": "d", "check_pictures": False}
        config = {**values, "faces": "allow", "pseudonym_key_file": str(key), **changes}
        return run_scan(ScanConfig(source="dicom", **config), tmp_path / "out")

    return run


def refused(tmp_path: Path) -> dict[str, str]:
    return {r.location: r.code for r in read_ledger(tmp_path / "out/private/ledger.csv")}


def enhanced(slices: list[Any]) -> Any:
    """One enhanced multi-frame object with the slices of a classic series."""
    from pydicom.dataset import Dataset
    from pydicom.uid import EnhancedMRImageStorage

    def group(**tags: object) -> list[Dataset]:
        item = Dataset()
        for keyword, value in tags.items():
            setattr(item, keyword, value)
        return [item]

    first = slices[0]
    first.SOPClassUID = first.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    first.NumberOfFrames = len(slices)
    first.PixelData = (np.frombuffer(b"".join(s.PixelData for s in slices), "<u2") * 2).tobytes()
    shared = group(
        MRTimingAndRelatedParametersSequence=group(RepetitionTime="2000", FlipAngle="90"),
        PixelMeasuresSequence=group(PixelSpacing=["6", "6"], SliceThickness="6"),
        PlaneOrientationSequence=group(ImageOrientationPatient=first.ImageOrientationPatient),
    )
    first.SharedFunctionalGroupsSequence = shared
    first.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence=group(ImagePositionPatient=s.ImagePositionPatient),
            MREchoSequence=group(EffectiveEchoTime=100.0),
            FrameContentSequence=group(
                StackID="1", InStackPositionNumber=n + 1, DimensionIndexValues=[1, n + 1]
            ),
        )[0]
        for n, s in enumerate(slices)
    ]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(first, keyword)
    for keyword in ("EchoTime", "RepetitionTime", "InversionTime", "FlipAngle", "ScanningSequence"):
        delattr(first, keyword)
    first.EchoPulseSequence, first.SeriesDescription = "SPIN", "t2_tse"
    return first


def test_classic_and_enhanced_series_of_one_session_become_one_study(
    write_dicom: Callable[..., Any], dicom_head: Callable[..., Any],
    scan: Callable[..., ScanSummary], tmp_path: Path,
) -> None:  # fmt: skip
    write_dicom(tmp_path / "in" / "deep" / "er")
    many = enhanced([dicom_head(index, series=2) for index in range(24)])
    many.save_as(tmp_path / "in" / "one.dcm", enforce_file_format=True)
    summary = scan()
    assert (summary.inputs, summary.accepted, summary.refused) == (25, 25, 0)
    (study,) = read_manifest(tmp_path / "out/manifest.parquet")
    t1w, t2w = study.volumes
    assert (t1w.contrast, t2w.contrast) == ("T1w", "T2w")
    assert t1w.shape == t2w.shape == (32, 32, 24)
    assert np.allclose(np.array(t1w.affine)[:3, 3], (-93, -93, -69))
    paths = read_locations(tmp_path / "out")
    one, two = (read_volume(paths[study.study_id, name]) for name in ("T1w", "T2w"))
    assert np.array_equal(one.array * 2, two.array)
    # Slice 12 as written: rows run to the left of the patient's back, the volume is RAS+.
    pixels = np.frombuffer(dicom_head(12).PixelData, "<u2").reshape(32, 32)
    assert np.array_equal(one.array[::-1, ::-1, 12].T, pixels)
    assert paths[study.study_id, "T1w"].is_relative_to(tmp_path / "out/private/converted")


def test_every_file_is_in_a_study_or_in_the_ledger(
    write_dicom: Callable[..., Any], dicom_head: Callable[..., Any],
    scan: Callable[..., ScanSummary], tmp_path: Path,
) -> None:  # fmt: skip
    root = tmp_path / "in"
    good = write_dicom(root / "good")
    write_dicom(root / "piece", range(5), study=2, PatientID="p2")
    write_dicom(root / "phase", series=3, ImageType=["ORIGINAL", "PRIMARY", "P"])
    write_dicom(root / "ct", range(3), series=4, Modality="CT")
    write_dicom(root / "mip", range(3), series=5, ImageType=["DERIVED", "SECONDARY", "MIP"])
    shutil.copy(good[0], root / "again")
    dicom_head(0, series=6, PhotometricInterpretation="RGB").save_as(
        root / "rgb", enforce_file_format=True
    )
    (root / "notes.txt").write_text("not counted")
    (root / "README").write_text("counted")
    (root / "half").write_bytes(good[3].read_bytes()[:-9])
    (root / "outside").symlink_to(tmp_path)
    (root / "nowhere").symlink_to(root / "gone")
    (root / "inside").symlink_to(root / "good")
    summary = scan()
    assert summary.accepted == 24
    assert summary.by_code == {
        "duplicate_instance": 1,
        "incomplete_series": 5,
        "link_outside_root": 1,
        "missing_file": 1,
        "not_dicom": 1,
        "not_mri": 3,
        "not_trainable": 4,
        "phase_image": 24,
        "truncated": 1,
    }
    assert summary.inputs == summary.accepted + summary.refused == 65
    codes = refused(tmp_path)
    # The first in order is kept, and the other named.
    assert codes["good/IM0000"] == "duplicate_instance"
    assert codes["outside"] == "link_outside_root"


def test_a_volume_that_is_refused_later_refuses_each_of_its_files(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path
) -> None:
    write_dicom(tmp_path / "in" / "a")
    write_dicom(tmp_path / "in" / "b", study=2, PixelData=bytes(2048))
    summary = scan()
    assert (summary.accepted, summary.by_code) == (24, {"constant_volume": 24})
    ledger = read_ledger(tmp_path / "out/private/ledger.csv")
    assert [r.location for r in ledger] == [f"b/IM{n:04d}" for n in range(24)]
    assert not any(str(tmp_path) in r.reason or "work-" in r.reason for r in ledger)


def test_two_series_of_one_contrast_are_named_by_their_files(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path
) -> None:
    write_dicom(tmp_path / "in" / "a")
    write_dicom(tmp_path / "in" / "c", study=3)
    for index in range(24):
        pixels = bytes([index, 1]) * 1024
        write_dicom(tmp_path / "in" / "b", [index], series=2, PixelData=pixels)
    scan()
    reasons = {r.reason for r in read_ledger(tmp_path / "out/private/ledger.csv")}
    assert len(reasons) == 1
    (reason,) = reasons
    assert "the series of a/IM0000" in reason and "the series of b/IM0000" in reason
    assert "converted" not in reason


def test_a_rescan_reuses_volumes_and_drops_those_of_series_that_went(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_dicom(tmp_path / "in" / "a")
    write_dicom(tmp_path / "in" / "b", study=2)
    scan()
    converted = tmp_path / "out/private/converted"
    before = {path: path.read_bytes() for path in converted.rglob("*.nii.gz")}
    manifest = (tmp_path / "out/manifest.parquet").read_bytes()
    assert len(before) == 2
    spoiled = min(before)
    spoiled.write_bytes(b"damaged")
    runs: list[object] = []
    call = dicom_convert._call

    def counted(*args: Any) -> tuple[str, int]:
        runs.append(args)
        return call(*args)

    monkeypatch.setattr(dicom_convert, "_call", counted)
    scan()
    assert len(runs) == 1
    assert {path: path.read_bytes() for path in converted.rglob("*.nii.gz")} == before
    assert (tmp_path / "out/manifest.parquet").read_bytes() == manifest
    shutil.rmtree(tmp_path / "in" / "b")
    scan()
    assert len(runs) == 1
    assert len(list(converted.rglob("*.nii.gz"))) == 1
    assert len(list(converted.iterdir())) == 1


def test_a_withdrawn_subject_leaves_no_volume_behind(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path
) -> None:
    write_dicom(tmp_path / "in" / "a")
    write_dicom(tmp_path / "in" / "b", study=2, PatientID="other")
    scan()
    gone = min(read_manifest(tmp_path / "out/manifest.parquet"), key=lambda s: s.study_id)
    (tmp_path / "out/private/withdrawn.csv").write_text(f"subject_id\n{gone.subject_id}\n")
    assert scan().by_code == {"withdrawn": 24}
    folders = [path.name for path in (tmp_path / "out/private/converted").iterdir()]
    assert len(folders) == 1 and gone.study_id not in folders


def test_a_person_may_overrule_a_description(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path
) -> None:
    write_dicom(tmp_path / "in" / "a")
    write_dicom(tmp_path / "in" / "b", study=2, SeriesDescription="T2 map, but not really")
    assert scan().by_code == {"not_trainable": 24}
    table = tmp_path / "out/private/mapping.csv"
    rows = table.read_text().splitlines()
    decided = [f"{row}T2w" if row.startswith("b/") else row for row in rows]
    (tmp_path / "mapping.csv").write_text("\n".join(decided))
    summary = scan(mapping=str(tmp_path / "mapping.csv"))
    assert (summary.accepted, summary.by_contrast) == (48, {"T1w": 1, "T2w": 1})


def test_private_files_can_be_read_by_the_owner_only(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path
) -> None:
    write_dicom(tmp_path / "in")
    scan()
    private = tmp_path / "out/private"
    for path in (private, *private.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_series_that_cannot_be_converted_stops_nobody_else(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path
) -> None:
    from pydicom.encaps import encapsulate

    write_dicom(tmp_path / "in" / "good")
    bad = tmp_path / "in" / "bad"
    bad.mkdir()
    from pydicom import dcmread
    from pydicom.uid import JPEG2000Lossless

    for index, path in enumerate(write_dicom(bad, study=2)):
        slice_ = dcmread(path)
        slice_.file_meta.TransferSyntaxUID = JPEG2000Lossless
        slice_.PixelData = encapsulate([b"no picture at all"])
        slice_["PixelData"].is_undefined_length = True
        slice_.save_as(bad / f"IM{index:04d}", enforce_file_format=True)
    summary = scan()
    assert (summary.accepted, summary.by_code) == (24, {"conversion_failed": 24})


def test_a_converter_that_hangs_is_stopped(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o700)
    monkeypatch.setattr(dicom_convert, "_program", lambda: hanging)
    monkeypatch.setattr(dicom_convert, "_version", lambda program: "v0")
    monkeypatch.setattr(dicom_convert, "TIMEOUT_S", 0.2)
    write_dicom(tmp_path / "in")
    with pytest.raises(ManifestError, match="none of 24 files was accepted"):
        scan()
    assert set(refused(tmp_path).values()) == {"conversion_failed"}
    assert list((tmp_path / "out/private/converted").rglob("*.nii.gz")) == []


def test_uids_with_path_characters_become_no_path(
    write_dicom: Callable[..., Any], dicom_head: Callable[..., Any],
    scan: Callable[..., ScanSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pydicom import config

    monkeypatch.setattr(config.settings, "writing_validation_mode", config.IGNORE)
    (tmp_path / "in").mkdir()
    for index in range(24):
        slice_ = dicom_head(index)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
            slice_[keyword]._value = "../../../../escape"
        slice_.PatientID = "../../evil"
        slice_.save_as(tmp_path / "in" / f"{index}", enforce_file_format=True)
    scan()
    made = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")]
    assert not any("evil" in name or "escape" in name for name in made)
    assert len([name for name in made if name.endswith(".nii.gz")]) == 1


def test_a_folder_without_files_keeps_earlier_results(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path
) -> None:
    write_dicom(tmp_path / "in")
    scan()
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "in").mkdir()
    with pytest.raises(ManifestError, match="no file"):
        scan()
    assert (tmp_path / "out/manifest.parquet").is_file()
    assert len(list((tmp_path / "out/private/converted").rglob("*.nii.gz"))) == 1


def test_a_full_disk_is_one_clear_line_and_the_next_scan_goes_on(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_dicom(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(dicom_convert, "write_volume", full)
        with pytest.raises(ManifestError, match="No space left on device"):
            scan()
    assert scan().accepted == 24


@pytest.mark.parametrize("package", ["pydicom", "dcm2niix"])
def test_a_missing_package_is_named(
    write_dicom: Callable[..., Any], scan: Callable[..., ScanSummary], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, package: str,
) -> None:  # fmt: skip
    write_dicom(tmp_path / "in")
    dicom_convert._program.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ManifestError, match=f"{package}, which is not installed"):
        scan()


def test_hidden_files_and_companions_are_no_inputs(
    write_dicom: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_bytes(b"x")
    (tmp_path / "a.json").write_text("{}")
    (marked,) = write_dicom(tmp_path, [0])
    marked.rename(tmp_path / "picture.png")
    assert list_files(tmp_path) == (["picture.png"], [])


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real MRI files is not here")
def test_real_series_end_where_their_description_says(
    scan: Callable[..., ScanSummary], tmp_path: Path
) -> None:
    for name in ("xa30", "deident", "studyforrest"):
        shutil.copytree(REAL / name / "dicom", tmp_path / "in" / name)
    summary = scan(check_pictures=True, faces="refuse")
    assert summary.by_code == {"face_present": 1, "incomplete_series": 24}
    assert refused(tmp_path)["xa30/5_anat-T1w_acq-tfl.dcm"] == "face_present"
    summary = scan(check_pictures=True)
    assert (summary.inputs, summary.accepted) == (26, 2)
    assert summary.by_code == {"incomplete_series": 24}
    (study,) = read_manifest(tmp_path / "out/manifest.parquet")
    assert study.contrasts == ("T1w", "ADC")
    assert [volume.shape for volume in study.volumes] == [(96, 128, 128), (72, 72, 39)]
    assert not any(word in repr(study) for word in ("Jane", "hucheng", "XAtest", "Indiana"))
    planted = (b"Jane", b"1966", b"hucheng", b"12343", b"XAtest", b"19910101", b"Indiana", b"67093")
    for path in (tmp_path / "out").rglob("*"):
        data = b"" if path.is_dir() else path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        # Hexadecimal digests may hold any run of digits.
        words = planted if path.suffix == ".gz" else [w for w in planted if not w.isdigit()]
        assert not [word for word in words if word in data + path.name.encode()], path
