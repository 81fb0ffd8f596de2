"""What a training loop needs to know of a job: one protocol, implemented by pretrain and finetune.

A task turns a pack into a `Micro` (everything one forward needs, already on the device, with the
count its loss is normalised by) and computes the *sum* of the loss over what it counted. The loop
divides by the global count, over all ranks and packs of the step, so a rank with few tokens is
never over-weighted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anycontrast_datasets.batch import PackedBatch


@dataclass(frozen=True)
class Micro:
    """One forward and backward: inputs and what they weigh."""

    inputs: Any
    """Whatever `Task.loss` reads, on the device."""
    count: int
    """What the summed loss is divided by, e.g. decoded hidden tokens; >= 0."""
    num_tokens: int
    """Tokens of the pack, for tokens_per_s."""
    study_ids: tuple[str, ...]
    """For error messages: which studies were in a bad step."""


Parts = dict[str, tuple[Tensor, Tensor]]
"""`name -> (sum, count)`, detached scalars, logged as `name`: `loss/contrast/FLAIR`, `dice`, ..."""


@dataclass(frozen=True)
class Validation:
    """What a validation found."""

    metrics: Mapping[str, float]
    """Logged as they are named, e.g. `val/dice`."""
    is_best: bool = False
    """The best so far: the loop saves this step, names it in `best.json` and keeps it."""


class Task(Protocol):
    """A job the loop can train. Every rank builds the same one."""

    @property
    def kind(self) -> str:
        """`amae` or `segmenter`; goes into the checkpoint."""
        ...

    @property
    def model(self) -> nn.Module:
        """On the CPU in float32, freshly initialised from the seed (the same on every rank)."""
        ...

    @property
    def model_config(self) -> Mapping[str, Any]:
        """JSON: enough to build `model` again; goes into the checkpoint."""
        ...

    def prepare(self, batch: PackedBatch, *, step: int, device: torch.device) -> Micro:
        """Mask, crop or label a pack and move it to the device."""
        ...

    def loss(self, model: nn.Module, micro: Micro) -> tuple[Tensor, Parts]:
        """Return the summed loss (float32 scalar with a graph) and its detached parts.

        Called inside the engine (autocast, ZeRO hooks): use `model` only by calling it.
        """
        ...

    def panels(self, model: nn.Module, micro: Micro, *, step: int, folder: Path) -> None:
        """Draw pictures, of `micro` or of a fixed study. Every rank calls it, rank 0 writes.

        Called without gradients, in eval mode and the engine's precision, as `validate` is.
        """
        ...

    def validate(self, model: nn.Module, *, step: int) -> Validation | None:
        """Measure the model, or return None. Every rank calls it, rank 0's answer counts."""
        ...
