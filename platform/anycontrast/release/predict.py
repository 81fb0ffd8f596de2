"""Predict on one study with a released segmenter: NIfTI in, NIfTI out in the input's own geometry.

The study is read, prepared and normalised exactly as the release's training studies were; the
probabilities go back through the affine to the grid of one input file, where they are cut at the
threshold. Outside the box that the model saw, the probability is 0.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast.release.files import write_synced
from anycontrast.release.load import (
    load_segmenter,
    prepare_config_of,
    read_study_dir,
    release_folder,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from anycontrast_datasets.study import StudyRecord
    from anycontrast_datasets.volume import LoadedVolume

    # R regions, X Y Z voxels of the study's box, I J K voxels of an input file.
    Maps = dict[str, npt.NDArray[np.float32]]

logger = logging.getLogger(__name__)

REPORT_NAME = "prediction.json"


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How a prediction is made and what is written."""

    like: str | None = None
    """Contrast whose file gives the output's grid; None takes the study's reference contrast."""
    table: str | None = None
    """CSV or TSV (file, subject, session, contrast, label) naming the contrasts; None reads file
    names."""
    threshold: float = 0.5
    """A voxel belongs to a region where its probability is above this."""
    overlap: float = 0.5
    """Overlap of neighbouring windows, 0 <= overlap < 1."""
    save_probabilities: bool = False
    """Also write one float32 probability map per region."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes CUDA when there is one."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"predict.threshold must be in 0..1, got {self.threshold}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"predict.overlap must be in 0 <= overlap < 1, got {self.overlap}")


def run_predict(
    release: str | Path, study_dir: Path, out: Path, config: PredictConfig
) -> dict[str, Any]:
    """Segment the study in `study_dir` and write `out/<region>.nii.gz`, one mask per region.

    Nothing is written before the prediction is complete; files of other names in `out` stay.

    Args:
        release: folder or URL of a segmenter release.
        study_dir: folder of one study's NIfTI files.
        out: folder for the masks, made when missing; not inside `study_dir`.
        config: grid of the output, threshold, windows, device.

    Returns:
        What was used and written; also saved as `out/prediction.json`, last.

    Raises:
        ReleaseError: not a segmenter release.
        StudyError: no usable volume in `study_dir`.
        ConfigError: `out` cannot be used, no such device, or `predict.like` is not in the study.
    """
    from anycontrast.evaluation.inference import predict_study

    _check_out(study_dir, out)
    device = _device(config.device)
    model, facts = load_segmenter(release_folder(release))
    arrays, volumes, refused = read_study_dir(study_dir, config.table, prepare_config_of(facts))
    like = _like(config.like or arrays.record.reference, list(volumes))
    not_seen = [name for name in arrays.record.contrasts if name not in facts["contrasts_seen"]]
    if not_seen:
        logger.warning(
            "%s never saw %s in pretraining, only %s: it is tokenized without having been learned, "
            "so treat the result with care or leave the file out",
            facts["name"],
            ", ".join(not_seen),
            ", ".join(facts["contrasts_seen"]),
        )
    probabilities_RXYZ = predict_study(
        model.to(device), arrays, overlap=config.overlap, device=device
    )
    maps = {
        region: on_input_grid(probability_XYZ, arrays.record, volumes[like])
        for region, probability_XYZ in zip(model.regions, probabilities_RXYZ, strict=True)
    }
    num_voxels = {name: int((map_IJK > config.threshold).sum()) for name, map_IJK in maps.items()}
    report = {
        "release": facts["name"],
        "contrasts_used": list(arrays.record.contrasts),
        "contrasts_not_seen": not_seen,
        "refused": [{"file": r.location, "code": r.code, "reason": r.reason} for r in refused],
        "geometry_of": like,
        "threshold": config.threshold,
        "voxels": num_voxels,
        "written": _write(out, maps, volumes[like], config),
    }
    write_synced(out / REPORT_NAME, json.dumps(report, indent=2).encode())
    return {"out": str(out), **report}


def on_input_grid(
    probability_XYZ: "npt.NDArray[np.float32]", record: "StudyRecord", like: "LoadedVolume"
) -> "npt.NDArray[np.float32]":
    """Bring a probability map of the study's box onto the grid of an input file.

    Where the file's voxels are larger than the box's, a voxel gets the mean over it.

    Args:
        probability_XYZ: [X, Y, Z] on the box of `record`.
        record: where the box lies.
        like: the input volume.

    Returns:
        [I, J, K] in the axes and the shape of the file `like` was read from; 0 outside the box.
    """
    import numpy as np

    from anycontrast_datasets.resample import Grid, resample, step_matrix
    from anycontrast_datasets.volume import to_source_grid

    x, y, z = record.shape
    box = Grid(shape=(x, y, z), affine=np.asarray(record.affine, dtype=np.float64))
    i, j, k = like.array.shape
    target = Grid(shape=(i, j, k), affine=np.asarray(like.affine, dtype=np.float64))
    # `resample` holds the border's value outside; a rim of zeros, wider than its low-pass reaches
    # (1.3 target steps), makes that value 0.
    steps = np.linalg.norm(step_matrix(box, target)[:3, :3], axis=1)
    a, b, c = (int(n) for n in np.ceil(1.3 * steps) + 2)
    rim = box.box((-a, -b, -c), (x + 2 * a, y + 2 * b, z + 2 * c))
    padded_XYZ = np.pad(probability_XYZ, ((a, a), (b, b), (c, c)))
    return to_source_grid(resample(padded_XYZ, rim, target), like)


def _write(out: Path, maps: "Maps", like: "LoadedVolume", config: PredictConfig) -> list[str]:
    import numpy as np

    from anycontrast_datasets.volume import write_volume

    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT_NAME).unlink(missing_ok=True)
    written = []
    for region, map_IJK in maps.items():
        mask_IJK = (map_IJK > config.threshold).astype(np.uint8)
        write_volume(out / f"{region}.nii.gz", mask_IJK, like.source_affine)
        written.append(f"{region}.nii.gz")
        if config.save_probabilities:
            write_volume(out / f"{region}_probability.nii.gz", map_IJK, like.source_affine)
            written.append(f"{region}_probability.nii.gz")
        logger.info("%s: %d voxels above %.2f", region, int(mask_IJK.sum()), config.threshold)
    return written


def _check_out(study_dir: Path, out: Path) -> None:
    from anycontrast.training.config import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"predict: OUT must be a folder, {out} is a file; name another")
    if out.resolve().is_relative_to(study_dir.resolve()):
        raise ConfigError(
            f"predict: OUT must not lie in the study's folder, got {out} in {study_dir}; a later "
            "run would read its own masks as input, so name a folder elsewhere"
        )


def _like(wanted: str, contrasts: list[str]) -> str:
    from anycontrast.training.config import ConfigError

    if wanted not in contrasts:
        raise ConfigError(
            f"predict.like must be one of the study's contrasts {', '.join(contrasts)}, got "
            f"{wanted}"
        )
    return wanted


def _device(name: str) -> str:
    import torch

    from anycontrast.training.config import ConfigError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"predict.device={name} cannot be used here ({str(error).splitlines()[0]}); use auto "
            "or cpu"
        ) from error
    return name
