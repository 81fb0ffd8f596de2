"""Linear layers that run at the machine's speed on CPUs for which MKL has no fast path.

On CPU torch multiplies float32 matrices with MKL, which keeps its best kernels for processors of
its own maker: elsewhere oneDNN, which torch carries too and which looks at the instruction set
alone, needs a quarter less CPU time for the same products. Accelerators, other dtypes and autocast
take torch's own path, untouched.

Letters: M rows, K features in, N features out.
"""

import logging
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "ANYCONTRAST_LINEAR"
CHOICES = ("onednn", "torch")

MOST_ROWS = 2048
LEAST_ROWS = 64
"""oneDNN keeps about half a megabyte for every shape it has met, so rows go through it in pieces of
2048, 1024, ..., 64; what is left goes through torch. A ragged run then meets few shapes."""
LEAST_WORK = 64 * 384 * 384
"""Products below this size (M K N) are faster without the detour."""
PROBE_TOLERANCE = 1e-4
"""Largest allowed |difference| to float64 of products of 96 to 192 terms of unit variance."""


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Multiply by a weight and add a bias, as `torch.nn.functional.linear`; differentiable once.

    Args:
        x_MK: [..., K].
        weight_NK: [N, K].
        bias_N: [N] or None.

    Returns:
        [..., N]; under autocast in its dtype.

    Raises:
        ValueError: the environment variable `ANYCONTRAST_LINEAR` orders what cannot run here.
    """
    # Compiled code asks in the operator: the choice looks at files and environment.
    if _could_pay(x_MK, weight_NK) and (torch.compiler.is_compiling() or is_onednn_chosen()):
        product: Tensor = _linear(x_MK.flatten(0, -2), weight_NK, bias_N)
        return product if x_MK.ndim == 2 else product.view(*x_MK.shape[:-1], len(weight_NK))
    return F.linear(x_MK, weight_NK, bias_N)


def _could_pay(x_MK: Tensor, weight_NK: Tensor) -> bool:
    num_rows = math.prod(x_MK.shape[:-1])
    return (
        x_MK.device.type == "cpu"
        and weight_NK.device.type == "cpu"
        and weight_NK.ndim == 2
        and x_MK.dtype == weight_NK.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and num_rows >= LEAST_ROWS
        and num_rows * weight_NK.shape[0] * weight_NK.shape[1] >= LEAST_WORK
    )


@cache
def is_onednn_chosen() -> bool:
    """Whether oneDNN multiplies float32 matrices on this CPU, and not torch; logged once.

    By the maker of the processor, not by timing, so that a run repeats bit for bit; overruled by
    the environment variable `ANYCONTRAST_LINEAR`.

    Raises:
        ValueError: the variable orders something unknown or unusable.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if wanted not in (None, *CHOICES):
        raise ValueError(
            f"linear: {ENVIRONMENT_VARIABLE} must be one of {CHOICES}, got {wanted!r}; unset it to "
            "have one chosen"
        )
    if wanted == "torch":
        return False
    failure = _onednn_failure()
    if wanted == "onednn" and failure is not None:
        raise ValueError(
            f"linear: {ENVIRONMENT_VARIABLE}=onednn cannot run here ({failure}); unset it"
        )
    reason = failure
    if wanted is None and failure is None and _vendor() != "AuthenticAMD":
        reason = f"MKL is fast on a CPU of {_vendor() or 'this make'}"
    logger.info(
        "float32 products on CPU run in %s (torch %s): %s",
        "oneDNN" if reason is None else "torch's own way",
        torch.__version__,
        reason or "MKL has no fast path for this CPU, oneDNN has; the probe agrees",
    )
    return reason is None


def _vendor() -> str:
    """Maker of the CPU as Linux names it; empty where it does not."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(errors="replace").splitlines() if cpu_info.is_file() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("vendor_id")), "")


def _onednn_failure() -> str | None:
    """Why oneDNN's products cannot be used here, or None."""
    if not (torch._C._has_mkldnn and torch.backends.mkldnn.enabled):
        return "torch has no oneDNN or it is switched off"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"the CPU offers {torch.backends.cpu.get_cpu_capability()} only"
    # An operator of torch's compiler without a promise of stability: whatever it throws counts.
    try:
        error = _probe_error()
    except Exception as failure:
        return (
            f"the probe failed with {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        )
    # Written so that NaN fails too.
    if not error <= PROBE_TOLERANCE:
        return f"the probe is off by {error:.3g}, allowed {PROBE_TOLERANCE:.3g}"
    return None


@torch.no_grad()
def _probe_error() -> float:
    """Largest difference to float64 of product, input gradient and weight gradient."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((192, 96), (160, 96), (160,), (192, 160))
    )
    x64, weight64, grad64 = x.double(), weight.double(), grad.double()
    pairs = (
        (_product(x, weight, bias), x64 @ weight64.T + bias),
        (_product(grad, weight.t(), None), grad64 @ weight64),
        (_product(grad.t(), x.t(), None), grad64.T @ x64),
    )
    return max(float((found - expected).abs().max()) for found, expected in pairs)


def _product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return a @ b.T + bias by oneDNN.

    `b_NK` must be contiguous or the transpose of a contiguous tensor: any other layout ends in a
    path that is a thousand times slower.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")
    return product


def _pieces(num_rows: int, work_per_row: int) -> list[int]:
    """Split rows into pieces for oneDNN and, as the last one, what is left for torch."""
    pieces, size = [], MOST_ROWS
    while size >= LEAST_ROWS and size * work_per_row >= LEAST_WORK:
        while num_rows >= size:
            pieces.append(size)
            num_rows -= size
        size //= 2
    return [*pieces, num_rows]


@torch.library.custom_op("anycontrast::linear", mutates_args=())
def _linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if not (weight_NK.is_contiguous() or weight_NK.t().is_contiguous()):
        weight_NK = weight_NK.contiguous()
    if not is_onednn_chosen():
        return F.linear(x_MK, weight_NK, bias_N)
    pieces = _pieces(x_MK.shape[0], weight_NK.numel())
    *bulk, rest = torch.split(x_MK, pieces)
    products = [_product(x, weight_NK, bias_N) for x in bulk]
    if rest.shape[0] or not products:
        products.append(F.linear(rest, weight_NK, bias_N))
    return products[0] if len(products) == 1 else torch.cat(products)


@_linear.register_fake
def _(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])


@torch.library.custom_op("anycontrast::linear_weight_gradient", mutates_args=())
def _weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """grad.T @ x: [N, K]."""
    if not is_onednn_chosen():
        return grad_MN.t() @ x_MK
    pieces = _pieces(x_MK.shape[0], grad_MN.shape[1] * x_MK.shape[1])
    *bulk, (grad_rest, x_rest) = zip(
        torch.split(grad_MN, pieces), torch.split(x_MK.contiguous(), pieces), strict=True
    )
    total_NK: Tensor | None = None
    for grad, x in bulk:
        product = _product(grad.t(), x.t(), None)
        total_NK = product if total_NK is None else total_NK.add_(product)
    if total_NK is None:
        return grad_rest.t() @ x_rest
    return total_NK.addmm_(grad_rest.t(), x_rest) if x_rest.shape[0] else total_NK


@_weight_gradient.register_fake
def _(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    return x_MK.new_empty(grad_MN.shape[1], x_MK.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x_MK, weight_NK, bias_N = inputs
    ctx.save_for_backward(x_MK, weight_NK)
    ctx.has_bias = bias_N is not None


def _differentiate(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x_MK, weight_NK = ctx.saved_tensors
    grad_MN = grad_MN.contiguous()
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        _linear(grad_MN, weight_NK.t(), None) if for_x else None,
        _weight_gradient(grad_MN, x_MK) if for_weight else None,
        grad_MN.sum(0) if for_bias and ctx.has_bias else None,
    )


_linear.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.anycontrast.linear)
def _linear_flops(x_shape: Any, weight_shape: Any, *rest: Any, **options: Any) -> int:
    return 2 * int(x_shape[0]) * int(x_shape[1]) * int(weight_shape[0])


@register_flop_formula(torch.ops.anycontrast.linear_weight_gradient)
def _weight_gradient_flops(grad_shape: Any, x_shape: Any, *rest: Any, **options: Any) -> int:
    return 2 * int(x_shape[0]) * int(x_shape[1]) * int(grad_shape[1])
