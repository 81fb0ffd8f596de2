"""The engine: DeepSpeed behind five verbs, and the only file that imports it.

`loss -> backward` for every pack of a step, then `step`. Weights, gradients, reductions and
optimiser state are float32 at every ZeRO stage; bf16 means autocast around the forward. That costs
memory and traffic against DeepSpeed's own bf16 mode and buys stages that give the same numbers, and
checkpoints without rounding.

A non-finite loss is turned into non-finite gradients, so that the global gradient norm (already
all-reduced) decides on every rank alike, before the optimiser moves: no extra collective.

State is saved per parameter, not per partition, as safetensors (see `optimizer_state`): any world
size and any ZeRO stage can go on from it, and no pickle is read.
"""

import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anycontrast.training.optim import OptimConfig, build_adamw
from anycontrast.training.process_group import device, rank, world_size
from anycontrast.training.task import Micro, Parts, Task

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per parameter, beside the count of applied steps."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed holds the model."""

    zero_stage: int = 1
    """0 nothing sharded, 1 optimiser state, 2 and gradients, 3 and parameters."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 = autocast; weights, gradients, optimiser and reductions stay float32. `auto`: bf16 on
    CUDA, fp32 on CPU."""
    offload_optimizer: bool = False
    """Keep optimiser state and its step in host memory; needs zero_stage >= 1."""
    max_bad_steps: int = 10
    """Stop after this many non-finite steps in a row."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "engine.offload_optimizer needs zero_stage >= 1, got 0; set engine.zero_stage=1"
            )
        if self.max_bad_steps < 1:
            raise ValueError(f"engine.max_bad_steps must be >= 1, got {self.max_bad_steps}")


class _TaskModule(nn.Module):
    """The task's loss as a module, so that autocast and ZeRO hooks wrap all of it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._loss = task.loss

    def forward(self, micro: Micro) -> tuple[Tensor, Parts]:
        """Return the summed loss and its detached parts."""
        return self._loss(self.model, micro)


class Engine:
    """A model under DeepSpeed.

    Args:
        task: gives model and loss.
        config: ZeRO stage, precision, offload.
        optim: AdamW settings; the loop sets the learning rate of every step.
        accumulation: packs per step on this rank, the same on every rank.
    """

    def __init__(
        self, task: Task, config: EngineConfig, optim: OptimConfig, *, accumulation: int = 1
    ) -> None:
        self.device = device()
        self.stage = config.zero_stage
        self.precision = resolve_precision(config.precision, self.device)
        self.skipped_steps = 0
        self.bad_steps_in_a_row = 0
        self.grad_norm = 0.0
        self._clip_norm = optim.clip_norm
        self._names = {id(p): name for name, p in task.model.named_parameters()}
        self._adamw = build_adamw(task.model, optim)
        prepare_deepspeed()
        import deepspeed

        with _launch_environment(), warnings.catch_warnings():
            # DeepSpeed imports its compiled optimisers, whose decorators are deprecated in torch.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._deepspeed, *_ = deepspeed.initialize(
                model=_TaskModule(task),
                optimizer=self._adamw,
                config=_deepspeed_config(config, self.precision, optim, accumulation),
                dist_init_required=False,
            )
        self._fill_adam_state()

    @property
    def module(self) -> nn.Module:
        """The task's model; under ZeRO-3 every rank must call it alike."""
        model: nn.Module = self._deepspeed.module.model
        return model

    def loss(self, micro: Micro) -> tuple[Tensor, Parts]:
        """Run the forward of one pack: the summed loss, float32 scalar, and its parts."""
        loss, parts = self._deepspeed(micro)
        return loss, parts

    def backward(self, loss_sum: Tensor, global_count: float) -> None:
        """Accumulate the gradient of `loss_sum / global_count`.

        DeepSpeed averages over ranks, so the loss is multiplied by the world size here and not
        divided by the accumulation; the result is the gradient of the global sum over the global
        count, however tokens are spread over ranks and packs.
        """
        loss = loss_sum * (world_size() / global_count)
        # x * nan reaches every gradient, where a non-finite loss alone may not.
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
        self._deepspeed.backward(loss * poison, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()

    def step(self) -> bool:
        """Clip and apply the accumulated gradient after the last pack of a step.

        Returns:
            Whether it was applied: False on every rank when it was not finite on any.
        """
        norm = self._clip_unsharded() if self.stage == 0 else math.nan
        self._deepspeed.step()
        if self.stage > 0:
            norm = float(self._deepspeed.get_global_grad_norm())
        is_applied = math.isfinite(norm)
        self.grad_norm = norm
        self.skipped_steps += not is_applied
        self.bad_steps_in_a_row = 0 if is_applied else self.bad_steps_in_a_row + 1
        return is_applied

    def set_lr(self, lr: float) -> None:
        """Use `lr` for the next step."""
        for group in self._adamw.param_groups:
            group["lr"] = lr

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """Lend the model in eval mode, without gradients and in the engine's precision."""
        self.module.eval()
        bf16 = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )
        try:
            with torch.no_grad(), bf16:
                yield self.module
        finally:
            self.module.train()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the whole model's weights on rank 0 (CPU, float32), nothing elsewhere.

        Every rank must call it; under ZeRO-3 one parameter at a time is gathered.
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        whole: dict[str, Tensor] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            gathered = [tensor] if hasattr(tensor, "ds_id") else []
            with GatheredParameters(gathered, enabled=bool(gathered)):
                if rank() == 0:
                    whole[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return whole

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return this rank's share of AdamW's moments, whole tensors on the CPU.

        Parameter number i belongs to rank i modulo the world size. Every rank must call it.
        """
        share: dict[str, Tensor] = {}
        for index, (name, parameter) in enumerate(self._trainable()):
            for moment in MOMENTS:
                value = self._full_moment(parameter, moment)
                if index % world_size() == rank():
                    share[f"{name}/{moment}"] = value.to("cpu", copy=True).contiguous()
        return share

    def applied_steps(self) -> int:
        """Return how many optimiser steps have been applied (AdamW's own count)."""
        return int(next(iter(self._adamw.state.values()))["step"].item())

    def load_optimizer_state(self, moments: Mapping[str, Tensor], applied_steps: int) -> None:
        """Take over AdamW's moments, given whole on every rank.

        Args:
            moments: `<parameter name>/<moment>` for every trainable parameter.
            applied_steps: AdamW's count, for its bias correction.

        Raises:
            KeyError: a parameter's moments are missing.
        """
        for name, parameter in self._trainable():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, moments[f"{name}/{moment}"])
        for state in self._adamw.state.values():
            state["step"].fill_(float(applied_steps))

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                yield self._names[id(parameter)], parameter

    def _clip_unsharded(self) -> float:
        """Stage 0: DeepSpeed would apply a NaN; clip here and drop the gradients instead."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        bound = self._clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, bound))
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        return norm

    def _flat_parameters(self) -> list[Tensor]:
        """The tensors AdamW really steps: this rank's float32 partitions, or the parameters."""
        sharded = self._deepspeed.optimizer
        if self.stage == 3:
            return list(sharded.fp32_partitioned_groups_flat)
        if self.stage > 0:
            return list(sharded.single_partition_of_fp32_groups)
        return [parameter for _, parameter in self._trainable()]

    def _fill_adam_state(self) -> None:
        """Make AdamW's state as its first step would, so saving and loading know one case."""
        for flat in self._flat_parameters():
            self._adamw.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        if self.stage in (1, 2):
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _full_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        value: Tensor
        if self.stage == 0:
            value = self._adamw.state[parameter][moment]
        else:
            value = safe_get_full_optimizer_state(parameter, moment)
        # Under ZeRO-3 the parameter's own shape is that of its local shard.
        return value.view(getattr(parameter, "ds_shape", parameter.shape))

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        if self.stage == 0:
            self._adamw.state[parameter][moment].copy_(value)
        elif self.stage in (1, 2):
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            size = safe_get_local_optimizer_state(parameter, moment).numel()
            # ZeRO-3 pads a parameter to a whole number of elements per rank.
            padded = torch.zeros(size * world_size(), dtype=value.dtype)
            padded[: value.numel()] = value.flatten()
            mine = padded[size * rank() : size * (rank() + 1)]
            safe_set_local_optimizer_state(parameter, mine, moment)


def resolve_precision(precision: str, where: torch.device) -> str:
    """Return `fp32` or `bf16`; `auto` means bf16 on CUDA and fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if where.type == "cuda" else "fp32"


def prepare_deepspeed() -> None:
    """Import DeepSpeed so that it builds nothing, shares no build cache and keeps quiet."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The default cache is shared between environments and its lock outlives a killed build.
    cache = Path(sys.prefix) / "var" / "anycontrast" / "torch_extensions"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache))
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    # Its warnings repeat what the loop reports with study ids.
    deepspeed_logger.setLevel(logging.ERROR)
    # Drop once DeepSpeed calls the successors of these collectives.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Compiled at first use (40 s) and never used: it needs a launcher that sets LOCAL_SIZE.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _deepspeed_config(
    config: EngineConfig, precision: str, optim: OptimConfig, accumulation: int
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if torch.cuda.is_available():
        zero["overlap_comm"] = config.zero_stage >= 2
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip_norm if config.zero_stage > 0 else 0.0,
        "steps_per_print": 2**62,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # No module is named as safe for lower precision: gradients are reduced in float32.
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


@contextmanager
def _launch_environment() -> Iterator[None]:
    """Give DeepSpeed the launcher variables it reads, for the ones nobody has set."""
    local_rank = torch.cuda.current_device() if torch.cuda.is_available() else 0
    # Read in every ZeRO-3 step, so it stays; the others would make the process look launched.
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    wanted = {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    missing = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing:
            os.environ.pop(key, None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
