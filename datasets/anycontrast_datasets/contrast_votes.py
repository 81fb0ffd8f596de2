"""Votes on what a volume shows, and the verdict over them.

In: what a person stated, a file name, a series description, sidecar physics, a picture: one
`ContrastVote` each. Out: a `Verdict` with a confidence, and whether the votes contradict. What a
person wrote into a mapping or a table wins; the other votes are weighed as odds. No text of a
header reaches the evidence, only words of the vocabulary and numbers.

Source: reference/data.md, section 4, "How labels are inferred in practice".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anycontrast_datasets.contrast import UNKNOWN, UnknownContrastError, resolve_contrast
from anycontrast_datasets.contrast_physics import vote_physics
from anycontrast_datasets.name_guess import ContrastGuess, guess_from_name
from anycontrast_datasets.study import ContrastVote

if TYPE_CHECKING:
    from anycontrast_datasets.appearance import Appearance

__all__ = [
    "MIN_CONFIDENCE",
    "Verdict",
    "combine_votes",
    "confidence_level",
    "guess_from_description",
    "vote_description",
    "vote_name",
    "vote_physics",
    "vote_picture",
    "vote_stated",
]

MIN_CONFIDENCE = 0.5
"""Below, the verdict is `unknown`."""
HIGH_CONFIDENCE = 0.85
MEDIUM_CONFIDENCE = 0.65

STATED_CONFIDENCE = {"mapping": 1.0, "table": 1.0, "bids": 0.92}
"""Of a contrast that somebody wrote down on purpose, by where."""
NAME_CONFIDENCE = 0.7
DESCRIPTION_CONFIDENCE = 0.75
PICTURE_CONFIDENCE = 0.85

_PERSONS = ("mapping", "table")
_CONTESTED_PERSON = 0.9
_MAX_CONFIDENCE = 0.999
# A vote for the first does not contradict the others: it is the same acquisition said less finely.
_COVERS: dict[str, frozenset[str]] = {
    "T1w": frozenset({"T1wCE"}),
    "T2w": frozenset({"b0"}),
    "DWI": frozenset({"ADC", "FA", "colFA", "b0"}),
    "b0": frozenset({"ADC", "FA", "colFA"}),
    "GRE": frozenset({"T2starw", "SWI", "phase"}),
    "T2starw": frozenset({"GRE", "SWI", "phase"}),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a volume shows after all votes."""

    contrast: str
    """Vocabulary name; `unknown` without votes or below `MIN_CONFIDENCE`."""
    confidence: float
    """Of `contrast`; of the best candidate when `contrast` is `unknown`."""
    votes: tuple[ContrastVote, ...]
    """Strongest first."""
    is_disagreement: bool
    """A vote contradicts the one that won."""


def vote_stated(text: str, *, source: str) -> ContrastVote | None:
    """Return the vote of a contrast written down on purpose, None when it is no known contrast.

    Args:
        text: name or synonym.
        source: `mapping`, `table` or `bids`.
    """
    try:
        contrast = resolve_contrast(text)
    except UnknownContrastError:
        return None
    if contrast == UNKNOWN:
        return None
    return ContrastVote(
        source=source,
        contrast=contrast,
        confidence=STATED_CONFIDENCE[source],
        evidence=f"{source}: {contrast}",
    )


def vote_name(filename: str) -> ContrastVote | None:
    """Return what a file name says; folders in front of it do not count."""
    return _vote_guess(guess_from_name(filename), "name", NAME_CONFIDENCE)


def vote_description(text: str) -> ContrastVote | None:
    """Return what a series description or protocol name says; only its known tokens are kept."""
    return _vote_guess(guess_from_description(text), "description", DESCRIPTION_CONFIDENCE)


def guess_from_description(text: str) -> ContrastGuess:
    """Read a series description as a file name is read; slashes and dots part words in it."""
    guess = guess_from_name(text.replace("/", " ").replace("\\", " ").replace(".", " ")[:200])
    evidence = tuple(c.replace("file name token", "description token") for c in guess.evidence)
    return ContrastGuess(**{**vars(guess), "evidence": evidence})


def vote_picture(appearance: "Appearance") -> ContrastVote | None:
    """Return what the picture says, None when its tests were not asked or not sure."""
    if appearance.contrast is None:
        return None
    return ContrastVote(
        source="picture",
        contrast=appearance.contrast,
        confidence=PICTURE_CONFIDENCE,
        evidence="; ".join(appearance.evidence),
    )


def combine_votes(votes: Iterable[ContrastVote | None]) -> Verdict:
    """Weigh votes; the order they come in does not matter.

    A person's vote wins (`mapping` before `table`). Otherwise every vote counts with its odds
    `c / (1 - c)`, votes for one contrast multiply, a coarse vote (T1w) supports a finer one
    (T1wCE) that has a vote of its own, and the confidence is the winner's share of all odds.
    """
    cast = sorted(
        (vote for vote in votes if vote is not None and vote.contrast != UNKNOWN),
        key=lambda v: (-v.confidence, v.source, v.contrast, v.evidence),
    )
    persons = [v for source in _PERSONS for v in cast if v.source == source]
    if persons:
        winner = persons[0].contrast
        contested = any(not _agrees(vote, winner) for vote in cast)
        confidence = _CONTESTED_PERSON if contested else 1.0
    elif cast:
        winner, confidence = _weigh(cast)
        contested = any(not _agrees(vote, winner) for vote in cast)
    else:
        return Verdict(contrast=UNKNOWN, confidence=0.0, votes=(), is_disagreement=False)
    ordered = (*persons, *(vote for vote in cast if vote not in persons))
    return Verdict(
        contrast=winner if confidence >= MIN_CONFIDENCE else UNKNOWN,
        confidence=round(confidence, 4),
        votes=ordered,
        is_disagreement=contested,
    )


def confidence_level(confidence: float) -> str:
    """Return `high`, `medium` or `low`, for counting."""
    if confidence >= HIGH_CONFIDENCE:
        return "high"
    return "medium" if confidence >= MEDIUM_CONFIDENCE else "low"


def _vote_guess(guess: ContrastGuess, source: str, confidence: float) -> ContrastVote | None:
    if guess.contrast is None:
        return None
    return ContrastVote(
        source=source,
        contrast=guess.contrast,
        confidence=confidence,
        evidence="; ".join(guess.evidence),
    )


def _agrees(vote: ContrastVote, winner: str) -> bool:
    return vote.contrast == winner or winner in _COVERS.get(vote.contrast, ())


def _weigh(votes: list[ContrastVote]) -> tuple[str, float]:
    """Return the contrast with the largest odds and its share of all odds, `none of them` = 1."""
    candidates = sorted({vote.contrast for vote in votes})
    odds = {
        name: math.prod(_odds(vote.confidence) for vote in votes if _agrees(vote, name))
        for name in candidates
    }
    winner = max(candidates, key=lambda name: (odds[name], name))
    rivals = sum(odds[n] for n in candidates if n != winner and winner not in _COVERS.get(n, ()))
    return winner, odds[winner] / (1 + odds[winner] + rivals)


def _odds(confidence: float) -> float:
    bounded = min(confidence, _MAX_CONFIDENCE)
    return bounded / (1 - bounded)
