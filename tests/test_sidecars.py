"""Sidecars: inheritance from the root down, an allow-list of keys, units."""

import json
from pathlib import Path

import pytest

from anycontrast_datasets.sidecars import KEYS, SidecarReader, in_seconds


def put(path: Path, **content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_a_deeper_file_overrides_what_lies_higher_up(tmp_path: Path) -> None:
    put(tmp_path / "T1w.json", EchoTime=0.003, FlipAngle=9)
    put(tmp_path / "ses-1_T1w.json", FlipAngle=10)
    put(tmp_path / "sub-1/sub-1_T1w.json", FlipAngle=12, RepetitionTime=2.0)
    put(tmp_path / "sub-1/ses-1/anat/sub-1_ses-1_T1w.json", RepetitionTime=2.3)
    read = SidecarReader(tmp_path).read
    found = read("sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz")
    assert found.values == {"EchoTime": 0.003, "FlipAngle": 12, "RepetitionTime": 2.3}
    assert [name for name, _, _ in found.stamps] == [
        "T1w.json",
        "ses-1_T1w.json",
        "sub-1/sub-1_T1w.json",
        "sub-1/ses-1/anat/sub-1_ses-1_T1w.json",
    ]
    assert read("sub-2/anat/sub-2_T1w.nii.gz").values == {"EchoTime": 0.003, "FlipAngle": 9}


def test_other_suffixes_and_entities_do_not_apply(tmp_path: Path) -> None:
    put(tmp_path / "T2w.json", EchoTime=0.09)
    put(tmp_path / "acq-fast_T1w.json", EchoTime=0.001)
    put(tmp_path / "task.json", EchoTime=0.5)
    assert SidecarReader(tmp_path).read("sub-1/sub-1_T1w.nii.gz").values == {}


def test_a_name_outside_bids_takes_only_the_file_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "t1.json", EchoTime=0.003)
    put(tmp_path / "case/flair.json", EchoTime=0.09)
    read = SidecarReader(tmp_path).read
    assert read("case/t1.nii.gz").values == {}
    assert read("case/flair.nii").values == {"EchoTime": 0.09}


def test_only_listed_keys_are_read_and_texts_are_not_shown(tmp_path: Path) -> None:
    secret = {"PatientName": "Jane", "AcquisitionTime": "12:00", "Deep": {"EchoTime": 1}}
    put(tmp_path / "x.json", EchoTime=0.1, InstitutionName="Jane Clinic", **secret)
    found = SidecarReader(tmp_path).read("x.nii")
    assert set(found.values) <= KEYS
    assert found.site == ("Jane Clinic", "")
    assert "Jane" not in repr(found)


@pytest.mark.parametrize("content", [b"{broken", b"[1, 2]", b"[" * 99999, b"\xff\xfe"])
def test_what_is_no_json_object_is_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    found = SidecarReader(tmp_path).read("x.nii")
    assert (found.values, found.is_unreadable) == ({}, True)


def test_no_sidecar_is_no_fault(tmp_path: Path) -> None:
    found = SidecarReader(tmp_path).read("gone/x.nii")
    assert (dict(found.values), found.is_unreadable, found.stamps) == ({}, False, ())


def test_each_file_is_read_once(tmp_path: Path) -> None:
    put(tmp_path / "T1w.json", EchoTime=0.003)
    reader = SidecarReader(tmp_path)
    reader.read("sub-1_T1w.nii.gz")
    (tmp_path / "T1w.json").unlink()
    assert reader.read("sub-2_T1w.nii.gz").values == {"EchoTime": 0.003}


@pytest.mark.parametrize(
    ("values", "expected", "is_ms"),
    [
        ({"EchoTime": 2.3, "RepetitionTime": 8}, {"EchoTime": 0.0023, "RepetitionTime": 0.008}, 1),
        ({"EchoTime": 0.09, "RepetitionTime": 9.0}, {"EchoTime": 0.09, "RepetitionTime": 9.0}, 0),
        ({"InversionTime": 2500}, {"InversionTime": 2.5}, 1),
        ({"EchoTime": True, "FlipAngle": 90}, {"EchoTime": True, "FlipAngle": 90}, 0),
        ({"EchoTime": 1e9}, {"EchoTime": 1e9}, 0),
    ],
)
def test_times_in_milliseconds_are_converted_together(
    values: dict[str, object], expected: dict[str, object], is_ms: int
) -> None:
    assert in_seconds(values) == (expected, bool(is_ms))
