"""The nouns of the data room: study, volume, label, and what a stored study looks like.

A study is one scanning session of one person. It has any number of volumes, each of one contrast,
each on a grid of its own until `prepare` brings them onto one. Frozen values, checked once here;
everything downstream trusts them.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.contrast import ContrastDescriptor, contrast_id

Affine = tuple[tuple[float, float, float, float], ...]
"""4 x 4, voxel index ijk -> RAS+ mm, rows outermost."""

SPLITS = ("train", "val", "test")


class StudyError(ValueError):
    """A study, or a part of it, cannot be used. `code` is the reason code of the ledger."""

    code = "study_invalid"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class ManifestError(StudyError):
    """The manifest is missing, of another schema, or contradicts itself."""

    code = "manifest_invalid"


class VolumeError(StudyError):
    """A volume file cannot be read, or its header is not to be trusted."""

    code = "volume_unreadable"


class ShardError(StudyError):
    """Stored bytes are missing or are not the bytes that were written."""

    code = "shard_corrupt"


FACE_STATES = ("stripped", "defaced", "refaced", "present", "unknown")
"""What is known of a face in a volume; `unknown` is treated like `present`."""


@dataclass(frozen=True, kw_only=True)
class ContrastVote:
    """What one source of evidence says a volume shows."""

    source: str
    """`mapping`, `table`, `bids`, `name`, `description`, `physics` or `picture`."""
    contrast: str
    """Vocabulary name."""
    confidence: float
    """0 .. 1, of this vote alone."""
    evidence: str = ""
    """One clause, free of identifying text."""


@dataclass(frozen=True, kw_only=True)
class Volume:
    """One 3D image of a study as it lies in the source."""

    contrast: str
    """Vocabulary name, see `contrast.VOCABULARY`."""
    location: str
    """Path relative to the scanned root. Private: written to the private table only."""
    shape: tuple[int, int, int]
    """Voxels along i, j, k, as stored in the file."""
    spacing_mm: tuple[float, float, float]
    affine: Affine
    descriptor: ContrastDescriptor = field(default_factory=ContrastDescriptor)
    """What is known of the physics; unknown fields stay None."""
    flags: tuple[str, ...] = ()
    """Quality flags, e.g. `contrast_disagreement`."""
    evidence: tuple[str, ...] = ()
    """Why this contrast was chosen, one clause each, free of identifying text."""
    sha256: str = ""
    """Of the source file's bytes."""
    confidence: float = 1.0
    """Of `contrast`, 0 .. 1, after all votes."""
    votes: tuple[ContrastVote, ...] = ()
    """Everything that had a say in `contrast`, strongest first."""
    face: str = "unknown"
    """One of `FACE_STATES`."""
    voxels_sha256: str = ""
    """Of shape and float32 voxels on RAS+ axes: equal pictures, equal hash, whatever the file."""
    image_hash: str = ""
    """128 hexadecimal digits, the bits of an 8 x 8 x 8 thumbnail; near-duplicates differ in few."""
    intensity: tuple[float, float, float] | None = None
    """1st, 50th and 99th percentile of the foreground, in source units."""
    noise_sigma: float | None = None
    """Standard deviation of the background noise, in source units."""

    def __post_init__(self) -> None:
        contrast_id(self.contrast)
        if self.face not in FACE_STATES:
            raise StudyError(
                f"volume {self.contrast}: face must be one of {FACE_STATES}, got {self.face!r}"
            )
        if any(n < 1 for n in self.shape):
            raise StudyError(f"volume {self.contrast}: shape must be positive, got {self.shape}")
        if any(not (math.isfinite(s) and s > 0) for s in self.spacing_mm):
            raise StudyError(
                f"volume {self.contrast}: spacing_mm must be > 0 in every axis, "
                f"got {self.spacing_mm}"
            )


@dataclass(frozen=True, kw_only=True)
class Label:
    """A voxel label of a study; its grid equals the grid of one of the study's volumes."""

    location: str
    shape: tuple[int, int, int]
    affine: Affine
    grid_of: str
    """Contrast of the volume whose grid the label shares."""
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One scanning session of one person: what the manifest holds one row of."""

    study_id: str
    """Unique over the manifest; `[a-z0-9_-]+`; a keyed pseudonym unless the data are synthetic."""
    dataset: str
    subject_id: str
    session_id: str
    split: str
    volumes: tuple[Volume, ...]
    label: Label | None = None
    site: str = ""
    """Keyed hash of scanner and institution, as stable as the pseudonyms; empty when not known."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise StudyError(
                f"study {self.study_id}: split must be one of {SPLITS}, got {self.split!r}"
            )
        names = [volume.contrast for volume in self.volumes]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise StudyError(
                f"study {self.study_id}: one volume per contrast, found several of {repeated}; "
                "keep one in the source or name them apart in the table",
                code="duplicate_contrast",
            )

    @property
    def contrasts(self) -> tuple[str, ...]:
        """Vocabulary names in the study's own order."""
        return tuple(volume.contrast for volume in self.volumes)


@dataclass(frozen=True, kw_only=True)
class VolumeRecord:
    """One prepared contrast: int16 codes with a linear map back to intensity.

    `value = code * scale + offset`; code 0 is background. The intensity statistics are taken once,
    over the foreground, at preparation.
    """

    contrast: str
    scale: float
    offset: float
    p0_5: float
    """0.5th percentile of the foreground, in source units."""
    p99_5: float
    mean: float
    """Mean of the foreground after clipping to [p0_5, p99_5]."""
    std: float
    """Standard deviation of the same, > 0."""
    num_foreground: int
    occupancy: str
    """Which blocks of 8 x 8 x 8 voxels hold foreground: packed bits, C order, base64."""
    source_spacing_mm: tuple[float, float, float]
    descriptor: ContrastDescriptor = field(default_factory=ContrastDescriptor)
    flags: tuple[str, ...] = ()

    @property
    def intensity_map(self) -> tuple[float, float, float, float]:
        """`(gain, bias, low, high)`: z-score = clip(code * gain + bias, low, high)."""
        return (
            self.scale / self.std,
            (self.offset - self.mean) / self.std,
            (self.p0_5 - self.mean) / self.std,
            (self.p99_5 - self.mean) / self.std,
        )


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A prepared study without its voxels: what `study.json` and the shard index hold."""

    study_id: str
    dataset: str
    subject_id: str
    session_id: str
    split: str
    shape: tuple[int, int, int]
    """Voxels of the common grid, cut to the foreground box."""
    spacing_mm: tuple[float, float, float]
    affine: Affine
    """Voxel index of the box -> RAS+ mm of the study's scanner frame."""
    volumes: tuple[VolumeRecord, ...]
    has_label: bool = False
    label_values: tuple[int, ...] = ()
    """Label values present, background 0 left out."""
    reference: str = ""
    """Contrast whose grid orientation the common grid follows."""

    @property
    def contrasts(self) -> tuple[str, ...]:
        """Vocabulary names in stored order."""
        return tuple(volume.contrast for volume in self.volumes)


@dataclass(frozen=True)
class StudyArrays:
    """A prepared study with its voxels, from a store or straight from `prepare`."""

    record: StudyRecord
    codes: dict[str, npt.NDArray[np.int16]]
    """Per contrast `[X, Y, Z]` int16 codes on the common grid, C order, RAS+ axes."""
    label: npt.NDArray[np.uint8] | None = None
    """`[X, Y, Z]` on the common grid."""
