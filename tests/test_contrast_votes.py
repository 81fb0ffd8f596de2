"""Votes on contrasts: physics by rule, descriptions by token, and a verdict that owns up."""

import itertools

import pytest

from anycontrast_datasets.contrast_votes import (
    combine_votes,
    confidence_level,
    guess_from_description,
    vote_description,
    vote_name,
    vote_physics,
    vote_stated,
)
from anycontrast_datasets.study import ContrastVote


def vote(source: str, contrast: str, confidence: float) -> ContrastVote:
    return ContrastVote(source=source, contrast=contrast, confidence=confidence)


@pytest.mark.parametrize(
    ("sidecar", "contrast"),
    [
        ({"EchoTime": 0.095, "RepetitionTime": 9.0, "InversionTime": 2.5}, "FLAIR"),
        ({"EchoTime": 0.388, "RepetitionTime": 5.0, "InversionTime": 1.8}, "FLAIR"),
        (
            {"EchoTime": 0.00241, "InversionTime": 0.9, "ScanningSequence": ["GR", "IR"]},
            "T1w",
        ),
        ({"EchoTime": 0.009, "InversionTime": 0.86, "ScanningSequence": "SE\\IR"}, "T1w"),
        ({"EchoTime": 0.09, "RepetitionTime": 4.5, "ScanningSequence": "SE"}, "T2w"),
        ({"EchoTime": 0.012, "RepetitionTime": 0.6, "ScanningSequence": "SE"}, "T1w"),
        ({"EchoTime": 0.012, "RepetitionTime": 3.0, "ScanningSequence": "SE"}, "PDw"),
        ({"EchoTime": 0.02, "RepetitionTime": 0.65, "ScanningSequence": "GR"}, "T2starw"),
        ({"EchoTime": 0.0049, "RepetitionTime": 0.4, "SequenceName": "*fm2d2r"}, None),
        ({"EchoTime": 0.004, "RepetitionTime": 0.02, "ScanningSequence": "GR"}, None),
        ({"EchoTime": 0.09, "RepetitionTime": 6.0}, None),
        ({"EchoTime": 0.09, "SequenceName": "*ep_b1000t", "RepetitionTime": 6.0}, "DWI"),
        ({"EchoTime": 0.09, "SequenceName": "*ep_b0", "RepetitionTime": 6.0}, "b0"),
        ({"EchoTime": 0.09, "DiffusionBValue": 1000, "ScanningSequence": "EP"}, "DWI"),
        ({"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], "EchoTime": 0.09}, "ADC"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"], "EchoTime": 0.02}, "phase"),
        ({"EchoTime": 0.03, "RepetitionTime": 2.0, "ScanningSequence": "EP"}, None),
        ({"EchoTime": 0.09}, None),
        ({"EchoTime": "0.09", "RepetitionTime": None, "InversionTime": [1, 2]}, None),
        ({"EchoTime": float("nan"), "RepetitionTime": float("inf")}, None),
        ({}, None),
    ],
)
def test_physics_votes_by_rule_or_not_at_all(
    sidecar: dict[str, object], contrast: str | None
) -> None:
    found = vote_physics(sidecar)
    assert (found and found.contrast) == contrast


def test_milliseconds_are_read_as_such_and_said() -> None:
    found = vote_physics({"EchoTime": 95, "RepetitionTime": 9000, "InversionTime": 2500})
    assert found is not None
    assert found.contrast == "FLAIR"
    assert "milliseconds" in found.evidence
    sure = vote_physics({"EchoTime": 0.095, "RepetitionTime": 9.0, "InversionTime": 2.5})
    assert sure is not None
    assert found.confidence < sure.confidence


@pytest.mark.parametrize(
    ("agent", "contrast"), [("Gadovist", "T1wCE"), ("NONE", "T1w"), ("", "T1w"), ("n/a", "T1w")]
)
def test_an_agent_makes_t1w_contrast_enhanced(agent: str, contrast: str) -> None:
    sidecar = {"EchoTime": 0.0024, "InversionTime": 0.9, "ContrastBolusAgent": agent}
    verdict = combine_votes([vote_name("sub-1_T1w.nii.gz"), vote_physics(sidecar)])
    assert (verdict.contrast, verdict.is_disagreement) == (contrast, False)


def test_evidence_holds_known_tokens_and_numbers_only() -> None:
    texts = "JANE DOE^1966 t2_flair/axial <script>alert(1)</script> =cmd|x"
    found = vote_description(texts)
    assert found is not None
    assert (found.contrast, found.evidence) == ("FLAIR", "description token 't2_flair': FLAIR")
    sidecar = {"EchoTime": 0.09, "RepetitionTime": 4.0, "SequenceName": "tse_JaneDoe"}
    physics = vote_physics(sidecar)
    assert physics is not None
    assert physics.evidence == "physics: TE 0.09 s, TR 4 s, SE"


@pytest.mark.parametrize(
    ("text", "contrast"),
    [
        ("AX T1 SE/POST", "T1wCE"),
        ("Ax T2* GRE", "T2starw"),
        ("t1_mprage_sag_p2_iso", "T1w"),
        ("T1 FLAIR SAG", "T1w"),
        ("localizer", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
def test_descriptions(text: str, contrast: str | None) -> None:
    found = vote_description(text)
    assert (found and found.contrast) == contrast


def test_a_description_tells_what_is_no_input() -> None:
    assert guess_from_description("localizer_32ch").is_localizer
    assert guess_from_description("gre_field_mapping phase").is_phase
    assert guess_from_description("SWI mIP").is_derived


def test_name_alone_is_medium_and_agreement_is_high() -> None:
    alone = combine_votes([vote_name("flair.nii")])
    assert (alone.contrast, alone.confidence) == ("FLAIR", 0.7)
    assert confidence_level(alone.confidence) == "medium"
    both = combine_votes([vote_name("flair.nii"), vote("picture", "FLAIR", 0.85)])
    assert confidence_level(both.confidence) == "high"
    assert not both.is_disagreement


def test_picture_overrules_a_name_but_not_a_curated_suffix_and_both_are_flagged() -> None:
    picture = vote("picture", "FLAIR", 0.85)
    by_name = combine_votes([vote_name("t2.nii.gz"), picture])
    assert (by_name.contrast, by_name.is_disagreement) == ("FLAIR", True)
    curated = combine_votes([vote_stated("T2w", source="bids"), picture])
    assert (curated.contrast, curated.is_disagreement) == ("T2w", True)
    assert curated.confidence < 0.7
    outvoted = combine_votes(
        [vote_stated("T2w", source="bids"), picture, vote("physics", "FLAIR", 0.9)]
    )
    assert outvoted.contrast == "FLAIR"


def test_a_person_wins_and_a_mapping_over_a_table() -> None:
    others = [vote("picture", "FLAIR", 0.85), vote("physics", "FLAIR", 0.9)]
    table = vote_stated("t2", source="table")
    verdict = combine_votes([*others, table])
    assert (verdict.contrast, verdict.is_disagreement) == ("T2w", True)
    assert verdict.confidence == 0.9
    mapped = combine_votes([*others, table, vote_stated("FLAIR", source="mapping")])
    assert (mapped.contrast, mapped.votes[0].source) == ("FLAIR", "mapping")
    assert combine_votes([table]).confidence == 1.0


def test_equal_contradiction_is_unknown() -> None:
    verdict = combine_votes([vote("name", "T1w", 0.7), vote("description", "T2w", 0.7)])
    assert (verdict.contrast, verdict.is_disagreement) == ("unknown", True)
    assert verdict.confidence < 0.5
    assert combine_votes([]).contrast == "unknown"


def test_a_coarse_vote_supports_the_finer_one() -> None:
    verdict = combine_votes([vote("physics", "T2starw", 0.75), vote("name", "SWI", 0.7)])
    assert (verdict.contrast, verdict.is_disagreement) == ("SWI", False)
    assert verdict.confidence > 0.75


def test_order_of_votes_does_not_matter() -> None:
    votes = [vote("name", "T2w", 0.7), vote("picture", "FLAIR", 0.85), vote("bids", "T2w", 0.92)]
    verdicts = {combine_votes(order) for order in itertools.permutations(votes)}
    assert len(verdicts) == 1


def test_words_that_state_nothing_are_no_vote() -> None:
    assert vote_stated("FLAYR", source="table") is None
    assert vote_stated("unknown", source="mapping") is None
