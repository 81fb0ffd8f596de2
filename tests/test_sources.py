"""The sources: which study each file belongs to, and what happens to the files that fit nowhere."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from anycontrast_datasets.appearance import Appearance
from anycontrast_datasets.ledger import Refusal
from anycontrast_datasets.pseudonym import PlainNaming, SplitRule
from anycontrast_datasets.sources import bids, brats, folder
from anycontrast_datasets.sources.claims import SourceOptions
from anycontrast_datasets.study import ManifestError, Study
from anycontrast_datasets.volume import write_volume

NAMING = PlainNaming("ds", SplitRule("ds", "salt", (0.8, 0.1, 0.1)))
OPTIONS = SourceOptions(dataset="ds", naming=NAMING, check_pictures=False)
HEADER = "file,subject,session,contrast,label\n"


def image(path: Path, *, shape: tuple[int, int, int] = (6, 7, 5), shift_mm: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 3] = shift_mm
    rng = np.random.default_rng(crc32(path.name.encode()))
    voxels = rng.integers(0, 999, size=shape).astype(np.int16)
    write_volume(path, voxels, affine)
    return path


def mask(path: Path, *, shape: tuple[int, int, int] = (6, 7, 5), value: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.zeros(shape, dtype=np.uint8)
    voxels[2, 2, 2] = value
    write_volume(path, voxels, np.diag([2.0, 2.0, 3.0, 1.0]))
    return path


def split_found(found: Iterator[Study | Refusal]) -> tuple[dict[str, Study], dict[str, Refusal]]:
    items = list(found)
    studies = {item.study_id: item for item in items if isinstance(item, Study)}
    refusals = {item.location: item for item in items if isinstance(item, Refusal)}
    return studies, refusals


def codes(refusals: dict[str, Refusal]) -> dict[str, str]:
    return {location: refusal.code for location, refusal in refusals.items()}


def folder_scan(
    root: Path, rows: str, options: SourceOptions = OPTIONS
) -> tuple[dict[str, Study], dict[str, Refusal]]:
    table = root.parent / "table.csv"
    table.write_text(HEADER + rows)
    return split_found(folder.scan(root, options, table))


def test_bids_groups_sessions_and_reads_contrast_agent_and_sidecar(tmp_path: Path) -> None:
    anat = tmp_path / "sub-01" / "ses-1" / "anat"
    image(anat / "sub-01_ses-1_T1w.nii.gz")
    image(anat / "sub-01_ses-1_ce-gd_T1w.nii.gz")
    image(anat / "sub-01_ses-1_flair.nii.gz")
    image(tmp_path / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_T2w.nii.gz")
    (anat / "sub-01_ses-1_flair.json").write_text(
        json.dumps({"EchoTime": 0.1, "InversionTime": 2.5, "InstitutionName": "Jane_Doe"})
    )
    studies, refusals = split_found(bids.scan(tmp_path, OPTIONS))
    assert refusals == {}
    assert {k: s.contrasts for k, s in studies.items()} == {
        "ds-01-1": ("T1w", "T1wCE", "FLAIR"),
        "ds-01-2": ("T2w",),
    }
    flair = studies["ds-01-1"].volumes[2].descriptor
    assert (flair.te_s, flair.ti_s, flair.family) == (0.1, 2.5, "flair")
    assert studies["ds-01-1"].volumes[1].descriptor.has_agent is True
    assert "Jane_Doe" not in repr(studies)


def test_bids_takes_masks_from_derivatives_but_not_images(tmp_path: Path) -> None:
    image(tmp_path / "sub-1" / "dwi" / "sub-1_dwi.nii.gz")
    image(tmp_path / "sub-1" / "anat" / "sub-1_T1w.nii.gz", shape=(9, 9, 9))
    mask(tmp_path / "derivatives" / "manual" / "sub-1" / "sub-1_label-lesion_mask.nii.gz")
    mask(tmp_path / "derivatives" / "bet" / "sub-1" / "sub-1_desc-brain_mask.nii.gz")
    image(tmp_path / "derivatives" / "prep" / "sub-1" / "sub-1_desc-preproc_T1w.nii.gz")
    studies, refusals = split_found(bids.scan(tmp_path, OPTIONS))
    label = studies["ds-1"].label
    assert label is not None
    assert (label.grid_of, label.shape) == ("DWI", (6, 7, 5))
    assert sorted(codes(refusals).values()) == ["brain_mask", "derivative_image"]


def test_bids_says_why_each_odd_file_is_left_out(tmp_path: Path) -> None:
    image(tmp_path / "sub-1_T1w.nii.gz")
    image(tmp_path / "sub-1_part-phase_T2w.nii.gz")
    image(tmp_path / "sub-1_phase.nii.gz")
    image(tmp_path / "sub-1_ct.nii.gz")
    image(tmp_path / "sub-1_FLAIRR.nii.gz")
    image(tmp_path / "T2.nii.gz")
    (tmp_path / "sub-1_T2w.mgz").write_bytes(b"x")
    (tmp_path / "scan.dcm").write_bytes(b"x")
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(8))
    (tmp_path / "README").write_text("no image")
    (tmp_path / ".git").mkdir()
    image(tmp_path / ".git" / "sub-2_T1w.nii.gz")
    studies, refusals = split_found(bids.scan(tmp_path, OPTIONS))
    assert list(studies) == ["ds-1"]
    assert codes(refusals) == {
        "sub-1_part-phase_T2w.nii.gz": "phase_image",
        "sub-1_phase.nii.gz": "phase_image",
        "sub-1_ct.nii.gz": "not_mri",
        "sub-1_FLAIRR.nii.gz": "unknown_contrast",
        "T2.nii.gz": "no_subject",
        "sub-1_T2w.mgz": "unsupported_format",
        "scan.dcm": "needs_dicom_source",
        "IM0001": "needs_dicom_source",
    }
    assert "nearest is FLAIR" in refusals["sub-1_FLAIRR.nii.gz"].reason
    assert all(refusal.remedy for refusal in refusals.values())


def test_two_volumes_of_one_contrast_are_both_refused_and_the_rest_is_kept(tmp_path: Path) -> None:
    image(tmp_path / "sub-1_run-1_T1w.nii.gz")
    image(tmp_path / "sub-1_run-2_T1w.nii.gz")
    image(tmp_path / "sub-1_T2w.nii.gz")
    studies, refusals = split_found(bids.scan(tmp_path, OPTIONS))
    assert studies["ds-1"].contrasts == ("T2w",)
    assert codes(refusals) == {
        "sub-1_run-1_T1w.nii.gz": "duplicate_contrast",
        "sub-1_run-2_T1w.nii.gz": "duplicate_contrast",
    }
    assert "run-1" in refusals["sub-1_run-2_T1w.nii.gz"].reason
    assert "one file per contrast" in refusals["sub-1_run-2_T1w.nii.gz"].remedy


@pytest.mark.parametrize(
    ("case", "names", "study_id"),
    [
        ("BraTS20_Training_001", ("_t1", "_t1ce", "_t2", "_flair", "_seg"), None),
        ("BraTS-GLI-00005-101", ("-t1n", "-t1c", "-t2w", "-t2f", "-seg"), "ds-brats-gli-00005-101"),
    ],
)
def test_brats_both_name_styles(
    tmp_path: Path, case: str, names: tuple[str, ...], study_id: str | None
) -> None:
    for name in names[:4]:
        image(tmp_path / case / f"{case}{name}.nii.gz")
    mask(tmp_path / case / f"{case}{names[4]}.nii.gz", value=4)
    image(tmp_path / case / f"{case}_extra.nii.gz")
    studies, refusals = split_found(brats.scan(tmp_path, OPTIONS))
    (study,) = studies.values()
    assert study.contrasts == ("T1w", "T1wCE", "T2w", "FLAIR")
    assert study.label is not None
    assert study.study_id == (study_id or f"ds-{case.lower()}")
    assert list(codes(refusals).values()) == ["unknown_contrast"]


def test_folder_table_states_guesses_and_accounts_for_every_file(tmp_path: Path) -> None:
    root = tmp_path / "data"
    image(root / "a" / "scan1.nii.gz")
    image(root / "a" / "FLAIR.nii")
    mask(root / "a" / "mask.nii.gz")
    image(root / "a" / "ct.nii.gz")
    mask(root / "a" / "brain_mask.nii.gz")
    image(root / "left_over.nii.gz")
    (root / "series.dcm").write_bytes(b"x")
    (root / "notes.txt").write_text("no image")
    studies, refusals = folder_scan(
        root,
        "a/scan1.nii.gz,p1,1,t1 post,\n"
        "./a/FLAIR.nii,p1,1,,\n"
        "a/mask.nii.gz,p1,1,,lesion\n"
        "a/ct.nii.gz,p1,1,CT,\n"
        "a/brain_mask.nii.gz,p1,1,,\n"
        "a/gone.nii.gz,p1,1,T2w,\n"
        "notes.txt,p1,1,T2w,\n"
        "\n",
    )
    assert studies["ds-p1-1"].contrasts == ("T1wCE", "FLAIR")
    assert studies["ds-p1-1"].label is not None
    assert codes(refusals) == {
        "a/ct.nii.gz": "not_mri",
        "a/brain_mask.nii.gz": "label_not_stated",
        "a/gone.nii.gz": "missing_file",
        "notes.txt": "unsupported_format",
        "left_over.nii.gz": "not_in_table",
        "series.dcm": "needs_dicom_source",
    }


def test_unknown_contrast_in_a_table_names_the_nearest_or_is_kept_on_request(
    tmp_path: Path,
) -> None:
    image(tmp_path / "data" / "x.nii.gz")
    rows = "x.nii.gz,p1,1,FLAYR,\n"
    studies, refusals = folder_scan(tmp_path / "data", rows)
    assert studies == {}
    assert refusals["x.nii.gz"].code == "unknown_contrast"
    assert "'FLAYR'" in refusals["x.nii.gz"].reason
    assert "nearest is FLAIR" in refusals["x.nii.gz"].reason
    keep = SourceOptions(dataset="ds", naming=NAMING, check_pictures=False, unknown_contrast="keep")
    studies, refusals = folder_scan(tmp_path / "data", rows, keep)
    assert studies["ds-p1-1"].contrasts == ("unknown",)
    assert refusals == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,subject,session,contast,label\nx.nii,p,1,T1w,\n", r"\['contrast'\] not among"),
        ("", "columns file, subject, session, contrast, label are needed"),
        (HEADER + ",p1,1,T1w,\n", "row 2: file must not be blank"),
        (HEADER + "x.nii,,1,T1w,\n", "row 2: subject must not be blank"),
        (HEADER + "x.nii,p1,1,T1w,\n./x.nii,p1,2,T1w,\n", "row 3: 'x.nii' is in row 2 already"),
        (HEADER + "../x.nii,p1,1,T1w,\n", "row 2: file must lie in the folder"),
        (HEADER + "/x.nii,p1,1,T1w,\n", "row 2: file must lie in the folder"),
        (HEADER + "x.nii,p1,1,T1w,,,\n", "row 2: 7 cells for 5 columns"),
        (HEADER + '"x.nii,p1,1,T1w,\n', "must be UTF-8 text with columns"),
    ],
)
def test_table_mistake_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(ManifestError, match=said) as caught:
        folder.read_table(table)
    assert "table.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_tables_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no file at .*correct scan\.table"):
        folder.read_table(tmp_path / "none.csv")
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ManifestError, match="save it as CSV UTF-8"):
        folder.read_table(tmp_path / "t.xlsx")


@pytest.mark.parametrize("delimiter", ["\t", ";", ","])
def test_table_may_be_tsv_or_semicolons_with_a_byte_order_mark(
    tmp_path: Path, delimiter: str
) -> None:
    text = (HEADER + "x y.nii,p1,,T1w,\n").replace(",", delimiter)
    (tmp_path / "t").write_text(text, encoding="utf-8-sig")
    (row,) = folder.read_table(tmp_path / "t")
    assert (row.file, row.subject, row.session, row.contrast) == ("x y.nii", "p1", "", "T1w")


def test_label_on_a_foreign_grid_goes_to_the_ledger_and_the_study_stays(tmp_path: Path) -> None:
    root = tmp_path / "data"
    image(root / "T1.nii.gz")
    image(root / "T2.nii.gz", shift_mm=5.0)
    mask(root / "m.nii.gz", shape=(6, 7, 6))
    studies, refusals = folder_scan(root, "T1.nii.gz,p,,,\nT2.nii.gz,p,,,\nm.nii.gz,p,,,lesion\n")
    assert studies["ds-p"].contrasts == ("T1w", "T2w")
    assert studies["ds-p"].label is None
    assert codes(refusals) == {"m.nii.gz": "mask_grid_mismatch"}
    assert "T1w (6, 7, 5)" in refusals["m.nii.gz"].reason


def test_label_stored_along_other_axes_is_on_the_same_grid(tmp_path: Path) -> None:
    root = tmp_path / "data"
    image(root / "T1.nii.gz")
    flipped = np.diag([-2.0, 2.0, 3.0, 1.0])
    flipped[0, 3] = 2.0 * 5
    write_volume(root / "m.nii.gz", np.ones((6, 7, 5), dtype=np.uint8), flipped)
    studies, refusals = folder_scan(root, "T1.nii.gz,p,,,\nm.nii.gz,p,,,lesion\n")
    assert refusals == {}
    label = studies["ds-p"].label
    assert label is not None
    assert label.affine[0] == (-2.0, 0.0, 0.0, 10.0)


def test_several_labels_fractional_labels_and_labels_without_volumes_are_refused(
    tmp_path: Path,
) -> None:
    root = tmp_path / "data"
    for subject in ("a", "b"):
        image(root / subject / "T1.nii.gz")
    mask(root / "a" / "m1.nii.gz")
    mask(root / "a" / "m2.nii.gz")
    write_volume(
        root / "b" / "p.nii", np.full((6, 7, 5), 0.5, np.float32), np.diag([2.0, 2.0, 3.0, 1.0])
    )
    mask(root / "c.nii.gz")
    studies, refusals = folder_scan(
        root,
        "a/T1.nii.gz,a,,,\na/m1.nii.gz,a,,,x\na/m2.nii.gz,a,,,x\n"
        "b/T1.nii.gz,b,,,\nb/p.nii,b,,,x\nc.nii.gz,c,,,x\n",
    )
    assert set(studies) == {"ds-a", "ds-b"}
    assert codes(refusals) == {
        "a/m1.nii.gz": "duplicate_label",
        "a/m2.nii.gz": "duplicate_label",
        "b/p.nii": "label_values",
        "c.nii.gz": "no_volume_left",
    }


def test_an_empty_label_is_a_label(tmp_path: Path) -> None:
    root = tmp_path / "data"
    image(root / "T1.nii.gz")
    mask(root / "m.nii.gz", value=0)
    studies, _ = folder_scan(root, "T1.nii.gz,p,,,\nm.nii.gz,p,,,lesion\n")
    assert studies["ds-p"].label is not None


def test_damaged_files_are_in_the_ledger_and_the_rest_of_the_study_stays(tmp_path: Path) -> None:
    good = image(tmp_path / "sub-1_T1w.nii.gz").read_bytes()
    plain = bytearray(image(tmp_path / "sub-1_T2w.nii").read_bytes())
    (tmp_path / "sub-1_T2w.nii").write_bytes(plain[:-10])
    (tmp_path / "sub-1_FLAIR.nii.gz").write_bytes(good[: len(good) // 2])
    flipped = bytearray(good)
    flipped[-6] ^= 0xFF
    (tmp_path / "sub-1_PDw.nii.gz").write_bytes(flipped)
    (tmp_path / "sub-1_dwi.nii.gz").write_bytes(b"")
    (tmp_path / "sub-1_adc.nii.gz").write_bytes(b"<html>not found</html>")
    (tmp_path / "sub-1_swi.nii.gz").symlink_to(tmp_path / "annex" / "gone")
    bomb = bytearray(plain[:352])
    np.frombuffer(bomb, dtype="<i2", count=8, offset=40)[:] = (3, 2000, 2000, 2000, 1, 1, 1, 1)
    (tmp_path / "sub-1_gre.nii.gz").write_bytes(gzip.compress(bytes(bomb)))
    studies, refusals = split_found(bids.scan(tmp_path, OPTIONS))
    assert studies["ds-1"].contrasts == ("T1w",)
    found = {name.removeprefix("sub-1_"): code for name, code in codes(refusals).items()}
    assert found.pop("gre.nii.gz") in ("too_large", "header_data_mismatch")
    assert found == {
        "T2w.nii": "truncated",
        "FLAIR.nii.gz": "truncated",
        "PDw.nii.gz": "gzip_corrupt",
        "dwi.nii.gz": "empty_file",
        "adc.nii.gz": "gzip_corrupt",
        "swi.nii.gz": "missing_file",
    }
    assert all(str(tmp_path) not in refusal.reason for refusal in refusals.values())


def test_nan_voxels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sub-1_T1w.nii"
    write_volume(path, np.arange(210, dtype=np.float32).reshape(6, 7, 5), np.eye(4))
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    _, refusals = split_found(bids.scan(tmp_path, OPTIONS))
    assert codes(refusals) == {"sub-1_T1w.nii": "nonfinite_voxels"}


def test_sidecar_that_cannot_be_read_flags_the_volume(tmp_path: Path) -> None:
    image(tmp_path / "sub-1_T1w.nii.gz")
    (tmp_path / "sub-1_T1w.json").write_text("{broken")
    studies, _ = split_found(bids.scan(tmp_path, OPTIONS))
    assert "sidecar_unreadable" in studies["ds-1"].volumes[0].flags


def pictures_say(monkeypatch: pytest.MonkeyPatch, contrast: str | None, *flags: str) -> None:
    def look(*_: object) -> Appearance:
        return Appearance(flags=flags, contrast=contrast, evidence=("picture: fluid is dark",))

    monkeypatch.setattr("anycontrast_datasets.sources.judging.check_appearance", look)


def look_options() -> SourceOptions:
    return SourceOptions(dataset="ds", naming=NAMING)


def test_picture_overrules_a_name_and_both_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures_say(monkeypatch, "FLAIR")
    image(tmp_path / "data" / "t2.nii.gz")
    studies, _ = folder_scan(tmp_path / "data", "t2.nii.gz,p,,,\n", look_options())
    (volume,) = studies["ds-p"].volumes
    assert volume.contrast == "FLAIR"
    assert volume.descriptor.family == "flair"
    assert "contrast_disagreement" in volume.flags
    assert len(volume.evidence) == 2
    assert "T2w" in volume.evidence[0]


def test_picture_does_not_overrule_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures_say(monkeypatch, "FLAIR")
    image(tmp_path / "data" / "x.nii.gz")
    studies, _ = folder_scan(tmp_path / "data", "x.nii.gz,p,,T2w,\n", look_options())
    assert studies["ds-p"].volumes[0].contrast == "T2w"
    assert "contrast_disagreement" in studies["ds-p"].volumes[0].flags


def test_corrected_contrast_gives_way_to_a_file_whose_name_and_picture_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures_say(monkeypatch, "FLAIR")
    image(tmp_path / "data" / "t2.nii.gz")
    image(tmp_path / "data" / "flair.nii.gz")
    rows = "t2.nii.gz,p,,,\nflair.nii.gz,p,,,\n"
    studies, refusals = folder_scan(tmp_path / "data", rows, look_options())
    assert studies["ds-p"].contrasts == ("FLAIR",)
    assert codes(refusals) == {"t2.nii.gz": "duplicate_contrast"}


@pytest.mark.parametrize(
    ("flag", "code"),
    [
        ("not_a_brain", "not_a_brain"),
        ("field_of_view_small", "field_of_view_small"),
        ("ct_like", "not_mri"),
    ],
)
def test_picture_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, code: str
) -> None:
    pictures_say(monkeypatch, None, flag)
    image(tmp_path / "data" / "t2.nii.gz")
    studies, refusals = folder_scan(tmp_path / "data", "t2.nii.gz,p,,,\n", look_options())
    assert studies == {}
    assert codes(refusals) == {"t2.nii.gz": code}


def test_only_selected_contrasts_are_kept(tmp_path: Path) -> None:
    image(tmp_path / "sub-1_T1w.nii.gz")
    image(tmp_path / "sub-1_T2w.nii.gz")
    options = SourceOptions(dataset="ds", naming=NAMING, check_pictures=False, contrasts=("T2w",))
    studies, refusals = split_found(bids.scan(tmp_path, options))
    assert studies["ds-1"].contrasts == ("T2w",)
    assert codes(refusals) == {"sub-1_T1w.nii.gz": "contrast_not_selected"}


def test_output_does_not_depend_on_threads_and_progress_counts_every_file(tmp_path: Path) -> None:
    for subject in range(6):
        for contrast in ("T1w", "T2w"):
            image(tmp_path / f"sub-{subject}_{contrast}.nii.gz")
    (tmp_path / "x.dcm").write_bytes(b"x")
    outputs, calls = [], []
    for num_threads in (1, 4):
        options = SourceOptions(
            dataset="ds",
            naming=NAMING,
            check_pictures=False,
            num_threads=num_threads,
            on_progress=lambda done, total: calls.append((done, total)),
        )
        outputs.append(list(bids.scan(tmp_path, options)))
    assert outputs[0] == outputs[1]
    assert calls == 2 * [(done, 13) for done in range(1, 14)]


def test_file_name_that_is_not_utf8_is_in_the_ledger(tmp_path: Path) -> None:
    image(tmp_path / "sub-1_T1w.nii.gz")
    raw = os.fsencode(tmp_path) + b"/sub-\xff_T1w.nii.gz"
    try:
        with open(raw, "wb") as stream:  # noqa: PTH123 - Path has no byte names
            stream.write(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    studies, refusals = split_found(bids.scan(tmp_path, OPTIONS))
    assert list(studies) == ["ds-1"]
    assert list(codes(refusals).values()) == ["bad_file_name"]


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    image(tmp_path / "store" / "sub-1_T1w.nii.gz")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "data").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "root")
    studies, refusals = split_found(bids.scan(tmp_path / "root", OPTIONS))
    assert list(studies) == ["ds-1"]
    assert refusals == {}
