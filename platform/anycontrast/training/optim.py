"""AdamW: which parameters decay, and the learning rate as a pure function of the step.

Warm-up and cosine move once per optimiser step, never per epoch, so the schedule needs no state of
its own: a resumed run recomputes it from the step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Parameters that scale or shift rather than project: decaying them pulls the model to a wrong zero.
_NO_DECAY_NAMES = ("bias", "embedding", "token", "scale", "shift", "gain", "position")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1.5e-4
    """Peak learning rate, as it is used: nothing scales it by the batch size."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    """Applied to projection matrices only."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to `lr`; counted inside the run's steps."""
    min_lr_fraction: float = 0.0
    """Learning rate at the last step as a fraction of `lr`."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 means no clipping."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"optim.lr must be > 0 and finite, got {self.lr}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be in 0 <= beta < 1, got {self.betas}")
        for name in ("weight_decay", "warmup_steps", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.min_lr_fraction <= 1:
            raise ValueError(f"optim.min_lr_fraction must be in 0..1, got {self.min_lr_fraction}")


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of optimiser step `step`, the first being 0.

    Linear warm-up, then `min + (peak - min) * (1 + cos) / 2`; the last step reaches the minimum.

    Source: He et al., Masked Autoencoders, 2022: schedule of the released pretraining.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.lr * config.min_lr_fraction
    span = max(num_steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    return low + (config.lr - low) * (1.0 + math.cos(math.pi * done)) / 2.0


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices that project, not to tables, tokens or norms."""
    own_name = name.rsplit(".", 1)[-1].lower()
    return parameter.ndim >= 2 and not any(word in own_name for word in _NO_DECAY_NAMES)


def _table_names(model: nn.Module) -> set[str]:
    """Names of parameters owned by embedding or norm layers, whatever they are called."""
    tables = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm3d)
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, tables)
        for name, _ in module.named_parameters(recurse=False)
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into a decayed and an undecayed group, in model order.

    Empty groups are left out: ZeRO partitions every group it is given.
    """
    tables = _table_names(model)

    def chosen(decayed: bool) -> Iterator[nn.Parameter]:
        for name, parameter in model.named_parameters():
            is_decayed = name not in tables and decays(name, parameter)
            if parameter.requires_grad and is_decayed == decayed:
                yield parameter

    groups = [
        {"params": list(chosen(True)), "weight_decay": weight_decay},
        {"params": list(chosen(False)), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return torch's fused AdamW over the two groups: one pass over weights and moments.

    It is part of torch, so nothing is built at run time.
    """
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
