"""Predict on one study with a released segmenter: NIfTI in, NIfTI out in the input's own geometry.

The study is read, prepared and normalised exactly as the release's training studies were; the
probabilities go back through the affine to the grid of one input file, where they are cut at the
threshold.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast.release.errors import ReleaseError
from anycontrast.release.load import load_segmenter, prepare_config_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from anycontrast_datasets.study import StudyArrays
    from anycontrast_datasets.volume import LoadedVolume

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How a prediction is made and what is written."""

    like: str | None = None
    """Contrast whose file gives the output's grid; None takes the study's reference contrast."""
    table: str | None = None
    """CSV or TSV (file, subject, session, contrast) naming the contrasts; None reads file names."""
    threshold: float = 0.5
    """A voxel belongs to a region where its probability is above this."""
    overlap: float = 0.5
    """Overlap of neighbouring windows."""
    save_probabilities: bool = False
    """Also write one float32 probability map per region."""
    device: str = "auto"
    """`auto` takes CUDA when there is one."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"predict.threshold must be in 0..1, got {self.threshold}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"predict.overlap must be in 0 <= overlap < 1, got {self.overlap}")


def run_predict(release: Path, study_dir: Path, out: Path, config: PredictConfig) -> dict[str, Any]:
    """Segment the study in `study_dir` and write `out/<region>.nii.gz`, one mask per region.

    Returns:
        What was used and written; also saved as `out/prediction.json`.

    Raises:
        ReleaseError: not a segmenter release.
        StudyError: no usable volume in `study_dir`.
    """
    import torch

    from anycontrast.evaluation.inference import predict_study
    from anycontrast.models.segmenter import SegmenterConfig
    from anycontrast_datasets.prepare import prepare_volumes
    from anycontrast_datasets.sources.study_dir import scan_study_dir
    from anycontrast_datasets.volume import read_volume

    model, facts = load_segmenter(release)
    device = config.device if config.device != "auto" else _default_device()
    found = scan_study_dir(study_dir, Path(config.table) if config.table else None)
    volumes = {contrast: read_volume(path) for contrast, path in found.paths.items()}
    arrays = prepare_volumes(found.study, volumes, None, prepare_config_of(facts))
    like = config.like or arrays.record.reference
    if like not in volumes:
        raise ReleaseError(
            f"predict: predict.like={like} is not among the study's contrasts "
            f"{', '.join(volumes)}; choose one of them"
        )
    segmenter = SegmenterConfig(
        **{k: tuple(v) if k.endswith("_vox") else v for k, v in facts["segmenter"].items()}
    )
    with torch.no_grad():
        probabilities = predict_study(
            model.to(device),
            arrays,
            window_vox=segmenter.window_vox,
            overlap=config.overlap,
            device=device,
        )
    written = _write(
        out, probabilities, list(segmenter.region_values), arrays, volumes[like], config
    )
    report = {
        "release": facts["name"],
        "contrasts_used": list(arrays.record.contrasts),
        "refused": [
            {"file": r.location, "code": r.code, "reason": r.reason} for r in found.refused
        ],
        "geometry_of": like,
        "written": written,
    }
    (out / "prediction.json").write_text(json.dumps(report, indent=2))
    return report


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _write(
    out: Path,
    probabilities_RXYZ: "npt.NDArray[np.float32]",
    regions: list[str],
    arrays: "StudyArrays",
    like: "LoadedVolume",
    config: PredictConfig,
) -> list[str]:
    import numpy as np

    from anycontrast_datasets.resample import resample
    from anycontrast_datasets.volume import to_source_grid, write_volume

    out.mkdir(parents=True, exist_ok=True)
    written = []
    box_affine = np.asarray(arrays.record.affine)
    for region, probability_XYZ in zip(regions, probabilities_RXYZ, strict=True):
        on_input = resample(probability_XYZ, box_affine, like.array.shape, like.affine)
        in_file_order = to_source_grid(on_input, like)
        mask = (in_file_order > config.threshold).astype(np.uint8)
        write_volume(out / f"{region}.nii.gz", mask, like.source_affine)
        written.append(f"{region}.nii.gz")
        if config.save_probabilities:
            name = f"{region}_probability.nii.gz"
            write_volume(out / name, in_file_order.astype(np.float32), like.source_affine)
            written.append(name)
        logger.info("%s: %d voxels above %.2f", region, int(mask.sum()), config.threshold)
    return written
