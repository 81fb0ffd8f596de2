"""Headers of DICOM files: what is taken from real and synthetic ones, what hostile ones get."""

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.ledger import Refusal
from anycontrast_datasets.sources import dicom_header
from anycontrast_datasets.sources.dicom_header import Instance, read_instance
from anycontrast_datasets.sources.dicom_tags import KEPT_TAGS

REAL = Path(__file__).parents[2] / "shared" / "real_mri"
ROOT = Path(__file__).parents[1]
MAX_BYTES = 2**24


def read(path: Path) -> Instance:
    found = read_instance(path.parent, path.name, max_bytes=MAX_BYTES)
    assert isinstance(found, Instance), found
    return found


def code(path: Path) -> str:
    found = read_instance(path.parent, path.name, max_bytes=MAX_BYTES)
    assert isinstance(found, Refusal), found
    return found.code


@pytest.fixture
def whole(dicom_head: Callable[..., Any], tmp_path: Path) -> Path:
    """One good file."""
    path = tmp_path / "good"
    dicom_head(3).save_as(path, enforce_file_format=True)
    return path


def test_a_classic_header_gives_physics_in_bids_units(whole: Path) -> None:
    found = read(whole)
    assert found.sidecar == {
        "EchoTime": 0.0025,
        "RepetitionTime": 1.9,
        "InversionTime": 0.9,
        "FlipAngle": 9.0,
        "MagneticFieldStrength": 3.0,
        "ImageType": ["ORIGINAL", "PRIMARY", "M"],
        "ScanningSequence": "GR\\IR",
        "MRAcquisitionType": "3D",
    }
    assert found.frames[0].position_mm == (-93.0, -93.0, -51.0)
    assert (found.subject, found.study_uid, found.number) == ("0042", "1.2.1", 4)
    assert found.num_pixel_bytes == 32 * 32 * 2


def test_the_patient_name_stands_in_for_a_missing_id(
    dicom_head: Callable[..., Any], tmp_path: Path
) -> None:
    dicom_head(0, PatientID="").save_as(tmp_path / "a", enforce_file_format=True)
    assert read(tmp_path / "a").subject == "Doe^Jane"


@pytest.mark.parametrize(
    ("agent", "said"), [("GADAVIST 7.5 ml Dr. Doe", "yes"), ("None", "no"), ("", None)]
)
def test_a_contrast_agent_is_kept_as_yes_or_no(
    dicom_head: Callable[..., Any], tmp_path: Path, agent: str, said: str | None
) -> None:
    dicom_head(0, ContrastBolusAgent=agent).save_as(tmp_path / "a", enforce_file_format=True)
    assert read(tmp_path / "a").sidecar.get("ContrastBolusAgent") == said


@pytest.mark.parametrize(
    ("group", "creator", "element", "vr", "value", "b_value"),
    [
        (0x0019, "SIEMENS MR HEADER", 0x0C, "IS", "1000", 1000.0),
        (0x0019, "SIEMENS MR HEADER", 0x0C, "IS", "0", 0.0),
        (0x0043, "GEMS_PARM_01", 0x39, "IS", ["1000000800", "8", "0", "0"], 800.0),
        (0x0043, "GEMS_PARM_01", 0x39, "IS", ["0", "8", "0", "0"], None),
        (0x2001, "Philips Imaging DD 001", 0x03, "FL", 700.0, 700.0),
        (0x2001, "SOMEBODY ELSE", 0x03, "FL", 700.0, None),
    ],
)
def test_b_values_of_three_vendors(
    dicom_head: Callable[..., Any], tmp_path: Path, group: int, creator: str, element: int,
    vr: str, value: object, b_value: float | None,
) -> None:  # fmt: skip
    slice_ = dicom_head(0)
    slice_.private_block(group, creator, create=True).add_new(element, vr, value)
    slice_.save_as(tmp_path / "a", enforce_file_format=True)
    assert read(tmp_path / "a").frames[0].b_value == b_value


def test_a_file_without_preamble_or_mark_is_read_when_it_looks_like_dicom(whole: Path) -> None:
    bare = whole.with_name("bare")
    bare.write_bytes(whole.read_bytes()[132:])
    assert read(bare).pixels_sha256 == read(whole).pixels_sha256


def test_pixels_are_told_apart_from_header(dicom_head: Callable[..., Any], tmp_path: Path) -> None:
    for name, tags in (
        ("a", {}),
        ("b", {"PatientWeight": "70"}),
        ("c", {"PixelData": b"1" * 2048}),
    ):
        dicom_head(0, **tags).save_as(tmp_path / name, enforce_file_format=True)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert (a.pixels_sha256 == b.pixels_sha256, a.header_sha256 == b.header_sha256) == (True, False)
    assert a.pixels_sha256 != c.pixels_sha256


def _deflated(data: bytes) -> bytes:
    data = data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0\0")
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return data + packer.compress(b"\0" * 2**24) + packer.flush()


def _nested(depth: int) -> bytes:
    """Header bytes of sequences within sequences, each of undefined length."""
    opening = struct.pack("<HH2sHI", 0x0018, 0x9117, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    outer = struct.pack("<HH2sHI", 0x0018, 0x0012, b"SQ", 0, 0xFFFFFFFF)
    return outer + item + (opening + item) * depth


def _insert(data: bytes, element: bytes) -> bytes:
    """Put raw bytes in front of ScanningSequence."""
    place = data.index(struct.pack("<HH", 0x0018, 0x0020))
    return data[:place] + element + data[place:]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda data: b"", "empty_file"),
        (lambda data: b"hello " * 100, "not_dicom"),
        (lambda data: data[:132] + b"\0" * 400, "dicom_unreadable"),
        (lambda data: data[:200], "dicom_unreadable"),
        (lambda data: data[:-100], "truncated"),
        (lambda data: data[: data.index(b"\xe0\x7f\x10\x00")], "truncated"),
        (_deflated, "dicom_unreadable"),
        (lambda data: _insert(data, _nested(5000)), "dicom_unreadable"),
        (
            lambda data: _insert(data, struct.pack("<HH2sHI", 0x18, 0x15, b"UT", 0, 2**31)),
            "dicom_unreadable",
        ),
        (
            lambda data: data.replace(
                struct.pack("<HH2sH", 0x28, 0x10, b"US", 2) + b"\x20\0",
                struct.pack("<HH2sH", 0x28, 0x10, b"US", 2) + b"\xff\xff",
            ),
            "truncated",
        ),
    ],
)
def test_a_hostile_file_is_refused_by_name(
    whole: Path, spoil: Callable[[bytes], bytes], expected: str
) -> None:
    hostile = whole.with_name("hostile")
    hostile.write_bytes(spoil(whole.read_bytes()))
    assert code(hostile) == expected


def test_too_many_items_and_too_long_headers_are_refused(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = whole.with_name("many")
    many.write_bytes(_insert(whole.read_bytes(), _nested(90)))
    monkeypatch.setattr(dicom_header, "MAX_ITEMS", 80)
    assert code(many) == "dicom_unreadable"
    long = whole.with_name("long")
    text = struct.pack("<HH2sHI", 0x18, 0x15, b"UT", 0, 2**16) + b"x" * 2**16
    long.write_bytes(_insert(whole.read_bytes(), text))
    assert read(long).rows == 32
    monkeypatch.setattr(dicom_header, "MAX_HEADER_BYTES", 2**15)
    assert code(long) == "dicom_unreadable"


def test_a_directory_file_is_named_as_one(whole: Path) -> None:
    directory = whole.with_name("DICOMDIR")
    mark = b"1.2.840.10008.5.1.4.1.1.4\0"
    assert mark in whole.read_bytes()
    directory.write_bytes(whole.read_bytes().replace(mark, b"1.2.840.10008.1.3.10\0\0\0\0\0\0"))
    assert code(directory) == "dicomdir"


def test_any_flipped_byte_is_read_or_refused_never_raised(whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    header = data.index(b"\xe0\x7f\x10\x00")
    rng = np.random.default_rng(3)
    for _ in range(300):
        changed = bytearray(data)
        for place in rng.integers(0, header + 12, size=rng.integers(1, 6)):
            changed[place] = rng.integers(0, 256)
        path = whole.with_name("changed")
        path.write_bytes(changed)
        found = read_instance(path.parent, path.name, max_bytes=MAX_BYTES)
        assert isinstance(found, Instance | Refusal)


def test_the_documentation_lists_the_tags_that_are_read() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/dicom.md").read_text(), re.M)
    assert dict(rows) == dict(KEPT_TAGS)


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real MRI files is not here")
def test_real_enhanced_headers_give_the_physics_that_dcm2niix_gives() -> None:
    t1w = read(REAL / "xa30/dicom/5_anat-T1w_acq-tfl.dcm")
    assert t1w.sidecar == {
        "EchoTime": 0.00241,
        "RepetitionTime": 1.8,
        "InversionTime": 0.9,
        "FlipAngle": 9.0,
        "EchoTrainLength": 1.0,
        "MagneticFieldStrength": 3.0,
        "ImageType": ["ORIGINAL", "PRIMARY", "M", "NONE"],
        "ScanningSequence": "GR\\IR",
        "SequenceName": "tfl3d",
        "MRAcquisitionType": "3D",
    }
    assert len(t1w.frames) == t1w.num_frames == 96
    adc = read(REAL / "xa30/dicom/11_DWI_ADC.dcm")
    assert adc.image_type == ("DERIVED", "PRIMARY", "DIFFUSION", "ADC")
    fruit = read(REAL / "deident/dicom/00092.dcm")
    assert fruit.sidecar["DeidentificationMethod"] == "reface"
    assert fruit.sidecar["DeidentificationMethodCodeSequence"] == "113102"
    assert fruit.num_in_acquisition == 196
