"""What a phantom dataset is made of: `PhantomConfig`, and who is scanned with what: `plan_studies`.

In: the configuration. Out: one `StudyPlan` per study, without a voxel computed. Light on purpose:
the scan configuration imports it, so it loads neither scipy nor nibabel.

Study i depends on the seed and on i alone: a larger `num_studies` adds studies and leaves the
first ones byte for byte as they were.
"""

import difflib
import math
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

PHANTOM_CONTRASTS = ("T1w", "T1wCE", "T2w", "FLAIR", "DWI", "ADC", "GRE", "SWI")
"""Contrasts the phantom can make; the position seeds the contrast's noise, so append only."""


class Stream(IntEnum):
    """Independent random streams of one dataset; the numbers are part of the bytes written."""

    HEAD = 1
    POSE = 2
    LESION = 3
    CHOICE = 4
    SITE = 5
    ACQUISITION = 6


def stream_rng(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """Random numbers that depend on the seed, the stream and its keys, and on nothing else."""
    return np.random.default_rng([seed, int(stream), *keys])


def _default_keep_probability() -> dict[str, float]:
    return {
        "T1w": 0.85,
        "T1wCE": 0.5,
        "T2w": 0.7,
        "FLAIR": 0.8,
        "DWI": 0.75,
        "ADC": 0.7,
        "GRE": 0.4,
        "SWI": 0.4,
    }


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """The embedded dataset: how many studies, how fine, how noisy, how ill."""

    num_studies: int = 24
    """Scanning sessions to make."""
    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    """Spacing of an isotropic protocol along R, A, S; other protocols take multiples of it."""
    seed: int = 0
    """Everything random follows from it."""
    num_sessions: int = 1
    """Sessions per subject: same head and site, new pose, contrasts and lesion."""
    num_sites: int = 4
    """Scanners; each has its field strength, protocols, gain and resolution."""
    keep_probability: dict[str, float] = field(default_factory=_default_keep_probability)
    """Chance that a study has the contrast, before `completeness_spread`; left out = 0."""
    completeness_spread: float = 2.0
    """Studies differ in length: a study's chances are `p ** 2**u`, u uniform in +- this. 0 = all
    studies follow `keep_probability` itself."""
    always: list[str] = field(default_factory=list)
    """Contrasts that every study has, e.g. `[DWI, ADC]` for a stroke finetune."""
    lesion_fraction: float = 0.8
    """Share of studies with a lesion; the mask of a healthy study is empty."""
    infarct_fraction: float = 0.5
    """Share of the lesions that are infarcts; the others are tumours."""
    noise: float = 0.03
    """Standard deviation of the noise over the brightest healthy tissue's signal; 0 = none."""
    bias: float = 0.12
    """Standard deviation of the logarithm of the receive field; 0 = none."""
    skull: bool = False
    """False: skull-stripped, background exactly 0. True: a shell of bone and scalp, no mask."""

    def __post_init__(self) -> None:
        for name, low in (("num_studies", 1), ("num_sessions", 1), ("num_sites", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"phantom.{name} must be >= {low}, got {value}; raise it")
        if any(not (math.isfinite(s) and 0.5 <= s <= 10.0) for s in self.spacing_mm):
            raise ValueError(
                f"phantom.spacing_mm must lie in 0.5 .. 10 mm per axis, got {self.spacing_mm}; "
                "3 suits a demo, 1 a full-size run"
            )
        for name in ("lesion_fraction", "infarct_fraction"):
            _check_share(name, getattr(self, name))
        for name, high in (("noise", 1.0), ("bias", 1.0), ("completeness_spread", 6.0)):
            value = getattr(self, name)
            if not 0.0 <= value <= high:
                raise ValueError(f"phantom.{name} must lie in 0 .. {high:g}, got {value}")
        for name in (*self.always, *self.keep_probability):
            _check_contrast(name)
        for name, share in self.keep_probability.items():
            _check_share(f"keep_probability.{name}", share)
        if not self.always and not any(p > 0 for p in self.keep_probability.values()):
            raise ValueError(
                "phantom.keep_probability is 0 for every contrast and phantom.always is empty, so "
                "no study would have a volume; give one contrast a probability above 0"
            )


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"phantom.{name} must lie in 0 .. 1, got {value}; it is a probability")


def _check_contrast(name: str) -> None:
    if name not in PHANTOM_CONTRASTS:
        nearest = difflib.get_close_matches(name, PHANTOM_CONTRASTS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"phantom: contrast {name!r} is none of {', '.join(PHANTOM_CONTRASTS)}; "
            f"nearest: {nearest}"
        )


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """One session to be scanned: who, where, with which contrasts."""

    index: int
    """Position of the study in the dataset, from 0."""
    subject: int
    session: int
    """Both from 1, as in the file names."""
    site: int
    contrasts: tuple[str, ...]
    """At least one, in the order of `PHANTOM_CONTRASTS`."""
    lesion: str
    """`infarct`, `tumour` or `` (healthy)."""

    @property
    def stem(self) -> str:
        """Start of every file name of the study."""
        return f"sub-{self.subject:04d}_ses-{self.session}"


def plan_study(config: PhantomConfig, index: int) -> StudyPlan:
    """Draw subject, site, contrasts and lesion kind of study `index`."""
    subject = index // config.num_sessions + 1
    # Sites go round the subjects, so that a small dataset has seen every site.
    shift = int(stream_rng(config.seed, Stream.CHOICE).integers(config.num_sites))
    rng = stream_rng(config.seed, Stream.CHOICE, index)
    is_ill = rng.random() < config.lesion_fraction
    kind = "infarct" if rng.random() < config.infarct_fraction else "tumour"
    return StudyPlan(
        index=index,
        subject=subject,
        session=index % config.num_sessions + 1,
        site=(subject + shift) % config.num_sites,
        contrasts=_draw_contrasts(config, rng),
        lesion=kind if is_ill else "",
    )


def _draw_contrasts(config: PhantomConfig, rng: np.random.Generator) -> tuple[str, ...]:
    """Random subset of the contrasts, `always` included, never empty."""
    exponent = 2.0 ** rng.uniform(-config.completeness_spread, config.completeness_spread)
    draws = rng.random(len(PHANTOM_CONTRASTS))
    base = np.array([config.keep_probability.get(name, 0.0) for name in PHANTOM_CONTRASTS])
    kept = {
        name
        for name, draw, p in zip(PHANTOM_CONTRASTS, draws, base, strict=True)
        if draw < p**exponent
    } | set(config.always)
    if not kept:
        kept = {str(rng.choice(PHANTOM_CONTRASTS, p=base / base.sum()))}
    return tuple(name for name in PHANTOM_CONTRASTS if name in kept)
