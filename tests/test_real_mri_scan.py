"""Every one of the 60 real files ends where the trap table of their README says."""

import csv
import gzip
from pathlib import Path

import pytest

from anycontrast_datasets.ledger import Refusal, read_ledger
from anycontrast_datasets.manifest import read_locations, read_manifest
from anycontrast_datasets.scan import ScanConfig, ScanSummary, run_scan
from anycontrast_datasets.study import Study

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY.parent / "shared" / "real_mri"
TABLE = REPOSITORY / "docs" / "real_data_table.csv"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the shared real MRI is not here")

ACCEPTED = {
    "openms_cross/patient19/T1.nii.gz": "T1w",
    "openms_cross/patient19/T1POST.nii.gz": "T1wCE",
    "openms_cross/patient19/T2.nii.gz": "T2w",
    "openms_cross/patient19/FLAIR.nii.gz": "FLAIR",
    "openms_cross/patient19/lesion_mask.nii.gz": "label",
    "openms_long/patient01/study1_T1W.nii.gz": "T1w",
    "openms_long/patient01/study1_FLAIR.nii.gz": "FLAIR",
    "openms_long/patient12/study1_T1W.nii.gz": "T1w",
    "openms_long/patient12/study1_T2W.nii.gz": "T2w",
    "openms_long/patient12/study1_FLAIR.nii.gz": "FLAIR",
    "openms_long/patient20/study2_T1W.nii.gz": "T1w",
    "openms_long/patient20/study2_FLAIR.nii.gz": "FLAIR",
    "isles22/sub-strokecase0009/sub-strokecase0009_ses-0001_adc.nii.gz": "ADC",
    "isles22/sub-strokecase0009/sub-strokecase0009_ses-0001_dwi.nii.gz": "DWI",
    "isles22/sub-strokecase0009/sub-strokecase0009_ses-0001_flair.nii.gz": "FLAIR",
    "isles22/sub-strokecase0009/sub-strokecase0009_ses-0001_msk.nii.gz": "label",
    "cstar_stroke/T1.nii.gz": "T1w",
    "cstar_stroke/T2.nii.gz": "T2w",
    "cstar_stroke/FLAIR.nii.gz": "FLAIR",
    "xa30/12_DWI_trace.nii": "DWI",
    "xa30/13_DWI_FA.nii": "FA",
    "xa30/16_DWI_b0.nii": "b0",
    "xa30/28_asl.nii": "CBF",
    "xa30/8_gre_e1.nii": "GRE",
}
REFUSED = {
    "torchio/t2.nii.gz": "face_present",
    "openms_long/patient12/brainmask_coregistered_space.nii.gz": "mask_grid_mismatch",
    "xa30/14_DWI_colFA.nii": "rgb_voxels",
    "xa30/9_gre_phase.nii": "phase_image",
    "canon_dti/15000_DTI.nii.gz": "not_3d",
    "romeo_gre/Mag.nii": "not_3d",
    "romeo_gre/phase_with_nan.nii": "not_3d",
    "negatives/phantom_T1W_TSE.nii.gz": "not_a_brain",
    "negatives/scct.nii": "not_mri",
    "negatives/spine_t2.nii.gz": "field_of_view_small",
    "xa30/dicom/5_anat-T1w_acq-tfl.dcm": "needs_dicom_source",
    "xa30/dicom/11_DWI_ADC.dcm": "needs_dicom_source",
    **{f"deident/dicom/{n:05d}.dcm": "needs_dicom_source" for n in range(92, 104)},
    **{f"studyforrest/dicom/N2D_{n:04d}.dcm": "needs_dicom_source" for n in range(186, 198)},
}
# Names, ids and dates in the DICOM headers; words of the paths; original subject ids.
PLANTED = (
    *("Jane_Doe", "Jane^Doe", "1966-01-01", "19660101", "real_mri", ".nii", ".dcm", "openms"),
    *("patient", "strokecase", "volunteer", "isles", "cstar", "xa30", "torchio", "sct-1"),
)
DESCRIP = slice(148, 228)  # the free text of a NIfTI-1 header


def scan(out: Path, **values: object) -> ScanSummary:
    config = {"root": str(REAL), "dataset": "real", **values}
    return run_scan(ScanConfig(**config), out)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    scan(folder, source="folder", table=str(TABLE))
    return folder


def accepted(out: Path, root: Path = REAL) -> dict[str, str]:
    locations = read_locations(out).items()
    return {path.relative_to(root.resolve()).as_posix(): role for (_, role), path in locations}


def refusals(out: Path) -> dict[str, Refusal]:
    return {r.location: r for r in read_ledger(out / "private" / "ledger.csv")}


def study_of(out: Path, location: str) -> Study:
    (study_id,) = (i for (i, _), p in read_locations(out).items() if p == REAL.resolve() / location)
    return next(s for s in read_manifest(out / "manifest.parquet") if s.study_id == study_id)


def test_expectations_cover_the_sixty_files() -> None:
    with (REAL / "MANIFEST.csv").open(newline="") as stream:
        listed = {row["file"] for row in csv.DictReader(stream)}
    assert len(listed) == 60
    assert set(ACCEPTED) | set(REFUSED) == listed
    assert not set(ACCEPTED) & set(REFUSED)


def test_every_file_ends_where_it_should(out: Path) -> None:
    assert accepted(out) == ACCEPTED
    assert {name: refusal.code for name, refusal in refusals(out).items()} == REFUSED


def test_every_refusal_says_why_and_what_to_do(out: Path) -> None:
    for refusal in refusals(out).values():
        assert refusal.reason
        assert refusal.remedy


def test_flair_named_t2_with_a_face_is_kept_on_request_with_both_votes(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("file,subject,session,contrast,label\nt2.nii.gz,p,1,,\n")
    root, table = str(REAL / "torchio"), str(tmp_path / "table.csv")
    summary = scan(tmp_path / "m", source="folder", root=root, table=table, faces="flag")
    (volume,) = read_manifest(tmp_path / "m" / "manifest.parquet")[0].volumes
    assert (volume.contrast, volume.face) == ("FLAIR", "present")
    assert {"contrast_disagreement", "face_present"} <= set(volume.flags)
    assert {vote.source: vote.contrast for vote in volume.votes} == {
        "picture": "FLAIR",
        "name": "T2w",
    }
    assert any("T2w" in clause and "name" in clause for clause in volume.evidence)
    assert any("FLAIR" in clause and "picture" in clause for clause in volume.evidence)
    assert (summary.disagreements, summary.by_face) == (1, {"present": 1})
    with (tmp_path / "m" / "private" / "mapping.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["contrast"], row["disagreement"], row["decision"]) == ("FLAIR", "yes", "")


def test_no_volume_is_said_to_disagree(out: Path) -> None:
    flags = [volume.flags for s in read_manifest(out / "manifest.parquet") for volume in s.volumes]
    assert not any("contrast_disagreement" in f for f in flags)


def test_face_states_are_those_that_people_saw(out: Path) -> None:
    states = {
        path.relative_to(REAL.resolve()).as_posix(): volume.face
        for study in read_manifest(out / "manifest.parquet")
        for volume in study.volumes
        if (path := read_locations(out)[study.study_id, volume.contrast])
    }
    stripped = ("openms_cross", "cstar_stroke", "isles22")
    for name, state in states.items():
        if name.startswith(stripped):
            assert state == "stripped", name
        elif name.startswith("openms_long"):
            assert state == "defaced", name


def test_foreign_mask_leaves_its_study_without_label(out: Path) -> None:
    study = study_of(out, "openms_long/patient12/study1_T1W.nii.gz")
    assert study.contrasts == ("T1w", "T2w", "FLAIR")
    assert study.label is None
    assert len({volume.shape for volume in study.volumes}) == 3


def test_label_grids_are_found(out: Path) -> None:
    stroke = study_of(out, "isles22/sub-strokecase0009/sub-strokecase0009_ses-0001_msk.nii.gz")
    assert stroke.label is not None
    assert stroke.label.grid_of in ("DWI", "ADC")
    assert stroke.label.shape == (112, 112, 73)
    multiple_sclerosis = study_of(out, "openms_cross/patient19/lesion_mask.nii.gz")
    assert multiple_sclerosis.contrasts == ("T1w", "T1wCE", "T2w", "FLAIR")


def test_checksums_are_those_of_the_published_list(out: Path) -> None:
    with (REAL / "MANIFEST.csv").open(newline="") as stream:
        published = {row["file"]: row["sha256"] for row in csv.DictReader(stream)}
    recorded = {
        (s.study_id, v.contrast): v.sha256
        for s in read_manifest(out / "manifest.parquet")
        for v in s.volumes
    }
    for (study_id, role), path in read_locations(out).items():
        if role != "label":
            name = path.relative_to(REAL.resolve()).as_posix()
            assert recorded[study_id, role] == published[name]


def descrip_text(path: Path) -> str:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        return stream.read(DESCRIP.stop)[DESCRIP].rstrip(b"\0").decode("latin-1")


def test_nothing_planted_is_in_what_may_be_handed_on(out: Path) -> None:
    descrips = {descrip_text(path) for path in REAL.rglob("*.nii*")} - {""}
    assert any("Time=" in text for text in descrips)
    public = (out / "manifest.parquet").read_bytes() + (out / "summary.json").read_bytes()
    text = public.decode("latin-1") + repr(read_manifest(out / "manifest.parquet"))
    for planted in (*PLANTED, *descrips):
        assert planted.lower() not in text.lower(), planted


def test_computed_tomography_is_told_by_its_picture_too(tmp_path: Path) -> None:
    lines = TABLE.read_text().replace(
        "negatives/scct.nii,ct-template,1,CT", "negatives/scct.nii,x,1,T1w"
    )
    (tmp_path / "table.csv").write_text(lines)
    scan(tmp_path / "m", source="folder", table=str(tmp_path / "table.csv"))
    refusal = refusals(tmp_path / "m")["negatives/scct.nii"]
    assert refusal.code == "not_mri"
    assert "picture" in refusal.reason


def test_bids_source_reads_the_stroke_case_by_its_names(tmp_path: Path) -> None:
    root = REAL / "isles22"
    summary = scan(tmp_path, source="bids", root=str(root))
    assert (summary.inputs, summary.accepted, summary.refused, summary.labels) == (4, 4, 0, 1)
    names = {Path(name).name: role for name, role in accepted(tmp_path, root).items()}
    assert names == {
        "sub-strokecase0009_ses-0001_adc.nii.gz": "ADC",
        "sub-strokecase0009_ses-0001_dwi.nii.gz": "DWI",
        "sub-strokecase0009_ses-0001_flair.nii.gz": "FLAIR",
        "sub-strokecase0009_ses-0001_msk.nii.gz": "label",
    }
