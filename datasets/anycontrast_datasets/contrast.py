"""What a volume shows: the controlled vocabulary, synonyms met in the wild, and the physics.

A contrast is an id (a row of the model's embedding) *and* a descriptor (what is known of the
acquisition, each value with a "known" bit). Names follow BIDS suffixes where BIDS has one. Ids are
append-only: a name keeps its id for ever, because released weights index by it.

Reading a contrast off a file name is in `name_guess` (offered here too), what the picture itself
says in `appearance`. Nothing here reads a file.

Source: BIDS specification 1.10, MRI suffixes.
"""

import difflib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.name_guess import ContrastGuess, guess_from_name

__all__ = [
    "CONTRAST_NAMES",
    "DESCRIPTOR_SIZE",
    "FAMILIES",
    "NUM_CONTRAST_IDS",
    "UNKNOWN",
    "VOCABULARY",
    "ContrastDescriptor",
    "ContrastEntry",
    "ContrastGuess",
    "UnknownContrastError",
    "contrast_entry",
    "contrast_id",
    "contrast_name",
    "guess_from_name",
    "resolve_contrast",
    "stated_agent",
]

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
NUM_CONTRAST_IDS = 64
"""Embedding rows reserved for contrasts; more than the vocabulary so that it can grow."""

FAMILIES = (
    "t1",
    "t2",
    "flair",
    "pd",
    "diffusion",
    "diffusion_map",
    "t2star",
    "susceptibility",
    "perfusion",
    "phase",
)
"""Weighting families, append-only: the place in this tuple is a place in the vector."""
_FAMILY_SLOTS = 16


class UnknownContrastError(ValueError):
    """A contrast name is not in the vocabulary. `nearest` is the closest name that is."""

    def __init__(self, text: str, nearest: str) -> None:
        super().__init__(
            f"resolving a contrast: {text!r} is not in the vocabulary and no known synonym; "
            f"nearest is {nearest!r}; known names: {', '.join(CONTRAST_NAMES)}"
        )
        self.nearest = nearest


@dataclass(frozen=True, kw_only=True)
class ContrastEntry:
    """One row of the vocabulary."""

    name: str
    id: int
    family: str | None
    bids_suffix: str | None
    """None where BIDS has no suffix for it."""
    synonyms: tuple[str, ...] = ()
    """Other spellings, lower case, without separators (`*` and `+` are letters here)."""
    trainable: bool = True
    """False: recognised, so that it can be refused with a reason, never trained on."""


def _entry(
    name: str, id_: int, family: str | None, suffix: str | None, synonyms: str, *, ok: bool = True
) -> ContrastEntry:
    return ContrastEntry(
        name=name,
        id=id_,
        family=family,
        bids_suffix=suffix,
        synonyms=tuple(synonyms.split()),
        trainable=ok,
    )


VOCABULARY: tuple[ContrastEntry, ...] = (
    _entry(UNKNOWN, 0, None, None, "other unlabeled unlabelled"),
    _entry("T1w", 1, "t1", "T1w", "t1 t1n t1wi t1weighted mprage t1mprage t1flair t1pre bravo"),
    _entry(
        "T1wCE",
        2,
        "t1",
        "T1w",
        "t1ce t1c t1+c t1w+c t1wc t1post t1gd t1gad t1km cet1 cet1w t1wgd t1wpost t1cw gdt1 "
        "t1contrast postt1 t1postcontrast",
    ),
    _entry("T2w", 3, "t2", "T2w", "t2 t2wi t2weighted t2tse t2fse"),
    _entry("PDw", 4, "pd", "PDw", "pd pdwi protondensity pdweighted"),
    _entry("FLAIR", 5, "flair", "FLAIR", "fl t2f t2flair t2wflair flairw darkfluid t2darkfluid"),
    _entry("DWI", 6, "diffusion", "dwi", "trace tracew dwitrace dwib1000 isodwi diffusion"),
    _entry("ADC", 7, "diffusion_map", "ADC", "adcmap dwiadc apparentdiffusioncoefficient"),
    _entry("GRE", 8, "t2star", None, "gradientecho gremagnitude fl2d flash"),
    _entry("SWI", 9, "susceptibility", None, "swan susceptibility venobold"),
    _entry("T2starw", 10, "t2star", "T2starw", "t2* t2*w t2star t2s t2*wi t2*gre t2stargre"),
    _entry("FA", 11, "diffusion_map", None, "famap fractionalanisotropy dwifa dtifa"),
    _entry("b0", 12, "t2", None, "dwib0 b=0 nodif dtib0"),
    _entry("CBF", 13, "perfusion", None, "asl relcbf rcbf pcasl pasl aslcbf"),
    _entry("phase", 14, "phase", "phase", "ph phasediff grephase swiphase", ok=False),
    _entry("colFA", 15, "diffusion_map", None, "cfa colorfa colourfa facolor facolour", ok=False),
)

CONTRAST_NAMES: tuple[str, ...] = tuple(entry.name for entry in VOCABULARY)
_BY_NAME = {entry.name: entry for entry in VOCABULARY}
_BY_ID = {entry.id: entry for entry in VOCABULARY}
_BY_KEY = {entry.name.lower(): entry.name for entry in VOCABULARY} | {
    synonym: entry.name for entry in VOCABULARY for synonym in entry.synonyms
}


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9*+=]", "", text.lower())


def _nearest(text: str) -> str:
    close = difflib.get_close_matches(_key(text), _BY_KEY, n=1, cutoff=0.0)
    return _BY_KEY[close[0]] if close else UNKNOWN


def contrast_entry(name: str) -> ContrastEntry:
    """Return the vocabulary row of an exact name.

    Raises:
        UnknownContrastError: `name` is no vocabulary name (synonyms: `resolve_contrast`).
    """
    if name not in _BY_NAME:
        raise UnknownContrastError(name, _nearest(name))
    return _BY_NAME[name]


def contrast_id(name: str) -> int:
    """Return the id, in [0, NUM_CONTRAST_IDS), of an exact vocabulary name.

    Raises:
        UnknownContrastError: `name` is no vocabulary name (synonyms: `resolve_contrast`).
    """
    return contrast_entry(name).id


def contrast_name(contrast_id: int) -> str:
    """Return the vocabulary name of an id.

    Raises:
        ValueError: no contrast has this id (yet).
    """
    if contrast_id not in _BY_ID:
        raise ValueError(
            f"looking up a contrast: no contrast has id {contrast_id}; ids are 0..{max(_BY_ID)}"
        )
    return _BY_ID[contrast_id].name


def resolve_contrast(text: str) -> str:
    """Return the vocabulary name that a name or synonym stands for; case, spaces, -_ do not count.

    Raises:
        UnknownContrastError: neither a name nor a synonym; `.nearest` is the closest name.
    """
    name = _BY_KEY.get(_key(text))
    if name is None:
        raise UnknownContrastError(text, _nearest(text))
    return name


# Field, half-way constant of the squashing x / (x + c), and the largest believable value.
_NUMERIC: tuple[tuple[str, float, float], ...] = (
    ("te_s", 0.03, 1.0),
    ("tr_s", 2.0, 60.0),
    ("ti_s", 1.0, 20.0),
    ("flip_deg", 60.0, 360.0),
    ("b_value_s_mm2", 1000.0, 50000.0),
    ("field_t", 1.5, 25.0),
)
DESCRIPTOR_SIZE: int = _FAMILY_SLOTS + 2 * len(_NUMERIC) + 2
"""K, length of `ContrastDescriptor.vector()`."""

_SIDECAR_KEYS: tuple[tuple[str, str], ...] = (
    ("te_s", "EchoTime"),
    ("tr_s", "RepetitionTime"),
    ("ti_s", "InversionTime"),
    ("flip_deg", "FlipAngle"),
    ("field_t", "MagneticFieldStrength"),
    ("b_value_s_mm2", "DiffusionBValue"),
    ("b_value_s_mm2", "b_value"),
)
_AGENT_KEYS = ("ContrastBolusAgent", "ContrastBolusIngredient")
_NO_AGENT = {"none", "no", "n", "without", "false", "n/a", "na", "0", "unknown"}


@dataclass(frozen=True, kw_only=True)
class ContrastDescriptor:
    """The physics of one volume. None means not known, which is not the same as zero."""

    family: str | None = None
    """One of FAMILIES."""
    te_s: float | None = None
    """Echo time, seconds."""
    tr_s: float | None = None
    """Repetition time, seconds."""
    ti_s: float | None = None
    """Inversion time, seconds."""
    flip_deg: float | None = None
    """Flip angle, degrees."""
    b_value_s_mm2: float | None = None
    """Diffusion weighting, s/mm^2."""
    field_t: float | None = None
    """Field strength, tesla."""
    has_agent: bool | None = None
    """Contrast agent given. A missing tag means unknown: staff type it in, scanners cannot."""

    def __post_init__(self) -> None:
        if self.family is not None and self.family not in FAMILIES:
            raise ValueError(
                f"contrast descriptor: family must be one of {FAMILIES}, got {self.family!r}"
            )
        for name, _, largest in _NUMERIC:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 <= value <= largest):
                raise ValueError(
                    f"contrast descriptor: {name} must be in [0, {largest:g}], got {value!r}; "
                    "BIDS times are in seconds"
                )

    def vector(self) -> npt.NDArray[np.float32]:
        """Return [DESCRIPTOR_SIZE] float32, all zero when nothing is known.

        Family as one-hot, then (value, known) pairs in field order with the value squashed to
        [0, 1) by x / (x + c), then (agent, known).
        """
        vector = np.zeros(DESCRIPTOR_SIZE, dtype=np.float32)
        if self.family is not None:
            vector[FAMILIES.index(self.family)] = 1.0
        for index, (name, half, _) in enumerate(_NUMERIC):
            value = getattr(self, name)
            if value is not None:
                place = _FAMILY_SLOTS + 2 * index
                vector[place : place + 2] = value / (value + half), 1.0
        if self.has_agent is not None:
            vector[-2:] = float(self.has_agent), 1.0
        return vector

    def with_contrast(self, contrast: str) -> Self:
        """Fill what the contrast itself implies (family; agent for T1wCE) where still unknown."""
        family = self.family if self.family is not None else contrast_entry(contrast).family
        agent = True if self.has_agent is None and contrast == "T1wCE" else self.has_agent
        return replace(self, family=family, has_agent=agent)

    @classmethod
    def from_sidecar(cls, sidecar: Mapping[str, object], *, contrast: str = UNKNOWN) -> Self:
        """Take the physics out of a BIDS JSON sidecar (times in seconds); nothing else is kept.

        An unbelievable value (echo time in milliseconds, a list) is left unknown, with a warning.

        Args:
            sidecar: the parsed JSON object.
            contrast: vocabulary name, fills the family.
        """
        values: dict[str, float] = {}
        limits = {name: largest for name, _, largest in _NUMERIC}
        for name, key in _SIDECAR_KEYS:
            value = sidecar.get(key)
            if value is None or name in values:
                continue
            believable = isinstance(value, int | float) and not isinstance(value, bool)
            if believable and 0 <= float(value) <= limits[name]:  # type: ignore[arg-type]
                values[name] = float(value)  # type: ignore[arg-type]
            else:
                logger.warning(
                    "sidecar %s is not a number in [0, %g] (BIDS: seconds); left unknown",
                    key,
                    limits[name],
                )
        descriptor = replace(cls(has_agent=stated_agent(sidecar)), **values)  # type: ignore[arg-type]
        return descriptor.with_contrast(contrast)

    def to_dict(self) -> dict[str, object]:
        """Return the known values only, JSON-ready."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Inverse of `to_dict`; refuses keys it does not know."""
        known = {field.name for field in fields(cls)}
        if strange := sorted(set(values) - known):
            raise ValueError(f"contrast descriptor: unknown keys {strange}; known: {sorted(known)}")
        return cls(**values)  # type: ignore[arg-type]


def stated_agent(sidecar: Mapping[str, object]) -> bool | None:
    """Return whether the agent tag of a sidecar names an agent; None when there is no tag."""
    texts = [str(sidecar[key]).strip().lower() for key in _AGENT_KEYS if sidecar.get(key)]
    if not texts:
        return None
    return not all(text in _NO_AGENT for text in texts)
