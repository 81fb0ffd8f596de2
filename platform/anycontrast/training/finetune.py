"""Finetune a pretrained encoder with a segmentation head, or the same from scratch beside it.

Comes in: labelled studies of the shards and a pretraining checkpoint. Goes out: segmenter
checkpoints under `<run>/finetune/<pretrained|scratch>/` and `best.json`, which names the one with
the best validation Dice.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

from anycontrast.models.segmenter import SegmenterConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One finetuning run."""

    from_scratch: bool = False
    """Leave the pretrained weights out: same data, same order, fresh weights, own folder."""
    checkpoint: str | None = None
    """Pretraining checkpoint folder; None takes the newest valid one of this run."""
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    loss: Literal["dice", "dice_ce"] = "dice_ce"
    """Soft Dice per region, alone or plus binary cross-entropy."""
    num_steps: int = 1000
    """Optimiser steps."""
    warmup_steps: int = 50
    """Steps of linear warm-up before the cosine; counted inside `num_steps`."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 means no clipping."""
    studies_per_step: int = 4
    """Studies per optimiser step over all workers."""
    packs_per_step: int = 1
    """Packs those studies are cut into; divisible by the number of workers."""
    contrasts: list[str] = field(default_factory=list)
    """Contrasts to train on; empty means all."""
    drop_contrasts: bool = True
    """Show each study with a random non-empty subset of its contrasts."""
    foreground_crop_fraction: float = 0.5
    """Share of the crops centred on a labelled voxel."""

    log_every_steps: int = 10
    validate_every_steps: int = 100
    """Steps between validations (the last step always validates); 0 means the last step only."""
    checkpoint_every_steps: int = 100
    keep_checkpoints: int = 2
    """Newest checkpoints kept beside the best one."""
    max_validation_studies: int = 0
    """Studies of split val used for validation; 0 means all."""
    overlap: float = 0.5
    """Overlap of the windows in whole-volume validation, 0 <= overlap < 1."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "studies_per_step", "packs_per_step", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"finetune.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "validate_every_steps", "max_validation_studies"):
            if getattr(self, name) < 0:
                raise ValueError(f"finetune.{name} must be >= 0, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"finetune.lr must be > 0, got {self.lr}")
        if not 0 <= self.foreground_crop_fraction <= 1:
            raise ValueError(
                "finetune.foreground_crop_fraction must be in 0..1, "
                f"got {self.foreground_crop_fraction}"
            )
        if not 0 <= self.overlap < 1:
            raise ValueError(f"finetune.overlap must be in 0 <= overlap < 1, got {self.overlap}")
        if self.packs_per_step > self.studies_per_step:
            raise ValueError(
                f"finetune.packs_per_step must be <= studies_per_step ({self.studies_per_step}), "
                f"got {self.packs_per_step}; every pack needs a study"
            )

    @property
    def variant(self) -> str:
        """Folder name under `<run>/finetune/`."""
        return "scratch" if self.from_scratch else "pretrained"
