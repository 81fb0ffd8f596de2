"""Which implementation of attention runs: decided once per situation, logged once.

A back end says why it cannot run, or is probed against the plain definition (forward and every
gradient) before it is trusted. The first that passes runs. Ending on a slower path is a warning
with the reason, never silent. One can be ordered by name: in the call, by `ANYCONTRAST_ATTN`, or
for the process by `order_backend`, in this order; one that cannot be carried out is an error.

Letters: Tq / Tk tokens, H heads, D head dim.
"""

import importlib.metadata
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anycontrast_kernels import reference
from anycontrast_kernels.sequences import Sequences, sequences

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENVIRONMENT_VARIABLE = "ANYCONTRAST_ATTN"
FAST_HEAD_DIM = 64

PROBE_LENGTHS_Q = (33, 1, 0, 70, 9)
PROBE_LENGTHS_K = (5, 64, 3, 129, 0)
PROBE_PADDING = 7
"""Tokens after the last sequence."""
PROBE_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
    torch.float64: 1e-4,
}
"""Largest allowed |difference| to the float32 definition, inputs of unit variance."""


class Forward(Protocol):
    """How a back end attends; see `attention.varlen_attention` for the arguments."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences_q: Sequences,
        sequences_k: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the output [Tq, H, D] and the log-sum-exp [H, Tq] its backward pass needs."""
        ...


class Backward(Protocol):
    """How a back end differentiates; `grad` is contiguous."""

    def __call__(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences_q: Sequences,
        sequences_k: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, contiguous and in their dtype."""
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
class Backend:
    """One implementation. Both functions run below autograd."""

    name: str
    forward: Forward
    backward: Backward
    refusal: Callable[[Situation], str | None]
    """Why it cannot run in a situation, or None."""
    is_native: Callable[[Situation], bool]
    """Whether it is an intended path there; choosing it otherwise is a warning."""


_chosen: dict[tuple[object, ...], Backend] = {}
_ordered: str | None = None


def order_backend(name: str | None) -> None:
    """Order a back end for the whole process, as a configuration does; None takes it back.

    Not between a forward pass and its backward pass, which must run in the same back end. The
    environment variable and the argument of a call go before it. Whether it exists and can run
    is found out by the first call.
    """
    global _ordered
    _ordered = name


def choose(
    backends: Sequence[Backend], situation: Situation, *, backend: str | None = None
) -> Backend:
    """Return the first usable back end, or the one ordered by name.

    Args:
        backends: in order of preference.
        situation: device, dtype and head dim of the call.
        backend: name of a back end; default the environment variable `ANYCONTRAST_ATTN`, then
            `order_backend`, and without either the first that is usable and passes the probe.

    Raises:
        ValueError: an unknown name, or the named back end cannot run here.
        RuntimeError: no back end can run here.
    """
    orders = {
        "backend": backend,
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE) or None,
        "the configured back end": _ordered,
    }
    source, wanted = next((o for o in orders.items() if o[1] is not None), ("nobody", None))
    key = (situation, wanted, backends)
    if key not in _chosen:
        # A thread of its own has none of the caller's grad mode, autocast, hooks or operator.
        _chosen[key] = in_own_thread(lambda: _decide(backends, situation, source, wanted))
    return _chosen[key]


def in_own_thread(work: Callable[[], T]) -> T:
    """Run `work` in a new thread, where autograd works even inside a custom operator.

    Kernels go to the caller's CUDA stream.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def run() -> T:
        with torch.cuda.stream(stream):
            return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _decide(
    backends: Sequence[Backend], situation: Situation, source: str, wanted: str | None
) -> Backend:
    names = tuple(backend.name for backend in backends)
    if wanted is not None and wanted not in names:
        raise ValueError(f"attention: {source} must be one of {names}, got {wanted!r}")
    refusals: dict[str, str] = {}
    has_failed = False
    for backend in backends:
        if wanted not in (None, backend.name):
            continue
        reason = backend.refusal(situation)
        if reason is None:
            reason = _probe_failure(backend, situation)
            has_failed |= reason is not None
        if reason is None:
            _announce(backend, situation, refusals, has_failed)
            return backend
        refusals[backend.name] = reason
    if wanted is not None:
        raise ValueError(
            f"attention: {source}={wanted!r} cannot run here ({wanted}: {refusals[wanted]}); "
            f"choose another of {names} or leave it unset"
        )
    raise RuntimeError(
        f"attention: no implementation can run on {situation}: {_by_reason(refusals)}"
    )


def probe_error(backend: Backend, situation: Situation) -> float:
    """Largest difference of output and gradients to the float32 definition on a small case.

    Uneven lengths, a sequence without queries, one without keys, and padding at the end.
    """
    q, k, v, grad = _probe_inputs(situation)
    sequences_q, sequences_k = (
        sequences(lengths, situation.device, num_tokens=sum(lengths) + PROBE_PADDING)
        for lengths in (PROBE_LENGTHS_Q, PROBE_LENGTHS_K)
    )
    scale = 1.25 * situation.head_dim**-0.5
    out, lse = backend.forward(q, k, v, sequences_q, sequences_k, scale)
    gradients = backend.backward(grad, q, k, v, out, lse, sequences_q, sequences_k, scale)
    expected = _definition(q, k, v, grad, scale)
    differences = [
        (found.cpu().float() - right).abs().max()
        for found, right in zip((out, *gradients), expected, strict=True)
    ]
    return float(torch.stack(differences).max())


def _definition(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """Output and gradients of the plain definition in float32, 0 in the padding.

    On the CPU: an accelerator may be told to multiply float32 in fewer bits (TF32).
    """
    lengths = [PROBE_LENGTHS_Q, PROBE_LENGTHS_K, PROBE_LENGTHS_K]
    inputs = [
        x[: sum(n)].detach().cpu().float().clone().requires_grad_()
        for x, n in zip((q, k, v), lengths, strict=True)
    ]
    out = reference.attention(
        *inputs, lengths_q=PROBE_LENGTHS_Q, lengths_k=PROBE_LENGTHS_K, scale=scale
    )
    found = [out, *torch.autograd.grad(out, inputs, grad[: out.shape[0]].cpu().float())]
    return [F.pad(x.detach(), (0, 0, 0, 0, 0, PROBE_PADDING)) for x in found]


def _probe_inputs(situation: Situation) -> list[Tensor]:
    """Query, key, value and output gradient; drawn without touching the global generator.

    Query, key and value are strided views of one tensor each, as a model hands them over.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(sum(n) + PROBE_PADDING, 3, 2, situation.head_dim, generator=generator)
        for n in (PROBE_LENGTHS_Q, PROBE_LENGTHS_K, PROBE_LENGTHS_K, PROBE_LENGTHS_Q)
    ]
    q, k, v, grad = (x.to(situation.device, situation.dtype)[:, 1] for x in drawn)
    return [q, k, v, grad.contiguous()]


def _probe_failure(backend: Backend, situation: Situation) -> str | None:
    # Whatever a kernel, its compiler or a foreign package throws is a reason to pass it over.
    try:
        error = probe_error(backend, situation)
    except Exception as failure:
        first_line = str(failure).partition("\n")[0]
        return f"the probe failed with {type(failure).__name__}: {first_line}"
    tolerance = PROBE_TOLERANCE[situation.dtype]
    # Written so that NaN fails too.
    if not error <= tolerance:
        return f"the probe is off by {error:.3g}, allowed {tolerance:.3g}"
    return None


def _announce(
    backend: Backend, situation: Situation, refusals: Mapping[str, str], has_failed: bool
) -> None:
    """Log the choice; as a warning if it is slow here, or if one that should run failed."""
    is_slow = not backend.is_native(situation)
    logger.log(
        logging.WARNING if is_slow or has_failed else logging.INFO,
        "attention runs as %r%s (%s, %s, head dim %d; %s); passed over: %s",
        backend.name,
        ", which is slower" if is_slow else "",
        _place(situation.device),
        situation.dtype,
        situation.head_dim,
        _versions(),
        _by_reason(refusals) or "nothing",
    )
    if situation.head_dim < FAST_HEAD_DIM:
        logger.warning(
            "attention with head dim %d runs at a fraction of the speed of %d or 128: use fewer, "
            "wider heads",
            situation.head_dim,
            FAST_HEAD_DIM,
        )


def _by_reason(refusals: Mapping[str, str]) -> str:
    """Names that share a reason, then the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in refusals.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(who)}: {reason}" for reason, who in names.items())


def _place(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> str:
    """Versions of what may compute attention, as installed."""
    found = [f"torch {torch.__version__}"]
    for package in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
