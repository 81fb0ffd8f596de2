"""Guess the contrast of a volume from its file name; always with the token that led to the guess.

A guess is one vote: the sidecar and the picture (`appearance`) may disagree. The narrower pattern
goes first: T2* before T2, FLAIR before T2, while a T1 FLAIR stays T1. Evidence holds only the
matched token, because the rest of a file name may identify somebody.

Source: names as in BIDS, BraTS, ISLES and scanner series descriptions; order and vetoes from
reference/data.md, section 4.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ContrastGuess:
    """What a file name says. `contrast` is None when it says nothing, or contradicts itself."""

    contrast: str | None = None
    evidence: tuple[str, ...] = ()
    """One clause per matched token; holds only the token, never the rest of the name."""
    not_mri: bool = False
    is_phase: bool = False
    is_derived: bool = False
    """A map or projection that is not in the vocabulary as an input (colour FA, MIP, MD, ...)."""
    is_mask: bool = False
    """A label or mask; `contrast` is None then."""
    is_localizer: bool = False


def _pattern(alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z0-9])(?:{alternatives})(?![a-z0-9])")


# Entities whose value is free text (a subject called "ct01") or names another image.
_FREE_ENTITIES = re.compile(r"(?<![a-z0-9])(?:sub|ses|space|run|from|to)-[a-z0-9]+")
_EXTENSION = re.compile(r"\.(?:nii|nii\.gz|hdr|img|img\.gz|mgh|mgz|nrrd|dcm|json)$")

_MASK = _pattern(
    "(?:brain_?|lesion_?|deface_?)?(?:masks?|msk)|seg|segs|segmentation|[dp]seg|probseg|labels?|"
    "lesions?(?!_filled)|roi|aseg|parc|aparc\\+aseg|gold_standard|groundtruth|gt"
)
_NOT_MRI = _pattern("ct|sc?ct|ncct|cect|cta|ctp|ct_?brain|ct_?head|pet|fdg")
_LOCALIZER = _pattern("localizers?|localisers?|scout|survey|smartbrain|3_?plane(?:_?loc)?|loc")
_DERIVED = _pattern(
    "mip|min_?ip|mnip|md|rd|(?:t1|t2|t2star|t2\\*|r1|r2|r2star|r2\\*)_?map|qsm|subtraction|"
    "cbv|mtt|ttp|tmax|eadc|jacobian|tsnr|sbref_diff"
)
_T1 = _pattern(
    "t1(?:w|wi|n)?|t1_?weighted|(?:t1_?)?(?:mp_?rage|bravo|f?spgr|tfl)|t1_?flair|anatt1w?"
)
_T2 = _pattern("t2(?:w|wi)?|t2_?weighted|t2_?(?:tse|fse|space|cube|haste|blade|propeller)")
_FLAIR = _pattern("t2w?_?f(?:lair)?|(?:3d_?)?flair(?:w|_?3d)?|dark_?fluid")
_AGENT = _pattern(
    "ce|post(?:_?contrast)?|contrast|c|km|\\+c|gd|gad|gado|gadolinium|gadovist|enhanced"
)
_NO_AGENT = _pattern("pre|pre_?contrast|no_?contrast|non_?contrast|without|unenhanced|native")
_T1CE = _pattern(
    "t1w?_?(?:ce|c|cw|post|gd|gad|gado|km|contrast|\\+c)|(?:ce|gd|post)_?t1w?|t1w?_?post_?contrast"
)
_T2STAR = _pattern("t2_?(?:star|\\*)w?(?:_?gre)?|t2\\*wi|t2s|t2w?_(?:fl2d|gre|ffe|hemo)(?:_hemo)?")
_HIGH_B = _pattern("b_?[1-9][0-9]{2,3}")

# First match wins; what comes earlier is the narrower claim.
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("CBF", _pattern("r?(?:rel)?cbf|p?c?asl")),
    ("ADC", _pattern("adc(?:_?map)?")),
    ("FA", _pattern("fa|fa_?map|fractional_anisotropy")),
    ("b0", _pattern("b_?0+|nodif|b=0")),
    ("SWI", _pattern("swi|swan|swip|susceptibility")),
    ("T2starw", _T2STAR),
    ("DWI", _pattern("dwi|trace|tracew|isodwi|b_?[1-9][0-9]{2,3}|(?:ep2d_)?diff|diffusion")),
)
_LATE_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("PDw", _pattern("pd(?:w|wi)?|proton_?density")),
    ("T2w", _T2),
    ("T1w", _T1),
    ("GRE", _pattern("gre|fl2d|fl3d|flash|gradient_?echo|fgre|ffe|magnitude[12]?")),
)
_PHASE = _pattern("phase(?:diff|[12])?|(?<=_)ph|(?<=_)pha")
_COLOUR_FA = _pattern("col_?fa|cfa|colou?r_?fa|fa_?(?:col|colou?r|rgb)|tensor_rgb")


def _clean(filename: str) -> str:
    """Lower-case base name, without extension and free entities, separators as one `_`."""
    name = re.split(r"[\\/]", filename.lower())[-1]
    while (shorter := _EXTENSION.sub("", name.removesuffix(".gz"))) != name:
        name = shorter
    name = _FREE_ENTITIES.sub("", name)
    name = re.sub(r"\+(?!c\b|aseg)", "_", name)
    return re.sub(r"[^a-z0-9*+=]+", "_", name).strip("_")


def _clause(what: str, match: re.Match[str]) -> str:
    return f"file name token {match.group()!r}: {what}"


def guess_from_name(filename: str) -> ContrastGuess:
    """Guess the contrast from the tokens of a file name (or a series description).

    Folders in front of the name and the BIDS entities `sub-`, `ses-`, `space-` do not count.
    """
    name = _clean(filename)
    if match := _MASK.search(name):
        return ContrastGuess(evidence=(_clause("mask or label", match),), is_mask=True)
    if match := _LOCALIZER.search(name):
        return ContrastGuess(evidence=(_clause("localizer", match),), is_localizer=True)
    if match := _NOT_MRI.search(name):
        return ContrastGuess(evidence=(_clause("not MRI", match),), not_mri=True)
    if match := _COLOUR_FA.search(name):
        evidence = (_clause("colour FA map", match),)
        return ContrastGuess(contrast="colFA", evidence=evidence, is_derived=True)
    if match := _PHASE.search(name):
        return ContrastGuess(
            contrast="phase", evidence=(_clause("phase image", match),), is_phase=True
        )
    if match := _DERIVED.search(name):
        return ContrastGuess(evidence=(_clause("derived map", match),), is_derived=True)
    return _guess_weighting(name)


def _guess_weighting(name: str) -> ContrastGuess:
    for contrast, pattern in _RULES:
        match = pattern.search(name)
        if match and not (contrast == "b0" and _HIGH_B.search(name)):
            return ContrastGuess(contrast=contrast, evidence=(_clause(contrast, match),))
    flair, t1, t2 = _FLAIR.search(name), _T1.search(name), _T2.search(name)
    t1ce = None if _NO_AGENT.search(name) else _T1CE.search(name)
    if t1 and not t1ce and not _NO_AGENT.search(name):
        t1ce = _AGENT.search(name)
    if flair and not ((t1 or t1ce) and not t2):
        return ContrastGuess(contrast="FLAIR", evidence=(_clause("FLAIR", flair),))
    if t1ce and not t2:
        return ContrastGuess(contrast="T1wCE", evidence=(_clause("T1wCE", t1ce),))
    if t1 and t2:
        evidence = (_clause("T1w", t1), _clause("T2w, contradicts", t2))
        return ContrastGuess(evidence=evidence)
    for contrast, pattern in _LATE_RULES:
        if match := pattern.search(name):
            return ContrastGuess(contrast=contrast, evidence=(_clause(contrast, match),))
    return ContrastGuess()
