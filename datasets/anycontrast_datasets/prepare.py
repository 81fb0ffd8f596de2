"""Bring the volumes of a study onto one grid, cut them to the head, and quantise them.

In: float32 volumes, each on a grid of its own. Out: `StudyArrays`, int16 codes of every contrast
on one grid with everything a reader needs to normalise them. Done once, at sharding (and at
prediction, on one study); training never resamples and never computes a percentile.

The common grid has the axes of the reference volume (which may be oblique to the scanner), the
spacing of the config and the reference's field of view; what another contrast shows beyond it is
left out. Foreground is found per volume on its own grid and carried over by nearest voxel. The box
is the union of the foregrounds and of the label, grown to whole multiples of `box_multiple_vox`.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.foreground import Mask, foreground_mask
from anycontrast_datasets.intensity import (
    BLOCK_VOX,
    CODES_PER_NOISE,
    CodedVolume,
    encode,
    pack_occupancy,
)
from anycontrast_datasets.resample import Grid, is_same_grid, resample
from anycontrast_datasets.study import (
    Affine,
    Study,
    StudyArrays,
    StudyError,
    StudyRecord,
    Volume,
    VolumeRecord,
)
from anycontrast_datasets.volume import LoadedVolume, read_volume

logger = logging.getLogger(__name__)

PREPARE_VERSION = 3
"""Raised whenever the same input would give other codes: it enters the key of every study.

2: halves round up, and specks are told from the head at twice the voxel size, for speed.
3: steps of the codes follow the noise.
"""
REFERENCE_ORDER = (
    "T1w",
    "T1wCE",
    "FLAIR",
    "T2w",
    "PDw",
    "DWI",
    "b0",
    "ADC",
    "GRE",
    "SWI",
    "T2starw",
)
MAX_LABEL_VALUE = 255

Triple = tuple[int, int, int]
Voxel = TypeVar("Voxel", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a study is brought onto one grid."""

    spacing_mm: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    """Spacing of the common grid along the reference's R, A, S axes; None keeps its own."""
    reference: list[str] = field(default_factory=lambda: list(REFERENCE_ORDER))
    """Contrasts in order of preference for the reference; others follow in the study's order."""
    box_multiple_vox: int = 16
    """Every side of the box is a multiple of this; itself a multiple of 8."""
    max_shape: tuple[int, int, int] = (512, 512, 512)
    """Largest box that is accepted, in voxels."""
    codes_per_noise: float | None = CODES_PER_NOISE
    """Steps of the stored codes per standard deviation of the noise; null: always 12 bits."""

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not all(0.1 <= s <= 20 for s in self.spacing_mm):
            raise ValueError(
                f"prepare.spacing_mm: must be 0.1 to 20 mm in every axis, got {self.spacing_mm}; "
                "use null to keep the reference's own spacing"
            )
        if self.box_multiple_vox < BLOCK_VOX or self.box_multiple_vox % BLOCK_VOX:
            raise ValueError(
                f"prepare.box_multiple_vox: must be a positive multiple of {BLOCK_VOX}, "
                f"got {self.box_multiple_vox}; use 16"
            )
        if any(n < self.box_multiple_vox for n in self.max_shape):
            raise ValueError(
                f"prepare.max_shape: must be at least box_multiple_vox ({self.box_multiple_vox}) "
                f"in every axis, got {self.max_shape}"
            )
        if self.codes_per_noise is not None and not 1 <= self.codes_per_noise <= 1000:
            raise ValueError(
                f"prepare.codes_per_noise: must be 1 to 1000, got {self.codes_per_noise}; use 16, "
                "or null for 12 bits whatever the noise"
            )
        for name in self.reference:
            contrast_id(name)


def prepare_study(
    study: Study, locations: Mapping[str, Path], config: PrepareConfig
) -> StudyArrays:
    """Read the files of a study and prepare it.

    Args:
        study: Manifest row.
        locations: Contrast name, or "label", -> file.
        config: Grid and box.

    Raises:
        StudyError: With the reason code of the ledger. The message names no path.
    """
    volumes = {
        volume.contrast: _read(study, volume.contrast, volume.shape, volume.sha256, locations)
        for volume in study.volumes
    }
    label = None
    if study.label is not None:
        label = _read(study, "label", study.label.shape, study.label.sha256, locations)
    return prepare_volumes(study, volumes, label, config)


def prepare_volumes(
    study: Study,
    volumes: Mapping[str, LoadedVolume],
    label: LoadedVolume | None,
    config: PrepareConfig,
) -> StudyArrays:
    """Bring loaded volumes onto the common grid. Pure: touches no file.

    Args:
        study: Names, descriptors and flags; its contrasts are the keys of `volumes`.
        volumes: Contrast name -> array [X, Y, Z] float32 on RAS+ axes, with affine.
        label: Integer values 0..255 on a grid of its own, or None.
        config: Grid and box.

    Raises:
        StudyError: Codes `empty_foreground`, `box_too_large`, `label_values`, `no_volumes`.
    """
    if not study.volumes or set(volumes) != set(study.contrasts):
        raise StudyError(
            f"study {study.study_id}: needs at least one volume and one array for each, has "
            f"volumes {sorted(study.contrasts)} and arrays {sorted(volumes)}",
            code="no_volumes",
        )
    reference = _reference(study.contrasts, config.reference)
    grids = {name: _grid_of(volume) for name, volume in volumes.items()}
    field_of_view = grids[reference]
    if config.spacing_mm is not None:
        field_of_view = field_of_view.with_spacing(config.spacing_mm)
    masks = {
        name: _resample_mask(
            foreground_mask(volumes[name].array, grids[name].spacing_mm), grids[name], field_of_view
        )
        for name in study.contrasts
    }
    label_full = None if label is None else _label_on(label, field_of_view, study.study_id)
    frame = _Frame.around(study.study_id, field_of_view, masks, label_full, config)
    codes: dict[str, npt.NDArray[np.int16]] = {}
    records: list[VolumeRecord] = []
    for volume in study.volumes:
        name = volume.contrast
        values = resample(volumes[name].array, grids[name], frame.inner)
        try:
            coded = encode(values, frame.cut(masks[name]), name, config.codes_per_noise)
        except StudyError as error:
            raise StudyError(f"study {study.study_id} {error}", code=error.code) from error
        codes[name] = frame.pad(coded.codes)
        records.append(_volume_record(volume, volumes[name], coded, codes[name]))
    stored_label = None if label_full is None else frame.pad(frame.cut(label_full))
    record = _study_record(study, frame, tuple(records), stored_label, reference)
    return StudyArrays(record=record, codes=codes, label=stored_label)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The box: the part of it inside the field of view, and what is padded around that."""

    outer: Grid
    inner: Grid
    window: tuple[slice, slice, slice]
    """Where the inner part lies in the field of view."""
    padding: tuple[tuple[int, int], ...]

    @classmethod
    def around(
        cls,
        study_id: str,
        field_of_view: Grid,
        masks: Mapping[str, Mask],
        label: npt.NDArray[np.uint8] | None,
        config: PrepareConfig,
    ) -> "_Frame":
        """Return the smallest box around every mask and the label, grown to whole multiples."""
        occupied = np.logical_or.reduce([*masks.values(), *([] if label is None else [label > 0])])
        if not occupied.any():
            raise StudyError(
                f"study {study_id}: no foreground in any of {sorted(masks)}; exclude the study",
                code="empty_foreground",
            )
        spans = [
            _grow(occupied.any(axis=tuple({0, 1, 2} - {axis})), config.box_multiple_vox)
            for axis in range(3)
        ]
        start, shape = _triple(s for s, _ in spans), _triple(n for _, n in spans)
        if any(n > limit for n, limit in zip(shape, config.max_shape, strict=True)):
            raise StudyError(
                f"study {study_id}: the foreground box may have at most {config.max_shape} voxels, "
                f"found {shape}; raise prepare.max_shape or choose a coarser prepare.spacing_mm",
                code="box_too_large",
            )
        inside = [
            (max(0, s), min(s + n, size))
            for s, n, size in zip(start, shape, field_of_view.shape, strict=True)
        ]
        first = _triple(lo for lo, _ in inside)
        return cls(
            outer=field_of_view.box(start, shape),
            inner=field_of_view.box(first, _triple(hi - lo for lo, hi in inside)),
            window=(slice(*inside[0]), slice(*inside[1]), slice(*inside[2])),
            padding=tuple(
                (lo - s, s + n - hi) for (lo, hi), s, n in zip(inside, start, shape, strict=True)
            ),
        )

    def cut(self, array: npt.NDArray[Voxel]) -> npt.NDArray[Voxel]:
        """Return the inner part of an array on the field of view."""
        return array[self.window]

    def pad(self, array: npt.NDArray[Voxel]) -> npt.NDArray[Voxel]:
        """Return an inner array as one on the whole box, background 0 around it."""
        if not any(any(pair) for pair in self.padding):
            return np.ascontiguousarray(array)
        return np.pad(array, self.padding)


def _triple(values: Iterable[int]) -> Triple:
    x, y, z = values
    return (int(x), int(y), int(z))


def _grow(profile: Mask, multiple: int) -> tuple[int, int]:
    """Return (start, size) of a run around all True, centred on them, inside if there is room."""
    hits = np.flatnonzero(profile)
    low, used, room = int(hits[0]), int(hits[-1] - hits[0] + 1), len(profile)
    size = -(-used // multiple) * multiple
    start = low - (size - used) // 2
    if size <= room:
        return min(max(start, 0), room - size), size
    return -((size - room) // 2), size


def _reference(contrasts: tuple[str, ...], priority: list[str]) -> str:
    return next((name for name in priority if name in contrasts), contrasts[0])


def _grid_of(volume: LoadedVolume) -> Grid:
    x, y, z = volume.array.shape
    return Grid(shape=(x, y, z), affine=np.asarray(volume.affine, dtype=np.float64))


def _resample_mask(mask: Mask, source: Grid, target: Grid) -> Mask:
    if is_same_grid(source, target):
        return mask
    moved = resample(mask.astype(np.float32), source, target, nearest=True)
    return np.asarray(moved > 0.5)


def _label_on(label: LoadedVolume, target: Grid, study_id: str) -> npt.NDArray[np.uint8]:
    values = label.array
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > MAX_LABEL_VALUE or not np.array_equal(values, np.rint(values)):
        raise StudyError(
            f"study {study_id} label: values must be whole numbers 0..{MAX_LABEL_VALUE}, found "
            f"{low:g} to {high:g}, e.g. {_odd_value(values):g}; store the mask as integers",
            code="label_values",
        )
    return resample(values, _grid_of(label), target, nearest=True).astype(np.uint8)


def _odd_value(values: npt.NDArray[np.float32]) -> float:
    odd = values[(values != np.rint(values)) | (values < 0) | (values > MAX_LABEL_VALUE)]
    return float(odd[0])


def _volume_record(
    volume: Volume, loaded: LoadedVolume, coded: CodedVolume, codes: npt.NDArray[np.int16]
) -> VolumeRecord:
    x, y, z = (float(s) for s in loaded.spacing_mm)
    return VolumeRecord(
        contrast=volume.contrast,
        scale=coded.scale,
        offset=coded.offset,
        p0_5=coded.p0_5,
        p99_5=coded.p99_5,
        mean=coded.mean,
        std=coded.std,
        num_foreground=coded.num_foreground,
        occupancy=pack_occupancy(codes),
        source_spacing_mm=(x, y, z),
        descriptor=volume.descriptor,
        flags=volume.flags,
    )


def _study_record(
    study: Study,
    frame: _Frame,
    volumes: tuple[VolumeRecord, ...],
    label: npt.NDArray[np.uint8] | None,
    reference: str,
) -> StudyRecord:
    affine: Affine = tuple(
        (float(a), float(b), float(c), float(d)) for a, b, c, d in frame.outer.affine
    )
    values = () if label is None else tuple(int(v) for v in np.unique(label) if v)
    return StudyRecord(
        study_id=study.study_id,
        dataset=study.dataset,
        subject_id=study.subject_id,
        session_id=study.session_id,
        split=study.split,
        shape=frame.outer.shape,
        spacing_mm=frame.outer.spacing_mm,
        affine=affine,
        volumes=volumes,
        has_label=label is not None,
        label_values=values,
        reference=reference,
    )


def _read(
    study: Study, part: str, shape: Triple, sha256: str, locations: Mapping[str, Path]
) -> LoadedVolume:
    """Read one file; refuse it when it is not the file that was scanned."""
    where = f"study {study.study_id} {part}"
    path = locations.get(part)
    if path is None:
        raise StudyError(
            f"{where}: no file is known for it; run `anycontrast scan` again", code="missing_file"
        )
    try:
        loaded = read_volume(path, allow_constant=part == "label")
    except StudyError as error:
        reason = str(error).replace(str(path), "the file")
        raise StudyError(f"{where}: {reason}", code=error.code) from error
    is_changed = bool(sha256) and sha256_file(path) != sha256
    if is_changed or tuple(loaded.source_shape) != shape:
        raise StudyError(
            f"{where}: the file must be the one that was scanned, found another checksum or shape "
            f"({tuple(loaded.source_shape)}, scanned {shape}); run `anycontrast scan` again",
            code="source_changed",
        )
    return loaded
