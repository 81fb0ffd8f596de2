"""The vocabulary keeps its ids, synonyms resolve, names are read with the right precedence."""

import logging
from pathlib import Path

import numpy as np
import pytest

from anycontrast_datasets.contrast import (
    DESCRIPTOR_SIZE,
    NUM_CONTRAST_IDS,
    UNKNOWN,
    VOCABULARY,
    ContrastDescriptor,
    UnknownContrastError,
    contrast_id,
    contrast_name,
    guess_from_name,
    resolve_contrast,
)

REAL_MRI = Path(__file__).parents[2] / "shared" / "real_mri"

# Released weights index by these numbers: add lines, never change one.
FROZEN_IDS = {
    "unknown": 0,
    "T1w": 1,
    "T1wCE": 2,
    "T2w": 3,
    "PDw": 4,
    "FLAIR": 5,
    "DWI": 6,
    "ADC": 7,
    "GRE": 8,
    "SWI": 9,
    "T2starw": 10,
    "FA": 11,
    "b0": 12,
    "CBF": 13,
    "phase": 14,
    "colFA": 15,
}


def test_ids_never_change_and_fit_the_embedding() -> None:
    assert {entry.name: entry.id for entry in VOCABULARY} == FROZEN_IDS
    assert max(FROZEN_IDS.values()) < NUM_CONTRAST_IDS
    assert all(contrast_name(contrast_id(name)) == name for name in FROZEN_IDS)


def test_no_synonym_stands_for_two_contrasts() -> None:
    spellings = [s for e in VOCABULARY for s in {e.name.lower(), *e.synonyms}]
    assert len(spellings) == len(set(spellings))


def test_derived_pictures_are_not_trainable() -> None:
    assert {entry.name for entry in VOCABULARY if not entry.trainable} == {"phase", "colFA"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("T1W", "T1w"),
        ("mprage", "T1w"),
        ("t1n", "T1w"),
        ("T1-FLAIR", "T1w"),
        ("t1ce", "T1wCE"),
        ("T1+C", "T1wCE"),
        ("T1 Gd", "T1wCE"),
        ("ce-T1", "T1wCE"),
        ("t1c", "T1wCE"),
        ("t2", "T2w"),
        ("T2*", "T2starw"),
        ("T2_star", "T2starw"),
        ("t2f", "FLAIR"),
        ("T2-FLAIR", "FLAIR"),
        ("dark-fluid", "FLAIR"),
        ("TRACEW", "DWI"),
        ("swi", "SWI"),
        ("asl", "CBF"),
    ],
)
def test_synonyms_resolve(text: str, name: str) -> None:
    assert resolve_contrast(text) == name


def test_every_vocabulary_name_and_synonym_resolves_to_its_entry() -> None:
    for entry in VOCABULARY:
        for text in (entry.name, *entry.synonyms):
            assert resolve_contrast(text) == entry.name


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownContrastError, match="nearest is 'FLAIR'") as caught:
        resolve_contrast("flaire")
    assert caught.value.nearest == "FLAIR"
    assert isinstance(caught.value, ValueError)


def test_contrast_id_takes_exact_names_only() -> None:
    with pytest.raises(UnknownContrastError, match="nearest is 'T1w'"):
        contrast_id("t1w")
    with pytest.raises(ValueError, match="no contrast has id 63"):
        contrast_name(63)


@pytest.mark.parametrize(
    ("filename", "contrast"),
    [
        ("BraTS-GLI-00000-000-t1c.nii.gz", "T1wCE"),
        ("BraTS-GLI-00000-000-t1n.nii.gz", "T1w"),
        ("BraTS-GLI-00000-000-t2f.nii.gz", "FLAIR"),
        ("BraTS-GLI-00000-000-t2w.nii.gz", "T2w"),
        ("BraTS20_Training_001_t1ce.nii", "T1wCE"),
        ("sub-01_ce-gadolinium_T1w.nii.gz", "T1wCE"),
        ("t1_mprage_post.nii", "T1wCE"),
        ("T1_pre_contrast.nii", "T1w"),
        ("t1_flair_sag.nii", "T1w"),
        ("t2_tirm_tra_dark-fluid.nii", "FLAIR"),
        ("ax T2 FLAIR", "FLAIR"),
        ("ax_T2*_tra.nii", "T2starw"),
        ("t2_fl2d_tra_hemo.nii", "T2starw"),
        ("ep2d_diff_b0_b1000_TRACEW.nii", "DWI"),
        ("ep2d_diff_ADC.nii", "ADC"),
        ("sub-1_ses-1_space-T2w_FLAIR.nii.gz", "FLAIR"),
        ("T1POST_N4_regtoFLAIR_brain_N4_regtoMNI.nii.gz", "T1wCE"),
        ("Ph_201_T1W_TSE.nii.gz", "T1w"),
        ("image_0007.nii.gz", None),
        ("T1_and_T2.nii", None),
    ],
)
def test_file_names_are_read_with_the_narrower_claim_first(
    filename: str, contrast: str | None
) -> None:
    assert guess_from_name(filename).contrast == contrast


@pytest.mark.parametrize(
    ("filename", "hint"),
    [
        ("sub-01_label-lesion_mask.nii.gz", "is_mask"),
        ("sub-01_msk.nii.gz", "is_mask"),
        ("BraTS-GLI-00000-000-seg.nii.gz", "is_mask"),
        ("sub-01_space-T1w_label-tumour_dseg.nii.gz", "is_mask"),
        ("T1_brainmask.nii", "is_mask"),
        ("gre_field_mapping_e2_ph.nii", "is_phase"),
        ("sub-01_part-phase_GRE.nii", "is_phase"),
        ("DWI_colFA.nii", "is_derived"),
        ("SWI_minIP.nii", "is_derived"),
        ("head_CT.nii.gz", "not_mri"),
        ("localizer_3plane.nii", "is_localizer"),
    ],
)
def test_what_is_no_input_is_recognised_by_one_hint(filename: str, hint: str) -> None:
    guess = guess_from_name(filename)
    hints = ("is_mask", "is_phase", "is_derived", "not_mri", "is_localizer")
    assert [name for name in hints if getattr(guess, name)] == [hint]
    assert guess.contrast in (None, "phase", "colFA")


def test_a_subject_called_like_a_contrast_does_not_count() -> None:
    guess = guess_from_name("sub-ct01_ses-seg_T2w.nii.gz")
    assert guess.contrast == "T2w"
    assert not guess.not_mri
    assert not guess.is_mask


def test_evidence_never_repeats_the_rest_of_the_name() -> None:
    guess = guess_from_name("/data/Jane_Doe/Doe_Jane_19660101_T1w_post.nii.gz")
    assert guess.contrast == "T1wCE"
    text = " ".join(guess.evidence).lower()
    assert "t1w_post" in text
    assert not any(part in text for part in ("jane", "doe", "1966"))


@pytest.mark.skipif(not REAL_MRI.is_dir(), reason="shared real MRI volumes are not here")
def test_names_of_the_real_volumes() -> None:
    found = {p.name: guess_from_name(p.name) for p in REAL_MRI.rglob("*.nii*")}
    assert found["12_DWI_trace.nii"].contrast == "DWI"
    assert found["16_DWI_b0.nii"].contrast == "b0"
    assert found["28_asl.nii"].contrast == "CBF"
    assert found["T1POST.nii.gz"].contrast == "T1wCE"
    assert found["scct.nii"].not_mri
    assert found["t2.nii.gz"].contrast == "T2w"  # wrong, and for the picture to tell


def test_descriptor_knows_nothing_by_default() -> None:
    vector = ContrastDescriptor().vector()
    assert vector.shape == (DESCRIPTOR_SIZE,)
    assert vector.dtype == np.float32
    assert not vector.any()


def test_zero_is_told_from_unknown_and_values_stay_bounded() -> None:
    zero = ContrastDescriptor(b_value_s_mm2=0.0, has_agent=False).vector()
    assert zero.sum() == 2.0  # two known bits, two zero values
    full = ContrastDescriptor(
        family="flair", te_s=0.12, tr_s=9.0, ti_s=2.5, flip_deg=180.0, b_value_s_mm2=0.0,
        field_t=3.0, has_agent=True,
    )  # fmt: skip
    assert 0.0 <= full.vector().min() <= full.vector().max() <= 1.0
    assert np.count_nonzero(full.vector()) == 1 + 6 + 5 + 2


def test_sidecar_gives_physics_and_nothing_else() -> None:
    sidecar = {
        "EchoTime": 0.09,
        "RepetitionTime": 9,
        "InversionTime": 2.5,
        "FlipAngle": 150,
        "MagneticFieldStrength": 3,
        "ContrastBolusIngredient": "GADOLINIUM",
        "InstitutionName": "Planted Hospital",
    }
    descriptor = ContrastDescriptor.from_sidecar(sidecar, contrast="FLAIR")
    assert descriptor == ContrastDescriptor(
        family="flair", te_s=0.09, tr_s=9.0, ti_s=2.5, flip_deg=150.0, field_t=3.0, has_agent=True
    )
    assert "Planted" not in str(descriptor.to_dict())


def test_echo_time_in_milliseconds_is_left_unknown_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        descriptor = ContrastDescriptor.from_sidecar({"EchoTime": 93, "FlipAngle": [3, 4]})
    assert descriptor == ContrastDescriptor()
    assert "EchoTime" in caplog.text
    assert "FlipAngle" in caplog.text


def test_missing_agent_tag_is_unknown_unless_the_contrast_says_it() -> None:
    assert ContrastDescriptor.from_sidecar({}, contrast="T1w").has_agent is None
    assert ContrastDescriptor.from_sidecar({}, contrast="T1wCE").has_agent is True
    assert ContrastDescriptor.from_sidecar({"ContrastBolusAgent": "NONE"}).has_agent is False
    assert ContrastDescriptor.from_sidecar({}, contrast=UNKNOWN).family is None


def test_descriptor_survives_its_dictionary_and_refuses_strange_keys() -> None:
    descriptor = ContrastDescriptor(family="t2", te_s=0.1, has_agent=False)
    assert ContrastDescriptor.from_dict(descriptor.to_dict()) == descriptor
    with pytest.raises(ValueError, match="unknown keys"):
        ContrastDescriptor.from_dict({"echo": 1})


@pytest.mark.parametrize("bad", [{"te_s": 93.0}, {"tr_s": float("nan")}, {"family": "modality"}])
def test_descriptor_refuses_the_unbelievable(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ContrastDescriptor(**bad)  # type: ignore[arg-type]
