"""Names planted into DICOM headers: none comes out of an extraction or of a whole run."""

import gzip
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from anycontrast_datasets.contrast_votes import vote_description, vote_physics
from anycontrast_datasets.ledger import read_ledger
from anycontrast_datasets.manifest import read_locations, read_manifest
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.pseudonym import PseudonymNaming, SplitRule
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.shard import ShardConfig, run_shard
from anycontrast_datasets.sources.claims import FileClaim, SourceOptions
from anycontrast_datasets.sources.dicom import claim_stack
from anycontrast_datasets.sources.dicom_convert import make_converter
from anycontrast_datasets.sources.dicom_header import Instance, read_instance
from anycontrast_datasets.sources.dicom_series import Stack, find_stacks
from anycontrast_datasets.sources.dicom_tags import KEPT_TAGS
from anycontrast_datasets.store.volume_store import VolumeStore

NUM_HEADERS = 200
TEXT_VRS = ("AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UR", "UT")
# What the reader cannot do without; planted in the others of the table too.
NEEDED = {"Modality", "SOPClassUID", "PhotometricInterpretation", "SpecificCharacterSet"}
# Chosen so that the words around the plant are still found.
WORDED = {
    "SeriesDescription": "t1 mprage {}",
    "ProtocolName": "{}",
    "SequenceName": "tfl3d {}",
    "DeidentificationMethod": "defaced by {}",
    "ContrastBolusAgent": "{} 7 ml",
    "PatientID": "{}",
    "PatientName": "{}^Jane",
    "InstitutionName": "{} Hospital",
    "DeviceSerialNumber": "{}",
    "StationName": "{}",
}


def plant_text(dataset: Any, tags: Sequence[int], secret: str, *, depth: int = 1) -> None:
    """Put a secret into every text of the table, other texts, sequences, blocks, overlays."""
    from pydicom import config
    from pydicom.datadict import dictionary_VR
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset
    from pydicom.tag import Tag

    for tag in tags:
        vr = dictionary_VR(tag)
        dataset.add(DataElement(Tag(tag), vr, secret, validation_mode=config.IGNORE))
    for keyword, text in WORDED.items():
        setattr(dataset, keyword, text.format(secret))
    dataset.ImageType = [*dataset.get("ImageType", ["ORIGINAL", "PRIMARY"]), secret]
    dataset.ScanningSequence = ["GR", secret]
    dataset.SequenceVariant = secret
    dataset.MRAcquisitionType = secret
    dataset.ImageComments = f"{secret} moved"
    dataset.add_new(Tag(0x6000, 0x4000), "LT", f"overlay {secret}")
    dataset.add_new(Tag(0x6000, 0x3000), "OB", f"overlay {secret}".encode().ljust(64))
    block = dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x10, "OB", f"<{secret}>".encode().ljust(64))
    block.add_new(0x11, "LT", secret)
    block.add_new(0x12, "UN", secret.encode())
    dataset.private_block(0x0019, f"CREATOR {secret}", create=True).add_new(0x0C, "LO", secret)
    if depth:
        inner = Dataset()
        plant_text(inner, tags[::3], secret, depth=depth - 1)
        dataset.RequestAttributesSequence = [inner]
        dataset.ContrastBolusAgentSequence = [inner]


def secret_of(index: int) -> str:
    return f"ZQX{index:04d}VKJ"


@pytest.fixture(autouse=True)
def _write_anything() -> Iterator[None]:
    """Let the tests' own writer put text where text must not be."""
    from pydicom import config

    mode = config.settings.writing_validation_mode
    config.settings.writing_validation_mode = config.IGNORE
    yield
    config.settings.writing_validation_mode = mode


@pytest.fixture(scope="module")
def text_tags() -> list[int]:
    """The tags of the dictionary that hold text and may be planted."""
    from pydicom.datadict import DicomDictionary

    return [
        tag
        for tag, (vr, _, _, _, keyword) in DicomDictionary.items()
        if vr in TEXT_VRS and tag >> 16 > 2 and keyword not in {*NEEDED, *KEPT_TAGS}
    ]


@pytest.fixture
def options() -> SourceOptions:
    naming = PseudonymNaming(b"k" * 32, "d", SplitRule("d", "s", (0.8, 0.1, 0.1)))
    return SourceOptions(dataset="d", naming=naming)


def test_200_planted_headers_give_away_nothing(
    dicom_head: Callable[..., Any], text_tags: list[int], tmp_path: Path, options: SourceOptions,
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    read: list[Instance] = []
    said: list[object] = []
    for index in range(NUM_HEADERS):
        slice_ = dicom_head(index)
        # Every tag of the dictionary in one header or another.
        plant_text(slice_, text_tags[index % 80 :: 80], secret_of(index))
        path = tmp_path / f"{index:04d}"
        slice_.save_as(path, enforce_file_format=True)
        assert secret_of(index).encode() in path.read_bytes()
        found = read_instance(tmp_path, path.name, max_bytes=2**24)
        if isinstance(found, Instance):
            read.append(found)
            said += [found.sidecar, found.image_type, options.naming.site(*found.site)]
        said.append(repr(found))
    assert len(read) == NUM_HEADERS, said
    assert {instance.subject for instance in read} == {secret_of(i) for i in range(NUM_HEADERS)}
    said += [repr(item) for item in find_stacks(read)]
    stack = Stack(subject=read[0].subject, study_uid="1.2", instances=tuple(read[:24]))
    claim = claim_stack(stack, tmp_path, options, make_converter(tmp_path, 2**24))
    assert isinstance(claim, FileClaim), claim
    votes = (vote_description(claim.description), vote_physics(claim.sidecar or {}))
    said += [claim.location, claim.site, claim.sidecar, repr(claim), *votes]
    text = json.dumps([str(part) for part in said]) + caplog.text
    text += "".join(str(warning.message) for warning in recwarn)
    assert "ZQX" not in text.upper()
    assert "tfl3d" in text and "deface" in text and "t1" in text


def everything_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file under a folder: its relative name and its bytes, unpacked where packed."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            data = path.read_bytes()
            yield name, gzip.decompress(data) if name.endswith(".gz") else data
        else:
            yield name, b""


def test_a_run_from_dicom_to_shards_gives_away_nothing(
    dicom_head: Callable[..., Any],
    text_tags: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    root, out, shards = tmp_path / "source", tmp_path / "manifest", tmp_path / "shards"
    for study in range(3):
        folder = root / secret_of(study)
        folder.mkdir(parents=True)
        for index in range(24 if study else 7):
            slice_ = dicom_head(index, study=study + 1)
            plant_text(slice_, text_tags[index::48], secret_of(study))
            slice_.save_as(folder / f"{secret_of(study)}-{index}", enforce_file_format=True)
    config = ScanConfig(
        source="dicom", root=str(root), dataset="d", check_pictures=False, faces="allow"
    )
    summary = run_scan(config, out)
    assert (summary.inputs, summary.accepted, summary.refused) == (55, 48, 7)
    prepare = PrepareConfig(spacing_mm=(6.0, 6.0, 6.0), box_multiple_vox=8)
    run_shard(out, shards, prepare, ShardConfig(faces="allow"))
    manifest = repr(read_manifest(out / "manifest.parquet"))
    arrays = VolumeStore(shards).read(0)
    ledger = read_ledger(out / "private" / "ledger.csv")
    told = [manifest, repr(arrays.record), str(summary), caplog.text, str(read_locations(out))]
    told += [f"{r.code} {r.reason} {r.remedy} {r.study_id}" for r in ledger]
    assert "ZQX" not in "".join(told).upper()
    for folder in (out, shards):
        for name, data in everything_in(folder):
            # These two name source files; they are private and stay.
            names_files = name in ("private/ledger.csv", "private/mapping.csv")
            checked = name.encode() + (b"" if names_files else data)
            assert b"ZQX" not in checked.upper(), name
    assert all(secret_of(0) in refusal.location for refusal in ledger)
