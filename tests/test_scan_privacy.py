"""What is planted in headers, extensions and sidecars is in no scan and in no shard."""

import gzip
import json
import logging
import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from anycontrast_datasets.manifest import read_manifest
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.pseudonym import PseudonymNaming, SplitRule
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.shard import ShardConfig, run_shard
from anycontrast_datasets.volume import write_volume

PLANT = "ZQXPLANT"
# Offset and length of the free text fields of a NIfTI-1 header.
TEXT_FIELDS = {"data_type": (4, 10), "db_name": (14, 18), "descrip": (148, 80)} | {
    "aux_file": (228, 24),
    "intent_name": (328, 16),
}
SIDECAR_TEXTS = (
    *("PatientName", "PatientID", "PatientBirthDate", "AcquisitionTime", "AcquisitionDateTime"),
    *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"),
    *("DeviceSerialNumber", "ProcedureStepDescription", "ImageComments", "ReferringPhysicianName"),
    *("SeriesDescription", "ProtocolName", "SequenceName", "PulseSequenceName", "ScanningSequence"),
    *("SequenceVariant", "ContrastBolusAgent", "ContrastBolusIngredient", "DeidentificationMethod"),
    *("Manufacturer", "ManufacturersModelName", "SoftwareVersions", "BidsGuess"),
)


def planted_volume(path: Path) -> None:
    """A volume whose five text fields and header extension hold the plant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(crc32(path.name.encode()))
    voxels = rng.integers(1, 999, size=(10, 10, 10)).astype(np.int16)
    write_volume(path, voxels, np.diag([3.0, 3.0, 3.0, 1.0]))
    raw = bytearray(gzip.decompress(path.read_bytes()))
    for start, length in TEXT_FIELDS.values():
        text = f"{PLANT}{start}"[:length].encode()
        raw[start : start + len(text)] = text
    extension = struct.pack("<2i", 64, 6) + f"{PLANT}-extension".encode().ljust(56, b"\0")
    struct.pack_into("<f", raw, 108, 352.0 + len(extension))
    content = bytes(raw[:348]) + b"\1\0\0\0" + extension + bytes(raw[352:])
    path.write_bytes(gzip.compress(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four subjects of two contrasts, named by the plant, with sidecars full of it."""
    folder = tmp_path / "in" / f"{PLANT}-study"
    nested = {"deep": [{"er": {"PersonName": f"{PLANT}^deep"}}], "EchoTime": f"{PLANT} 1"}
    texts = {key: f"{PLANT}-{key}" for key in SIDECAR_TEXTS}
    for subject in range(4):
        stem = f"sub-{PLANT}{subject}_ses-{PLANT}19660101"
        for contrast in ("T1w", "FLAIR"):
            path = folder / f"{stem}_{contrast}.nii.gz"
            planted_volume(path)
            lists = {"ImageType": ["ORIGINAL", f"{PLANT}-type"], f"{PLANT}key": 1}
            sidecar = {**texts, **lists, "nested": nested, "RepetitionTime": nested}
            (folder / f"{stem}_{contrast}.json").write_text(json.dumps(sidecar))
    (folder / "T1w.json").write_text(json.dumps({**texts, "EchoTime": 0.003}))
    planted_volume(folder / f"sub-{PLANT}_localizer.nii.gz")
    (folder / f"sub-{PLANT}_T2w.nii.gz").write_bytes(PLANT.encode())
    return folder


def test_nothing_planted_survives(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    out, shards = tmp_path / "manifest", tmp_path / "shards"
    config = ScanConfig(source="bids", root=str(root), dataset="d", check_pictures=False)
    summary = run_scan(config, out)
    assert (summary.accepted, summary.refused) == (8, 2)
    prepare = PrepareConfig(spacing_mm=(3.0, 3.0, 3.0), box_multiple_vox=8)
    run_shard(out, shards, prepare, ShardConfig())
    studies = read_manifest(out / "manifest.parquet")
    assert len({study.site for study in studies}) == 1
    assert studies[0].site
    told = [repr(studies), str(summary), caplog.text]
    names = [p for folder in (out, shards) for p in folder.rglob("*")]
    told += [p.relative_to(tmp_path).as_posix() for p in names]
    told += [p.read_bytes().decode("latin-1") for p in names if p.is_file() and public(p)]
    assert PLANT not in "".join(told).upper()


def public(path: Path) -> bool:
    """The private tables name source files, and stay."""
    return path.parent.name != "private"


def test_private_tables_hold_locations_but_no_header_text(root: Path, tmp_path: Path) -> None:
    config = ScanConfig(source="bids", root=str(root), dataset="d", check_pictures=False)
    run_scan(config, tmp_path / "m")
    for path in (tmp_path / "m/private").iterdir():
        text = path.read_bytes().decode("latin-1")
        for key in (*SIDECAR_TEXTS, "extension", "deep", "type", "key"):
            assert f"{PLANT}-{key}" not in text, path.name
            assert f"{PLANT}^{key}" not in text, path.name


def test_a_site_cannot_be_found_by_trying_names_without_the_key() -> None:
    split = SplitRule("d", "salt", (0.8, 0.1, 0.1))
    naming = PseudonymNaming(b"k" * 32, "d", split)
    site = naming.site("General Hospital", "12345")
    assert site == naming.site(" general  HOSPITAL", "12345")
    assert site != naming.site("General Hospital", "12346")
    assert naming.site("", " ") == ""
    guesses = {
        PseudonymNaming(key, "d", split).site("General Hospital", "12345")
        for key in (b"", b"d", b"salt")
    }
    assert site not in guesses
