"""Evaluate finetuned segmenters on every contrast subset: tables, CSV and a plot.

Comes in: the finetuned runs of a run folder (`finetune/pretrained` and, if present,
`finetune/scratch`) and the labelled studies of one split. Goes out: `report/dice_by_subset.csv`,
`.md` and `.png`.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

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
        if not 0 < self.threshold < 1:
            raise ValueError(f"evaluate.threshold must be in 0..1, got {self.threshold}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"evaluate.overlap must be in 0 <= overlap < 1, got {self.overlap}")
