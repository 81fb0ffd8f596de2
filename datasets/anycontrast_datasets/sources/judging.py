"""Judge what one read file shows: the votes of name, headers and picture, and why it is refused.

In: a claim, its sidecar, the voxels. Out: contrast, confidence, votes, flags and evidence, or a
reason code. Every vote is written down, also of volumes where all agree.
"""

from dataclasses import dataclass

from anycontrast_datasets.appearance import Appearance, check_appearance
from anycontrast_datasets.contrast import UNKNOWN
from anycontrast_datasets.contrast_votes import (
    NAME_CONFIDENCE,
    Verdict,
    combine_votes,
    guess_from_description,
    vote_description,
    vote_physics,
    vote_picture,
)
from anycontrast_datasets.sidecars import Sidecar
from anycontrast_datasets.sources.claims import FileClaim, refuse_untrainable
from anycontrast_datasets.study import ContrastVote
from anycontrast_datasets.volume import LoadedVolume
from anycontrast_datasets.work_copy import WorkCopy

DISAGREEMENT = "contrast_disagreement"

# Flag of the picture -> reason code.
_REFUSING_FLAGS = {
    "not_a_brain": "not_a_brain",
    "field_of_view_small": "field_of_view_small",
    "ct_like": "not_mri",
}
_ASKS_PICTURE = ("T2w", "FLAIR", "T1w", "T1wCE")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a volume shows, or why it is not used."""

    contrast: str = UNKNOWN
    confidence: float = 0.0
    votes: tuple[ContrastVote, ...] = ()
    flags: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    code: str = ""
    """Reason code; empty when the volume can be used."""
    reason: str = ""


def judge(
    claim: FileClaim,
    sidecar: Sidecar,
    loaded: LoadedVolume,
    copy: WorkCopy | None,
    *,
    keep_unknown: bool,
) -> Judgement:
    """Weigh everything that is known of a volume.

    Args:
        claim: with the votes of name, table or mapping.
        sidecar: physics and description.
        loaded: voxels on RAS+ axes.
        copy: of the voxels; None leaves the picture unasked.
        keep_unknown: a contrast that nothing tells is kept as `unknown`.
    """
    reading = claim.reading
    description = " ".join(part for part in (claim.description, sidecar.description) if part)
    if code := reading.code if reading.code != "unknown_contrast" else "":
        return Judgement(evidence=reading.evidence, code=code, reason=reading.reason)
    if reason := _refused_by_description(claim, description):
        return Judgement(code=reason[0], reason=reason[1])
    votes = (*_claimed_votes(claim), vote_description(description), vote_physics(sidecar.values))
    if claim.is_stated and reading.code:
        votes = ()
    seen = Appearance() if copy is None else _look(loaded, copy, combine_votes(votes))
    verdict = combine_votes((*votes, vote_picture(seen)))
    clauses = [
        *reading.evidence,
        *(v.evidence for v in verdict.votes if v.source not in ("picture", "bids", "name")),
        *seen.evidence,
    ]
    judgement = Judgement(
        contrast=verdict.contrast,
        confidence=verdict.confidence,
        votes=verdict.votes,
        flags=(*seen.flags, *((DISAGREEMENT,) if verdict.is_disagreement else ())),
        evidence=tuple(dict.fromkeys(clause for clause in clauses if clause)),
    )
    return _with_reason(judgement, reading.reason, keep_unknown=keep_unknown)


def _with_reason(judgement: Judgement, reading_reason: str, *, keep_unknown: bool) -> Judgement:
    said = "; ".join(judgement.evidence)
    code, reason = refuse_untrainable(judgement.contrast)
    if told := [flag for flag in _REFUSING_FLAGS if flag in judgement.flags]:
        code, reason = _REFUSING_FLAGS[told[0]], f"by its picture ({told[0]}): {said}"
    elif code:
        reason = f"{reason} ({said})"
    elif judgement.contrast == UNKNOWN and not keep_unknown:
        code = "unknown_contrast"
        reason = reading_reason or f"the votes do not settle it ({said})"
    if not code:
        return judgement
    return Judgement(
        contrast=judgement.contrast,
        confidence=judgement.confidence,
        votes=judgement.votes,
        flags=judgement.flags,
        evidence=judgement.evidence,
        code=code,
        reason=reason,
    )


def _claimed_votes(claim: FileClaim) -> tuple[ContrastVote, ...]:
    """The votes of a claim; a source that only names a contrast is taken for a name."""
    reading = claim.reading
    has_headers = claim.sidecar is not None or claim.description
    if reading.votes or reading.contrast == UNKNOWN or has_headers:
        return reading.votes
    evidence = "; ".join(reading.evidence)
    return (
        ContrastVote(
            source="table" if claim.is_stated else "name",
            contrast=reading.contrast,
            confidence=NAME_CONFIDENCE,
            evidence=evidence,
        ),
    )


def _refused_by_description(claim: FileClaim, description: str) -> tuple[str, str] | None:
    """A description may tell a phase image or a localizer where the contrast is only guessed."""
    if not description or any(
        v.source in ("mapping", "table", "bids") for v in claim.reading.votes
    ):
        return None
    guess = guess_from_description(description)
    said = "; ".join(guess.evidence)
    if guess.is_phase:
        return "phase_image", f"a phase image ({said})"
    if guess.is_localizer or guess.is_derived:
        return "not_trainable", f"not learned from ({said})"
    return None


def _look(loaded: LoadedVolume, copy: WorkCopy, so_far: Verdict) -> Appearance:
    """Ask the picture; its tests depend on what the volume is said to be."""
    said = [vote.contrast for vote in so_far.votes]
    asked = next((name for name in _ASKS_PICTURE if name in said), so_far.contrast)
    return check_appearance(loaded.array, loaded.affine, loaded.spacing_mm, asked, copy)
