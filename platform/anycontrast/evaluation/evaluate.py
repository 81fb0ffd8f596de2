"""Evaluate finetuned segmenters on every contrast subset: tables, CSV and a plot.

Comes in: the finetuned runs of a run folder (`finetune/pretrained` and, if present,
`finetune/scratch`) and the labelled studies of one split. Goes out, under `report/`:
`dice_by_subset.csv`, `.md`, `.png` and `.json`, and `dice_by_study.csv` with every single score.
A study is evaluated on a subset only if it has all of the subset's contrasts.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anycontrast.evaluation.metrics import EMPTY_TRUTH_NOTE, dice_per_region
from anycontrast.evaluation.subsets import Subset, contrast_subsets, counts_for, subset_name
from anycontrast.evaluation.tables import (
    StudyScore,
    SubsetRow,
    summarise,
    write_csv,
    write_markdown,
    write_plot,
    write_study_csv,
)
from anycontrast.log import progress
from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.study import ManifestError

if TYPE_CHECKING:
    from anycontrast.models.segmenter import Segmenter
    from anycontrast.training.config import Config
    from anycontrast_datasets.store.reader import StudyStore

VARIANTS = ("pretrained", "scratch")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, on which studies, and how uncertainty is stated."""

    split: Literal["val", "test"] = "test"
    contrasts: list[str] = field(default_factory=list)
    """Contrasts whose 2^n - 1 subsets are enumerated; empty means all of the evaluated studies."""
    max_subset_contrasts: int = 0
    """Largest subset enumerated (the full set is always kept); 0 means no limit."""
    max_studies: int = 0
    """Studies evaluated, in store order; 0 means all."""
    empty_truth: Literal["one_if_empty", "nan"] = "one_if_empty"
    """Dice of a study whose ground truth is empty; see `metrics.dice`."""
    threshold: float = 0.5
    """A voxel belongs to a region where its probability is above this."""
    overlap: float = 0.5
    """Overlap of neighbouring windows, 0 <= overlap < 1."""
    blending: Literal["gaussian", "constant"] = "gaussian"
    """Weight of a window's voxels where windows overlap."""
    num_bootstrap: int = 1000
    """Resamples of studies behind the 95 % interval; 0 leaves the interval out."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_subset_contrasts", "max_studies", "num_bootstrap"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluate.{name} must be >= 0, got {getattr(self, name)}")
        for name in self.contrasts:
            contrast_id(name)
        if not 0 < self.threshold < 1:
            raise ValueError(f"evaluate.threshold must be in 0..1, got {self.threshold}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"evaluate.overlap must be in 0 <= overlap < 1, got {self.overlap}")


def run_evaluate(config: "Config") -> dict[str, Any]:
    """Evaluate every finetuned segmenter of the run and write the report.

    Returns:
        The summary that is also written as `report/dice_by_subset.json`.

    Raises:
        CheckpointError: the run has no finetuned segmenter, or its checkpoint is damaged.
        ManifestError: no labelled study in the split.
    """
    from anycontrast.shards import open_shards
    from anycontrast.training.checkpoint import CheckpointError

    checkpoints = find_finetuned(config.paths.finetune)
    if not checkpoints:
        raise CheckpointError(
            f"evaluate: no finetuned segmenter under {config.paths.finetune}; "
            "run `anycontrast finetune` with the same config first"
        )
    models = {variant: load_finetuned(path) for variant, path in checkpoints.items()}
    store = open_shards(config)
    with progress("evaluating", "studies") as on_study:
        scores = score_models(models, store, config.evaluate, on_study=on_study)
    summary = write_report(scores, config.paths.report, config.evaluate, checkpoints)
    logger.info("Dice per contrast subset in %s", config.paths.report / "dice_by_subset.md")
    return summary


def find_finetuned(folder: Path) -> dict[str, Path]:
    """Return the checkpoint to evaluate per variant: the best one, else the newest whole one."""
    from anycontrast.training.checkpoint import latest

    found: dict[str, Path] = {}
    for variant in VARIANTS:
        named = folder / variant / "best.json"
        checkpoints = folder / variant / "checkpoints"
        if named.is_file():
            best = checkpoints / str(json.loads(named.read_text())["checkpoint"])
            if best.is_dir():
                found[variant] = best
                continue
            logger.warning("%s names %s, which is gone: taking the newest one", named, best.name)
        if (newest := latest(checkpoints)) is not None:
            found[variant] = newest.path
    return found


def load_finetuned(checkpoint: Path) -> "Segmenter":
    """Rebuild a finetuned segmenter from its checkpoint, in eval mode on the CPU.

    Raises:
        CheckpointError: damaged, or not a segmenter's.
    """
    from anycontrast.models.segmenter import segmenter_from_model_config
    from anycontrast.training.checkpoint import CheckpointError, load_weights

    tensors, state = load_weights(checkpoint)
    if state["kind"] != "segmenter":
        raise CheckpointError(
            f"evaluate: checkpoint {checkpoint} holds a model of kind {state['kind']!r}, "
            "expected a finetuned segmenter"
        )
    model = segmenter_from_model_config(state["model_config"])
    model.load_state_dict(tensors)
    return model.eval()


def score_models(
    models: "Mapping[str, Segmenter]",
    store: "StudyStore",
    config: EvaluateConfig,
    *,
    on_study: Callable[[int, int], None] | None = None,
) -> list[StudyScore]:
    """Predict every labelled study of the split from each of its contrast subsets.

    Args:
        models: variant name -> segmenter; all predict the same studies and subsets.
        store: where the studies are read from; every study is read once.
        config: split, subsets, inference and metric.
        on_study: called with (studies done, studies in all).

    Raises:
        ManifestError: no labelled study in the split has one of the contrasts.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    indices = labelled_indices(store, config.split, config.contrasts)
    indices = indices[: config.max_studies] if config.max_studies else indices
    available = {c for i in indices for c in store.records[i].contrasts}
    subsets = contrast_subsets(config.contrasts or available, max_size=config.max_subset_contrasts)
    _check_channels(models, subsets)
    scores: list[StudyScore] = []
    for done, index in enumerate(indices):
        arrays = store.read(index, label=True)
        own = [s for s in subsets if counts_for(arrays.record.contrasts, s)]
        for variant, model in models.items():
            model.to(device)
            for subset in filter(model.accepts, own):
                scores += _score(model, variant, arrays, subset, config, device)
        if on_study is not None:
            on_study(done + 1, len(indices))
    return scores


def _check_channels(models: "Mapping[str, Segmenter]", subsets: Sequence[Subset]) -> None:
    """Say which subsets a model of fixed channels cannot be measured on; refuse if it is all."""
    for variant, model in models.items():
        left_out = [subset_name(s) for s in subsets if not model.accepts(s)]
        if len(left_out) == len(subsets):
            raise ManifestError(
                f"evaluating: model {variant} has no channel for any of {', '.join(left_out)}; set "
                "evaluate.contrasts to contrasts among its finetune.segmenter.contrasts"
            )
        if left_out:
            logger.warning(
                "model %s has no channel for a contrast of %d subsets, which are left out: %s",
                variant,
                len(left_out),
                ", ".join(left_out),
            )


def labelled_indices(store: "StudyStore", split: str, contrasts: Sequence[str] = ()) -> list[int]:
    """Return the labelled studies of a split that have one of the contrasts (empty: any).

    Raises:
        ManifestError: there is none.
    """
    in_split = [i for i, record in enumerate(store.records) if record.split == split]
    labelled = [
        i
        for i in in_split
        if store.records[i].has_label
        and (not contrasts or set(contrasts) & set(store.records[i].contrasts))
    ]
    if not labelled:
        raise ManifestError(
            f"evaluating: no labelled study in split {split!r} with contrasts "
            f"{list(contrasts) or 'any'} (the split has {len(in_split)} studies); use another "
            "split, or change scan.split_fractions"
        )
    if len(labelled) < len(in_split):
        logger.info(
            "split %s: %d studies used, %d left out for lack of a label or of the contrasts",
            split,
            len(labelled),
            len(in_split) - len(labelled),
        )
    return labelled


def _score(
    model: "Segmenter",
    variant: str,
    arrays: Any,
    subset: Subset,
    config: EvaluateConfig,
    device: Any,
) -> list[StudyScore]:
    from anycontrast.evaluation.inference import predict_study

    probability_RXYZ = predict_study(
        model,
        arrays,
        contrasts=subset,
        overlap=config.overlap,
        blending=config.blending,
        device=device,
    )
    found = dice_per_region(
        probability_RXYZ,
        arrays.label,
        model.regions,
        threshold=config.threshold,
        empty_truth=config.empty_truth,
    )
    study_id = arrays.record.study_id
    return [StudyScore(variant, study_id, subset, region, d) for region, d in found.items()]


def write_report(
    scores: Sequence[StudyScore],
    folder: Path,
    config: EvaluateConfig,
    checkpoints: Mapping[str, Path],
) -> dict[str, Any]:
    """Write tables and plot under `folder` and return the summary."""
    rows = summarise(scores, num_bootstrap=config.num_bootstrap, seed=config.seed)
    num_studies = len({s.study_id for s in scores})
    title = f"Dice per contrast subset, split {config.split}, {num_studies} studies"
    note = (
        f"Mean over studies (95 % bootstrap interval, {config.num_bootstrap} resamples); "
        f"threshold {config.threshold}; {EMPTY_TRUTH_NOTE[config.empty_truth]}; `gain` is the "
        "paired difference to training from scratch."
    )
    write_csv(rows, folder / "dice_by_subset.csv")
    write_study_csv(scores, folder / "dice_by_study.csv")
    write_markdown(rows, folder / "dice_by_subset.md", title=title, note=note)
    write_plot(rows, folder / "dice_by_subset.png", title=title)
    summary = {
        "metric": "dice",
        "protocol": asdict(config),
        "num_studies": num_studies,
        "checkpoints": {variant: path.name for variant, path in checkpoints.items()},
        "digests": {variant: checkpoint_digest(path) for variant, path in checkpoints.items()},
        "rows": [_row_dict(row) for row in rows],
    }
    text = json.dumps(summary, indent=2, allow_nan=False)
    (folder / "dice_by_subset.json").write_text(text, encoding="utf-8")
    return summary


def checkpoint_digest(checkpoint: Path) -> str:
    """Return the sha256 of a checkpoint's manifest, which holds the hash of every file in it."""
    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def _row_dict(row: SubsetRow) -> dict[str, Any]:
    numbers = {
        f"{name}_{part}": value if math.isfinite(value) else None
        for name, interval in (("dice", row.score), ("gain", row.gain))
        if interval is not None
        for part, value in zip(("mean", "low", "high"), interval[:3], strict=True)
    }
    return {
        "variant": row.variant,
        "contrasts": list(row.subset),
        "subset": subset_name(row.subset),
        "region": row.region,
        "num_studies": row.score.num_studies,
        **numbers,
    }
