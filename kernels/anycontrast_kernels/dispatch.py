"""Which implementation of an operation runs: decided once per situation, logged once.

A candidate says why it cannot run, or is probed against the plain definition (forward and every
gradient) before it is trusted. The first that passes runs. Ending on a slower path is a warning
with the reason, never silent. `ANYCONTRAST_ATTN` orders one by name; an order that cannot be
carried out is an error.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from anycontrast_kernels import reference

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "ANYCONTRAST_ATTN"

PROBE_LENGTHS_Q = (33, 1, 0, 70)
PROBE_LENGTHS_K = (5, 64, 3, 129)
PROBE_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
    torch.float64: 1e-4,
}
"""Largest allowed |difference| to the float32 definition, inputs of unit variance."""


class AttentionFunction(Protocol):
    """What every implementation looks like; see `attention.varlen_attention` for the arguments."""

    def __call__(
        self,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        """Return [Tq, H, D]."""
        ...


@dataclass(frozen=True)
class Situation:
    """What a choice depends on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of a CUDA device, None elsewhere."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.get_device_capability(self.device)


@dataclass(frozen=True)
class Candidate:
    """One implementation."""

    name: str
    run: AttentionFunction
    refusal: Callable[[Situation], str | None]
    """Why it cannot run in a situation, or None."""
    is_native: Callable[[Situation], bool]
    """Whether it is the intended path there; choosing it otherwise is a warning."""


_chosen: dict[tuple[object, ...], Candidate] = {}


def choose(
    candidates: Sequence[Candidate], situation: Situation, *, backend: str | None = None
) -> Candidate:
    """Return the first usable candidate, or the one ordered by name.

    Args:
        candidates: in order of preference.
        situation: device, dtype and head dim of the call.
        backend: name of a candidate; default the environment variable `ANYCONTRAST_ATTN`, and
            without it the first candidate that is usable and passes the probe.

    Raises:
        ValueError: an unknown name, or the named candidate cannot run here.
        RuntimeError: no candidate can run here.
    """
    source = "backend" if backend is not None else ENVIRONMENT_VARIABLE
    wanted = backend if backend is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None
    names = tuple(candidate.name for candidate in candidates)
    key = (
        situation.device.type,
        situation.capability,
        situation.dtype,
        situation.head_dim,
        wanted,
        names,
    )
    if key in _chosen:
        return _chosen[key]
    if wanted is not None and wanted not in names:
        raise ValueError(f"attention: {source} must be one of {names}, got {wanted!r}")
    pool = [c for c in candidates if wanted in (None, c.name)]
    refusals: list[str] = []
    for candidate in pool:
        reason = candidate.refusal(situation) or _probe_failure(candidate.run, situation)
        if reason is None:
            _announce(candidate, situation, refusals)
            _chosen[key] = candidate
            return candidate
        refusals.append(f"{candidate.name}: {reason}")
    if wanted is not None:
        raise ValueError(
            f"attention: {source}={wanted!r} cannot run here ({refusals[0]}); "
            f"choose another of {names} or leave it unset"
        )
    raise RuntimeError(f"attention: no implementation can run on {situation}: {refusals}")


def probe_error(run: AttentionFunction, situation: Situation) -> float:
    """Largest difference of output and gradients to the float32 definition on a small case."""
    # Identity hooks keep an enclosing activation checkpoint from counting what is saved here.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(situation.device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        q, k, v, grad = _probe_inputs(situation)
        cu_q, cu_k = (
            torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=situation.device)
            for n in (PROBE_LENGTHS_Q, PROBE_LENGTHS_K)
        )
        # q.float() is q itself where q is float32 already, hence the copies.
        a, b, c = (x.clone().float().requires_grad_() for x in (q, k, v))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        lengths_q, lengths_k = PROBE_LENGTHS_Q, PROBE_LENGTHS_K
        out = run(q, k, v, cu_q, cu_k, lengths_q=lengths_q, lengths_k=lengths_k, scale=None)
        oracle = reference.attention(a, b, c, lengths_q=lengths_q, lengths_k=lengths_k)
        found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        expected = [oracle, *torch.autograd.grad(oracle, (a, b, c), grad.float())]
        pairs = zip(found, expected, strict=True)
        differences = torch.stack([(x.float() - y).abs().max() for x, y in pairs])
        return float(differences.detach().max())


def _probe_inputs(situation: Situation) -> list[Tensor]:
    """Query, key, value and output gradient; drawn without touching the global generator."""
    generator = torch.Generator().manual_seed(0)
    shape_q = (sum(PROBE_LENGTHS_Q), 2, situation.head_dim)
    shape_k = (sum(PROBE_LENGTHS_K), 2, situation.head_dim)
    return [
        torch.randn(shape, generator=generator).to(situation.device, situation.dtype)
        for shape in (shape_q, shape_k, shape_k, shape_q)
    ]


def _probe_failure(run: AttentionFunction, situation: Situation) -> str | None:
    try:
        error = probe_error(run, situation)
    except (RuntimeError, NotImplementedError, TypeError) as failure:
        first_line = str(failure).partition("\n")[0]
        return f"the probe failed with {type(failure).__name__}: {first_line}"
    tolerance = PROBE_TOLERANCE[situation.dtype]
    # Written so that NaN fails too.
    if not error <= tolerance:
        return f"the probe is off by {error:.3g}, allowed {tolerance:.3g}"
    return None


def _announce(candidate: Candidate, situation: Situation, refusals: Sequence[str]) -> None:
    place = f"{situation.device.type}, {situation.dtype}, head dim {situation.head_dim}"
    if candidate.is_native(situation):
        logger.info("attention runs as %r (%s, torch %s)", candidate.name, place, torch.__version__)
    else:
        logger.warning(
            "attention runs as %r (%s, torch %s), which is slower; passed over: %s",
            candidate.name,
            place,
            torch.__version__,
            "; ".join(refusals) or "nothing, it was ordered by name",
        )
