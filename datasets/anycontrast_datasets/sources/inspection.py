"""Open one claimed file, once, and say what is really in it.

In: a `FileClaim`. Out: `Inspected` facts (geometry, checksum, contrast after a look at the picture)
or a refusal. The whole file is decoded here, so NaN voxels, damaged compression and false headers
are met at the scan and not in training. Voxels are dropped again; a thread holds one volume.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anycontrast_datasets.appearance import check_appearance
from anycontrast_datasets.contrast import UNKNOWN, ContrastDescriptor
from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.manifest import affine_rows
from anycontrast_datasets.sources.claims import FileClaim, SourceOptions
from anycontrast_datasets.sources.listing import refuse_format, stem
from anycontrast_datasets.study import Label, Volume, VolumeError
from anycontrast_datasets.volume import LoadedVolume, read_volume, same_grid

logger = logging.getLogger(__name__)

DISAGREEMENT = "contrast_disagreement"
SIDECAR_UNREADABLE = "sidecar_unreadable"

# Flag of the picture -> reason code.
_REFUSING_FLAGS = {
    "not_a_brain": "not_a_brain",
    "field_of_view_small": "field_of_view_small",
    "ct_like": "not_mri",
}
_MAX_SIDECAR_BYTES = 2**20
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


def inspect(root: Path, claim: FileClaim, options: SourceOptions) -> Inspected | Refusal:
    """Read a claimed file in full and return its facts, or why it is refused."""
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
    if refusal := _refuse_reading(claim, options, study_id):
        return refusal
    return _volume(path, claim, loaded, sha256, options, study_id)


def _refuse_reading(claim: FileClaim, options: SourceOptions, study_id: str) -> Refusal | None:
    reading = claim.reading
    kept_unknown = reading.code == "unknown_contrast" and options.unknown_contrast == "keep"
    if not reading.code or kept_unknown:
        return None
    return refuse(claim.location, reading.code, reading.reason, study_id=study_id)


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
    path: Path,
    claim: FileClaim,
    loaded: LoadedVolume,
    sha256: str,
    options: SourceOptions,
    study_id: str,
) -> Inspected | Refusal:
    contrast, flags, evidence = claim.reading.contrast, loaded.flags, claim.reading.evidence
    if options.check_pictures:
        contrast, flags, evidence = _look(claim, loaded)
        if told := [flag for flag in _REFUSING_FLAGS if flag in flags]:
            reason = f"by its picture ({told[0]}): {'; '.join(evidence)}"
            return refuse(claim.location, _REFUSING_FLAGS[told[0]], reason, study_id=study_id)
    if options.contrasts and contrast not in options.contrasts:
        reason = f"{contrast} is not among the contrasts to keep"
        return refuse(claim.location, "contrast_not_selected", reason, study_id=study_id)
    sidecar = _read_sidecar(path)
    if sidecar is None:
        flags = (*flags, SIDECAR_UNREADABLE)
    volume = Volume(
        contrast=contrast,
        location=claim.location,
        shape=loaded.source_shape,
        spacing_mm=_spacing(loaded),
        affine=affine_rows(loaded.source_affine),
        descriptor=ContrastDescriptor.from_sidecar(sidecar or {}, contrast=contrast),
        flags=flags,
        evidence=evidence,
        sha256=sha256,
    )
    return Inspected(claim=claim, grid=_grid(loaded), volume=volume)


def _look(claim: FileClaim, loaded: LoadedVolume) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return contrast, flags and evidence after comparing the claim with the picture.

    A guess from a name follows the picture; a contrast that somebody stated in a table does not.
    Both votes are written down either way.
    """
    claimed = claim.reading.contrast
    seen = check_appearance(loaded.array, loaded.affine, loaded.spacing_mm, claimed)
    evidence = (*claim.reading.evidence, *seen.evidence)
    flags = (*loaded.flags, *(flag for flag in seen.flags if flag != DISAGREEMENT))
    if seen.contrast is None or seen.contrast == claimed or claimed == UNKNOWN:
        return claimed, flags, evidence
    kept = claimed if claim.is_stated else seen.contrast
    return kept, (*flags, DISAGREEMENT), evidence


def _spacing(loaded: LoadedVolume) -> tuple[float, float, float]:
    """Along the axes of the file, as `shape` is; `loaded.spacing_mm` is along RAS+ axes."""
    i, j, k = np.linalg.norm(loaded.source_affine[:3, :3], axis=0).tolist()
    return i, j, k


def _grid(loaded: LoadedVolume) -> Grid:
    return Grid(shape=loaded.array.shape, affine=loaded.affine)


def _read_sidecar(path: Path) -> Mapping[str, object] | None:
    """Return the JSON beside an image, empty when there is none, None when it cannot be read."""
    sidecar = path.with_name(f"{stem(path.name)}.json")
    if not sidecar.is_file():
        return {}
    try:
        if sidecar.stat().st_size > _MAX_SIDECAR_BYTES:
            raise ValueError("too large")
        content = json.loads(sidecar.read_bytes())
    except (OSError, ValueError, RecursionError):
        logger.warning("a JSON sidecar cannot be read; its volume is kept without physics")
        return None
    return content if isinstance(content, dict) else None
