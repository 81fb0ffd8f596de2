"""What the physics of an acquisition says about its contrast: a vote from sidecar values.

In: the keys of a BIDS sidecar (times in seconds; milliseconds are recognised). Out: one vote with
the values that led to it, or None. The rules stay silent where vendors differ: TR alone decides
nothing, a gradient echo outside the known windows has no vote (T1w, angiography and field maps
share its values), and a long echo of an unknown sequence has none either (it may be diffusion).

Source: reference/data.md, section 4, rule 3; BIDS specification 1.10 (units).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from anycontrast_datasets.contrast import stated_agent
from anycontrast_datasets.sidecars import TIME_LIMITS_S, in_seconds
from anycontrast_datasets.study import ContrastVote

FLAIR_TI_S = (1.5, 3.2)
"""Inversion times that null fluid, 1.5 T to 3 T, 2D and 3D."""
LONG_TE_S = 0.07
"""Above: T2w and FLAIR of spin echoes."""
LONG_TR_S = 2.0
"""Above: little T1 weighting of a spin echo."""
T1_TI_S = (0.5, 1.35)
"""Inversion times of MPRAGE and T1 FLAIR."""
MPRAGE_TE_S = 0.006
"""Below: the echo of a prepared gradient echo, T1w."""
T1_FLAIR_TE_S = 0.03
SHORT_SE_TE_S = 0.025
"""Below: T1w or PDw of a spin echo."""
LONGEST_PD_TE_S = 0.04
T1_SE_TR_S = 0.9
"""Below: T1w of a spin echo."""
T2STAR_TE_S = (0.012, 0.045)
"""Echo times of gradient echoes made for susceptibility."""
MIN_DIFFUSION_B = 50.0
"""s/mm^2; below counts as b = 0."""

_SEQUENCE_KEYS = ("ScanningSequence", "SequenceVariant", "SequenceName", "PulseSequenceName")
# ImageType token -> contrast; only tokens that scanners write for one thing.
_IMAGE_TYPES = {
    "ADC": "ADC",
    "TRACEW": "DWI",
    "TRACE": "DWI",
    "ISOTROPIC": "DWI",
    "FA": "FA",
    "SWI": "SWI",
    "CBF": "CBF",
    "RELCBF": "CBF",
    "PHASE": "phase",
    "P": "phase",
}
_IMAGE_TYPE_CONFIDENCE = 0.9


@dataclass(frozen=True, kw_only=True)
class Physics:
    """The values of one sidecar that the rules read; None or empty means not known."""

    te_s: float | None = None
    tr_s: float | None = None
    ti_s: float | None = None
    flip_deg: float | None = None
    b_value: float | None = None
    sequence: str = ""
    """`SE`, `GR`, `EP` (echo planar, any preparation) or empty."""
    has_agent: bool | None = None
    """None: not stated. Staff type the tag in, so a missing one says nothing."""
    image_type: tuple[str, ...] = ()
    in_milliseconds: bool = False
    """The times stood in milliseconds and were converted."""

    def evidence(self) -> str:
        """The known values as one clause, e.g. `TE 0.09 s, TR 9 s, TI 2.5 s, SE`."""
        named = (("TE", self.te_s), ("TR", self.tr_s), ("TI", self.ti_s))
        parts = [f"{name} {value:.4g} s" for name, value in named if value is not None]
        if self.flip_deg is not None:
            parts.append(f"flip {self.flip_deg:.3g} deg")
        if self.b_value is not None:
            parts.append(f"b {self.b_value:.4g} s/mm^2")
        parts += [self.sequence] if self.sequence else []
        parts += ["contrast agent stated"] if self.has_agent else []
        parts += ["times read as milliseconds"] if self.in_milliseconds else []
        return ", ".join(parts)


def read_physics(sidecar: Mapping[str, object]) -> Physics:
    """Take what the rules need out of a sidecar; what is not a plausible number is left out."""
    sidecar, is_ms = in_seconds(sidecar)
    te, tr, ti = (_within(_number(sidecar.get(key)), limit) for key, limit in TIME_LIMITS_S)
    return Physics(
        te_s=te,
        tr_s=tr,
        ti_s=ti or None,
        flip_deg=_within(_number(sidecar.get("FlipAngle")), 360.0),
        b_value=_b_value(sidecar),
        sequence=_sequence(sidecar),
        has_agent=stated_agent(sidecar),
        image_type=_tokens(sidecar.get("ImageType")),
        in_milliseconds=is_ms,
    )


def vote_physics(sidecar: Mapping[str, object]) -> ContrastVote | None:
    """Return what the acquisition says, None where the rules do not decide.

    Args:
        sidecar: BIDS keys; only those the rules know are read, and only numbers and vocabulary
            words of them reach the evidence.
    """
    physics = read_physics(sidecar)
    for token in physics.image_type:
        if token in _IMAGE_TYPES:
            contrast = _IMAGE_TYPES[token]
            return _vote(contrast, _IMAGE_TYPE_CONFIDENCE, f"ImageType {token}")
    ruled = _rule(physics)
    if ruled is None:
        return None
    contrast, confidence = ruled
    if contrast == "T1w" and physics.has_agent:
        contrast, confidence = "T1wCE", min(confidence, 0.8)
    if physics.in_milliseconds:
        confidence = round(0.9 * confidence, 3)
    return _vote(contrast, confidence, physics.evidence())


def _vote(contrast: str, confidence: float, evidence: str) -> ContrastVote:
    return ContrastVote(
        source="physics", contrast=contrast, confidence=confidence, evidence=f"physics: {evidence}"
    )


def _rule(p: Physics) -> tuple[str, float] | None:
    """The first rule that holds; FLAIR before diffusion, which it has been taken for."""
    te, ti = p.te_s, p.ti_s
    if te is None:
        return ("DWI", 0.8) if p.b_value and p.b_value >= MIN_DIFFUSION_B else None
    if p.sequence != "EP" and ti is not None and _between(ti, FLAIR_TI_S) and te > LONG_TE_S:
        return "FLAIR", 0.9
    if p.b_value is not None and p.sequence in ("EP", ""):
        return ("DWI", 0.85) if p.b_value >= MIN_DIFFUSION_B else ("b0", 0.7)
    if p.sequence == "EP":
        return None
    if ti is not None and _between(ti, T1_TI_S):
        if te < MPRAGE_TE_S:
            return "T1w", 0.9
        if te < T1_FLAIR_TE_S:
            return "T1w", 0.8
    if p.sequence == "GR" and _between(te, T2STAR_TE_S):
        return "T2starw", 0.75
    return _rule_spin_echo(p, te) if p.sequence == "SE" and ti is None else None


def _rule_spin_echo(p: Physics, te: float) -> tuple[str, float] | None:
    if p.tr_s is None:
        return None
    if te > LONG_TE_S and p.tr_s > LONG_TR_S:
        return "T2w", 0.85
    if te < SHORT_SE_TE_S and p.tr_s < T1_SE_TR_S:
        return "T1w", 0.8
    if te < LONGEST_PD_TE_S and p.tr_s > LONG_TR_S:
        return "PDw", 0.7
    return None


def _between(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _within(value: float | None, largest: float) -> float | None:
    return value if value is not None and 0 <= value <= largest else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float(value)
    return number if math.isfinite(number) and number >= 0 else None


def _b_value(sidecar: Mapping[str, object]) -> float | None:
    for key in ("DiffusionBValue", "b_value"):
        value = _within(_number(sidecar.get(key)), 50000.0)
        if value is not None:
            return value
    match = re.search(r"ep_?b(\d{1,5})", str(sidecar.get("SequenceName", "")).lower())
    return float(match[1]) if match else None


def _tokens(value: object) -> tuple[str, ...]:
    parts = value if isinstance(value, list | tuple) else re.split(r"[\\/_ ,]+", str(value or ""))
    return tuple(part.strip().upper() for part in parts if isinstance(part, str))


def _sequence(sidecar: Mapping[str, object]) -> str:
    """Sequence family from ScanningSequence, else from the known stems of sequence names."""
    tokens = {t for key in _SEQUENCE_KEYS[:2] for t in _tokens(sidecar.get(key))}
    name = " ".join(str(sidecar.get(key, "")).lower() for key in _SEQUENCE_KEYS[2:])
    if "EP" in tokens or re.search(r"(?<![a-z])(?:ep2d|ep3d|epi|epfid|epse|ep_)", name):
        return "EP"
    if "SE" in tokens or re.search(r"(?<![a-z])(?:tse|se\d|fse|spc|haste|tir)", name):
        return "SE"
    if "GR" in tokens or re.search(r"(?<![a-z])(?:tfl|fl[23]d|fl_|swi|gre|spgr|ffe|bravo)", name):
        return "GR"
    return ""
