"""What a source says about one file, before the file is opened.

A source turns each file of its layout into a claim (subject, session, contrast or label) or a
refusal; `grouping` opens the files and makes studies of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from anycontrast_datasets.contrast import (
    UNKNOWN,
    UnknownContrastError,
    contrast_entry,
    guess_from_name,
    resolve_contrast,
)
from anycontrast_datasets.contrast_votes import STATED_CONFIDENCE, vote_name
from anycontrast_datasets.pseudonym import Naming
from anycontrast_datasets.study import ContrastVote


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What every source needs to know beside its root."""

    dataset: str
    naming: Naming
    contrasts: tuple[str, ...] = ()
    """Keep only these vocabulary names; empty keeps all."""
    unknown_contrast: Literal["refuse", "keep"] = "refuse"
    check_pictures: bool = True
    max_bytes: int = 2 * 2**30
    """Largest decoded size of one file."""
    num_threads: int = 2
    faces: Literal["refuse", "flag", "allow"] = "refuse"
    """What happens to a structural volume with a face, or of which that is not known."""
    is_synthetic: bool = False
    """Nobody was scanned: faces do not matter."""
    decisions: Mapping[str, str] = field(default_factory=dict)
    """Location -> vocabulary name or `refuse`: what a person wrote into the mapping table."""
    withdrawn: frozenset[str] = frozenset()
    """Pseudonyms of subjects whose files must not be used."""
    cache_file: Path | None = None
    """Where outcomes of earlier scans are kept; None reads every file."""
    reuse_outcomes: bool = True
    """False: read every file again, and write `cache_file` anew."""
    on_progress: Callable[[int, int], None] | None = None
    """Called with (files done, files in all)."""


@dataclass(frozen=True)
class ContrastReading:
    """What a text says about a contrast: a name, or why the file cannot be used."""

    contrast: str = UNKNOWN
    evidence: tuple[str, ...] = ()
    code: str = ""
    """Reason code; empty when the file may be used."""
    reason: str = ""
    is_mask: bool = False
    votes: tuple[ContrastVote, ...] = ()
    """What the text said, for the verdict."""


# Where a contrast was written down -> source of the vote.
_STATED_AT = {
    "mapping": "mapping",
    "table": "table",
    "BIDS suffix": "bids",
    "BIDS suffix and entity ce": "bids",
    "BraTS token": "bids",
}


@dataclass(frozen=True, kw_only=True)
class FileClaim:
    """One file, and what its name, folder or table row says it is."""

    location: str
    """Relative to the root."""
    subject: str = field(repr=False)
    session: str = field(repr=False)
    reading: ContrastReading = ContrastReading()
    """Not used for labels."""
    is_label: bool = False
    is_stated: bool = False
    """A person stated the contrast in a table: the picture may disagree but does not overrule."""
    sidecar: Mapping[str, object] | None = field(default=None, repr=False)
    """Physics with the keys and units of a BIDS sidecar, from elsewhere than a JSON file beside
    the image; None reads that file."""
    description: str = field(default="", repr=False)
    """Free text on the series, for the vote on the contrast only: it may identify somebody."""
    site: str = ""
    """Keyed pseudonym of institution and scanner; empty when not known."""
    source_files: tuple[str, ...] = field(default=(), repr=False)
    """Input files that a converted volume stands for, relative to the root; empty: itself."""


def read_stated(text: str, *, where: str) -> ContrastReading:
    """Read a contrast that somebody wrote down on purpose: a BIDS suffix, a table cell.

    Args:
        text: The name or a synonym.
        where: `mapping`, `table`, `BIDS suffix` or `BraTS token`; goes into the evidence.
    """
    try:
        contrast = resolve_contrast(text)
    except UnknownContrastError as error:
        hint = read_name(text)
        if hint.code and hint.code != "unknown_contrast":
            return hint
        reason = f"{where} {text!r} is not a known contrast; nearest is {error.nearest}"
        return ContrastReading(code="unknown_contrast", reason=reason, is_mask=hint.is_mask)
    source = _STATED_AT[where]
    evidence = f"{where}: {contrast}"
    vote = ContrastVote(
        source=source,
        contrast=contrast,
        confidence=STATED_CONFIDENCE[source],
        evidence=evidence,
    )
    return _usable(contrast, (evidence,), (vote,))


def read_name(filename: str) -> ContrastReading:
    """Guess a contrast from a file name."""
    guess = guess_from_name(filename)
    evidence = guess.evidence
    said = "; ".join(evidence)
    if guess.is_mask:
        return ContrastReading(evidence=evidence, is_mask=True)
    if guess.not_mri:
        return ContrastReading(code="not_mri", reason=f"not MRI ({said})")
    if guess.is_phase:
        return ContrastReading(code="phase_image", reason=f"a phase image ({said})")
    if guess.is_localizer or guess.is_derived:
        return ContrastReading(code="not_trainable", reason=f"not learned from ({said})")
    if guess.contrast is None:
        reason = f"contradicting tokens ({said})" if said else "the name says no contrast"
        return ContrastReading(code="unknown_contrast", reason=reason)
    vote = vote_name(filename)
    return _usable(guess.contrast, evidence, () if vote is None else (vote,))


def refuse_untrainable(contrast: str) -> tuple[str, str]:
    """Return reason code and reason of a contrast that is not learned from, blanks otherwise."""
    entry = contrast_entry(contrast)
    if contrast == UNKNOWN or entry.trainable:
        return "", ""
    code = "phase_image" if entry.family == "phase" else "not_trainable"
    return code, f"{contrast} is not learned from"


def _usable(
    contrast: str, evidence: tuple[str, ...], votes: tuple[ContrastVote, ...]
) -> ContrastReading:
    if contrast == UNKNOWN:
        return ContrastReading(UNKNOWN, evidence, "unknown_contrast", "stated as unknown")
    code, reason = refuse_untrainable(contrast)
    return ContrastReading(contrast, evidence, code, reason, votes=votes)
