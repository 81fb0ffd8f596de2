"""Open one claimed file, once, and say what is really in it.

In: a `FileClaim`. Out: `Inspected` facts (geometry, checksums, contrast by all votes, quality, face
state) or a refusal. The whole file is decoded here, so NaN voxels, damaged compression and false
headers are met at the scan and not in training. Voxels are dropped again; a thread holds one
volume.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anycontrast_datasets.contrast import ContrastDescriptor
from anycontrast_datasets.duplicates import image_hash, voxels_sha256
from anycontrast_datasets.face import FACE_CONTRASTS, decide_face, detect_face, stated_face
from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.manifest import affine_rows
from anycontrast_datasets.quality import NEARLY_EMPTY, measure_quality
from anycontrast_datasets.sidecars import Sidecar
from anycontrast_datasets.sources.claims import FileClaim, SourceOptions
from anycontrast_datasets.sources.judging import DISAGREEMENT, Judgement, judge
from anycontrast_datasets.sources.listing import refuse_format
from anycontrast_datasets.study import Label, Volume, VolumeError
from anycontrast_datasets.volume import LoadedVolume, read_volume, same_grid
from anycontrast_datasets.work_copy import WorkCopy, make_work_copy

__all__ = ["DISAGREEMENT", "Grid", "Inspected", "inspect"]

SIDECAR_UNREADABLE = "sidecar_unreadable"
SIDECAR_MILLISECONDS = "sidecar_milliseconds"
FACE_PRESENT = "face_present"

_MAX_LABEL_VALUE = 255


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A voxel grid on RAS+ axes, comparable between files stored along other axes."""

    shape: tuple[int, ...]
    affine: np.typing.NDArray[np.float64]

    def equals(self, other: "Grid") -> bool:
        """Return whether both grids have the same voxels in the same places."""
        return same_grid(self.shape, self.affine, other.shape, other.affine)


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A file that can be used, as volume or as label."""

    claim: FileClaim
    grid: Grid
    volume: Volume | None = None
    label: Label | None = None
    """With an empty `grid_of`; the study decides it."""
    site: str = ""
    """Keyed name of scanner and institution; empty when not known."""


def inspect(
    root: Path, claim: FileClaim, sidecar: Sidecar, options: SourceOptions
) -> Inspected | Refusal:
    """Read a claimed file in full and return its facts, or why it is refused.

    Args:
        root: Folder that the location is relative to.
        claim: What the source says of the file.
        sidecar: What its JSON sidecars, or the headers it was converted from, say.
        options: Limits and policies.
    """
    study_id = options.naming(claim.subject, claim.session).study_id
    if refusal := refuse_format(claim.location, study_id):
        return refusal
    path = root / claim.location
    try:
        # A label of one value is an empty label, which a healthy study may have.
        loaded = read_volume(path, max_bytes=options.max_bytes, allow_constant=claim.is_label)
        sha256 = sha256_file(path)
    except VolumeError as error:
        reason = str(error).replace(str(path), claim.location)
        return refuse(claim.location, error.code, reason, study_id=study_id)
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        return refuse(claim.location, "unreadable_file", reason, study_id=study_id)
    if claim.is_label:
        return _label(claim, loaded, sha256, study_id)
    return _volume(claim, loaded, sha256, sidecar, options, study_id)


def _label(
    claim: FileClaim, loaded: LoadedVolume, sha256: str, study_id: str
) -> Inspected | Refusal:
    low, high = float(loaded.array.min()), float(loaded.array.max())
    if low < 0 or high > _MAX_LABEL_VALUE or not np.array_equal(loaded.array, loaded.array.round()):
        reason = f"label values must be whole numbers in 0..255, found {low:g} to {high:g}"
        return refuse(claim.location, "label_values", reason, study_id=study_id)
    label = Label(
        location=claim.location,
        shape=loaded.source_shape,
        affine=affine_rows(loaded.source_affine),
        grid_of="",
        sha256=sha256,
    )
    return Inspected(claim=claim, grid=_grid(loaded), label=label)


def _volume(
    claim: FileClaim,
    loaded: LoadedVolume,
    sha256: str,
    sidecar: Sidecar,
    options: SourceOptions,
    study_id: str,
) -> Inspected | Refusal:
    copy = make_work_copy(loaded.array, loaded.spacing_mm)
    found = judge(
        claim,
        sidecar,
        loaded,
        copy if options.check_pictures else None,
        keep_unknown=options.unknown_contrast == "keep",
    )
    if not found.code and options.contrasts and found.contrast not in options.contrasts:
        reason = f"{found.contrast} is not among the contrasts to keep"
        return refuse(claim.location, "contrast_not_selected", reason, study_id=study_id)
    if found.code:
        return refuse(claim.location, found.code, found.reason, study_id=study_id)
    quality = measure_quality(copy)
    if options.check_pictures and NEARLY_EMPTY in quality.flags:
        reason = "next to nothing stands out of the background"
        return refuse(claim.location, NEARLY_EMPTY, reason, study_id=study_id)
    face, face_flags, reason = _face(claim, copy, sidecar, found.contrast, options)
    if reason:
        return refuse(claim.location, FACE_PRESENT, reason, study_id=study_id)
    volume = Volume(
        contrast=found.contrast,
        location=claim.location,
        shape=loaded.source_shape,
        spacing_mm=_spacing(loaded),
        affine=affine_rows(loaded.source_affine),
        descriptor=ContrastDescriptor.from_sidecar(sidecar.values, contrast=found.contrast),
        flags=_flags(loaded, found, sidecar, (*quality.flags, *face_flags), options),
        evidence=found.evidence,
        sha256=sha256,
        confidence=found.confidence,
        votes=found.votes,
        face=face,
        voxels_sha256=voxels_sha256(loaded.array),
        image_hash=image_hash(copy),
        intensity=quality.intensity,
        noise_sigma=quality.noise_sigma,
    )
    site = claim.site or options.naming.site(*sidecar.site)
    return Inspected(claim=claim, grid=_grid(loaded), volume=volume, site=site)


def _flags(
    loaded: LoadedVolume,
    found: Judgement,
    sidecar: Sidecar,
    measured: tuple[str, ...],
    options: SourceOptions,
) -> tuple[str, ...]:
    """What a person should know; the picture is not asked where pictures are not checked."""
    said = ((SIDECAR_UNREADABLE,) if sidecar.is_unreadable else ()) + (
        (SIDECAR_MILLISECONDS,) if sidecar.is_milliseconds else ()
    )
    kept = measured if options.check_pictures else [f for f in measured if f == FACE_PRESENT]
    return tuple(dict.fromkeys((*loaded.flags, *found.flags, *kept, *said)))


def _face(
    claim: FileClaim,
    copy: WorkCopy,
    sidecar: Sidecar,
    contrast: str,
    options: SourceOptions,
) -> tuple[str, tuple[str, ...], str]:
    """Return the face state, flags, and the reason to refuse (blank to keep).

    The detector is asked whether pictures are checked or not; what it cannot tell counts as
    present. Where nobody was scanned there is no face to recognise.
    """
    finding = decide_face(detect_face(copy), stated_face(claim.location, sidecar.values))
    may_show = finding.state in ("present", "unknown")
    if may_show and options.is_synthetic:
        return "defaced", (), ""
    if not may_show or contrast not in FACE_CONTRASTS or options.faces == "allow":
        return finding.state, (), ""
    if options.faces == "flag":
        return finding.state, (FACE_PRESENT,), ""
    what = "a face shows" if finding.state == "present" else "that no face shows is not known"
    return finding.state, (), f"{what} ({finding.evidence})"


def _spacing(loaded: LoadedVolume) -> tuple[float, float, float]:
    """Along the axes of the file, as `shape` is; `loaded.spacing_mm` is along RAS+ axes."""
    i, j, k = np.linalg.norm(loaded.source_affine[:3, :3], axis=0).tolist()
    return i, j, k


def _grid(loaded: LoadedVolume) -> Grid:
    return Grid(shape=loaded.array.shape, affine=loaded.affine)
