"""View: a three-plane picture of any study, of its patches and of the mask pretraining draws.

In: a study of the run's shards, by id or number, or a folder of NIfTI files. Out: a PNG, one row
per contrast. The study is shown as it is stored, before augmentation; masks are those of
(seed, epoch, study), as in training.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anycontrast.models.masking import MaskedPack
    from anycontrast.training.config import Config
    from anycontrast_datasets.study import StudyArrays, StudyRecord

logger = logging.getLogger(__name__)

Cells = npt.NDArray[np.uint8]
EMPTY, VISIBLE, HIDDEN = 0, 1, 2
"""What becomes of a patch: no token, seen by the encoder, hidden from it."""


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What a picture of a study shows."""

    out: str | None = None
    """PNG file to write; None means `<run>/report/view-<study>.png`."""
    slice_mm: tuple[float, float, float] | None = None
    """Where the planes cross: mm to the right, front and head from the middle of the box; None
    takes the middle of the label, or of the foreground."""
    mask: bool = True
    """Shade the patches that pretraining hides."""
    patches: bool = True
    """Draw the patch grid, and outline patches that have no token."""
    epoch: int = 0
    """Epoch whose mask is drawn."""
    seed: int | None = None
    """Seed of the mask; None takes the run's."""
    table: str | None = None
    """CSV or TSV naming the contrasts of a folder's files; None reads file names."""

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise ValueError(f"view.epoch must be >= 0, got {self.epoch}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"view.seed must be >= 0, got {self.seed}")


def run_view(config: "Config", study: str, view: ViewConfig) -> dict[str, Any]:
    """Draw a study.

    Args:
        config: Of the run: shards, patches, masking; `prepare` for a folder of files.
        study: Id of a stored study, its number in the store, or a folder of NIfTI files.
        view: What to draw and where to.

    Returns:
        JSON-ready: the file, the study, its shape, and per contrast how many patches are visible,
        hidden and empty.

    Raises:
        ConfigError: no such study, or `view.slice_mm` lies outside of it.
        StudyError: no usable volume in the folder, or damaged shards.
    """
    from anycontrast.view_picture import Panel, draw
    from anycontrast_datasets.files import write_durably

    arrays = _arrays(config, study, view.table)
    record = arrays.record
    crossing = _crossing(arrays, view.slice_mm)
    seed = config.seed if view.seed is None else view.seed
    cells = patch_cells(arrays, config, epoch=view.epoch, seed=seed)
    panels = [
        Panel(
            volume=volume,
            codes_XYZ=arrays.codes[volume.contrast],
            cells=cells[volume.contrast],
        )
        for volume in record.volumes
    ]
    is_folder = Path(study).is_dir()
    notes = [] if is_folder else [record.dataset, record.split]
    notes.append(_mask_note(config, view, seed))
    png = draw(
        record,
        panels,
        crossing,
        config.model.patch_vox,
        label_XYZ=arrays.label,
        show_mask=view.mask,
        show_patches=view.patches,
        title="study folder" if is_folder else record.study_id,
        notes=[part for part in notes if part],
    )
    out = Path(view.out) if view.out else config.paths.report / f"view-{record.study_id}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, png)
    logger.info("picture of study %s in %s", record.study_id, out)
    return {
        "picture": str(out),
        "study": record.study_id,
        "shape": list(record.shape),
        "spacing_mm": list(record.spacing_mm),
        "crossing_vox": list(crossing),
        "patches": {name: _counts(grid) for name, grid in cells.items()},
    }


def patch_cells(
    arrays: "StudyArrays", config: "Config", *, epoch: int, seed: int
) -> dict[str, Cells]:
    """Return what becomes of every patch of a study: per contrast [GX, GY, GZ] of the patch grid.

    Values are `EMPTY`, `VISIBLE`, `HIDDEN`.
    """
    from anycontrast.models.masking import mask_batch
    from anycontrast_datasets.pack import pack_studies

    batch = pack_studies(
        [arrays],
        config.model.patch_vox,
        epochs=[epoch],
        drop_empty=config.pretrain.stream.drop_empty,
    )
    return _cells(mask_batch(batch, config.masking, seed))


def _cells(pack: "MaskedPack") -> dict[str, Cells]:
    batch = pack.batch
    found = {}
    for volume, contrast in enumerate(batch.contrasts[0]):
        tokens = slice(batch.volume_offsets[volume], batch.volume_offsets[volume + 1])
        cells = np.full(batch.patch_grids[0], EMPTY, dtype=np.uint8)
        place = tuple(batch.grid_T3[tokens].numpy().T)
        cells[place] = np.where(pack.hidden_T[tokens].numpy(), HIDDEN, VISIBLE)
        found[contrast] = cells
    return found


def _counts(cells: Cells) -> dict[str, int]:
    visible, hidden, empty = (int((cells == kind).sum()) for kind in (VISIBLE, HIDDEN, EMPTY))
    return {"visible": visible, "hidden": hidden, "empty": empty}


def _mask_note(config: "Config", view: ViewConfig, seed: int) -> str:
    if not view.mask:
        return ""
    masking = config.masking
    return (
        f"mask {masking.strategy}, {masking.hidden_fraction:g} hidden, seed {seed}, "
        f"epoch {view.epoch}"
    )


def _arrays(config: "Config", study: str, table: str | None) -> "StudyArrays":
    if Path(study).is_dir():
        return _folder_arrays(Path(study), table, config)
    from anycontrast.shards import open_shards

    store = open_shards(config)
    return store.read(_index_of(store.records, study), label=True)


def _folder_arrays(folder: Path, table: str | None, config: "Config") -> "StudyArrays":
    """Prepare the study of a folder of files, with its label if it has one."""
    from anycontrast_datasets.prepare import prepare_volumes
    from anycontrast_datasets.sources.study_dir import scan_study_dir
    from anycontrast_datasets.volume import read_volume

    found = scan_study_dir(folder, Path(table) if table is not None else None)
    for refusal in found.refused:
        logger.warning("not shown: %s: %s", refusal.location, refusal.reason)
    volumes = {contrast: read_volume(path) for contrast, path in found.paths.items()}
    label = found.study.label
    loaded = None if label is None else read_volume(folder / label.location, allow_constant=True)
    return prepare_volumes(found.study, volumes, loaded, config.prepare)


def _index_of(records: "Sequence[StudyRecord]", study: str) -> int:
    """Return the place of a study given by number or id."""
    import difflib

    from anycontrast.training.config import ConfigError

    count = len(records)
    if re.fullmatch(r"[0-9]{1,9}", study) and int(study) < count:
        return int(study)
    ids = [record.study_id for record in records]
    if study in ids:
        return ids.index(study)
    near = difflib.get_close_matches(study, ids, n=1, cutoff=0.0)
    raise ConfigError(
        f"view: STUDY must be a study id of the shards, a number 0..{count - 1} or a folder of "
        f"NIfTI files, got {study!r}; nearest id: {near[0] if near else 'none'}"
    )


def _crossing(
    arrays: "StudyArrays", slice_mm: tuple[float, float, float] | None
) -> tuple[int, int, int]:
    """Return the voxel where the three planes cross."""
    from anycontrast.training.config import ConfigError

    record = arrays.record
    if slice_mm is None:
        seen = arrays.label if arrays.label is not None and arrays.label.any() else None
        if seen is None:
            seen = np.logical_or.reduce([codes != 0 for codes in arrays.codes.values()])
        return _middle(np.asarray(seen != 0))
    half = [n * s / 2 for n, s in zip(record.shape, record.spacing_mm, strict=True)]
    if any(abs(mm) > h for mm, h in zip(slice_mm, half, strict=True)):
        raise ConfigError(
            f"view.slice_mm must lie in the box, which reaches {[round(h) for h in half]} mm from "
            f"its middle, got {list(slice_mm)}"
        )
    x, y, z = (
        min(n - 1, int((mm + h) / s))
        for mm, h, s, n in zip(slice_mm, half, record.spacing_mm, record.shape, strict=True)
    )
    return x, y, z


def _middle(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    """Return the middle voxel of a mask along each axis, weighted by what lies in each plane."""
    places = []
    for axis in range(3):
        profile = np.cumsum(mask.sum(axis=tuple({0, 1, 2} - {axis})))
        places.append(int(np.searchsorted(profile, max(1, profile[-1] / 2))))
    x, y, z = (min(p, n - 1) for p, n in zip(places, mask.shape, strict=True))
    return x, y, z
