"""Attention by the variable-length operator of torch: FlashAttention 2 as shipped, or 3 and 4.

`varlen_attn` keeps the log-sum-exp to itself, so its operator is called, with the seven arguments
that every release has. They hold no scale: another one than 1 / sqrt(D) is folded into the
queries. torch swaps the kernels below its operator for FlashAttention 3 or 4 if it is told to; this
happens for the whole process, `scaled_dot_product_attention` included.

Letters: Tq tokens, H heads, D head dim.
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from anycontrast_kernels.dispatch import Situation
from anycontrast_kernels.sequences import Sequences, clear_padding

MAX_HEAD_DIM = 256
PROVIDERS = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
"""Module that brings the kernels."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences_q: Sequences,
    sequences_k: Sequences,
    scale: float,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `dispatch.Forward`; `implementation` is `FA3`, `FA4` or None for what torch ships."""
    _activate(implementation)
    factor = scale * math.sqrt(q.shape[-1])
    with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
        out, lse, _ = _operators()._varlen_attn(
            _times(q, factor), k, v, *_places(sequences_q, sequences_k)
        )
    return clear_padding(out, sequences_q), lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences_q: Sequences,
    sequences_k: Sequences,
    scale: float,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dispatch.Backward`; `implementation` as in `forward`."""
    _activate(implementation)
    factor = scale * math.sqrt(q.shape[-1])
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
        dq, dk, dv = _operators()._varlen_attn_backward(
            grad,
            _times(q, factor),
            k,
            v,
            out,
            lse,
            *_places(sequences_q, sequences_k),
            False,
            random_state,
        )
    return (
        clear_padding(_times(dq.contiguous(), factor), sequences_q),
        clear_padding(dk.contiguous(), sequences_k),
        clear_padding(dv.contiguous(), sequences_k),
    )


def device_refusal(situation: Situation) -> str | None:
    """Why the kernels of FlashAttention 2 cannot run, or None."""
    if situation.device.type != "cuda":
        return f"needs a CUDA device, this is {situation.device.type}"
    if situation.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, this is {situation.dtype}"
    if situation.head_dim % 8 or situation.head_dim > MAX_HEAD_DIM:
        return f"needs a head dim that is a multiple of 8 up to 256, this is {situation.head_dim}"
    capability = situation.capability
    if capability is not None and capability < (8, 0):
        return f"needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
    return None


def refusal(situation: Situation) -> str | None:
    """Why the operator of torch cannot run, or None."""
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return device_refusal(situation)


def flash_refusal(implementation: str, situation: Situation) -> str | None:
    """Why FlashAttention 3 or 4 cannot run below the operator of torch, or None."""
    found = refusal(situation)
    if found is not None:
        return found
    # FlashAttention 4 has a backward pass from Hopper on; 3 is for Hopper alone.
    capability = situation.capability or (0, 0)
    if capability[0] != 9 and (implementation == "FA3" or capability[0] != 10):
        needed = "9.x" if implementation == "FA3" else "9.x or 10.x"
        return f"needs compute capability {needed}, this is {capability[0]}.{capability[1]}"
    package, _, rest = PROVIDERS[implementation].partition(".")
    if find_spec(package) is None or (rest and find_spec(PROVIDERS[implementation]) is None):
        return f"{PROVIDERS[implementation]} is not installed"
    if not hasattr(torch_attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} cannot be told to use it"
    if implementation not in torch_attention.list_flash_attention_impls():
        return f"torch {torch.__version__} does not know {implementation}"
    return None


def _activate(implementation: str | None) -> None:
    """Put the given kernels below the operator of torch, for the whole process."""
    if not hasattr(torch_attention, "current_flash_attention_impl"):
        return
    if torch_attention.current_flash_attention_impl() == implementation:
        return
    if implementation is None:
        torch_attention.restore_flash_attention_impl()
    else:
        torch_attention.activate_flash_attention_impl(implementation)


def _operators() -> Any:
    import torch.nn.attention.varlen  # importing it registers the operators

    return torch.ops.torch_attn


def _places(sequences_q: Sequences, sequences_k: Sequences) -> tuple[Tensor, Tensor, int, int]:
    return (
        sequences_q.cu_seqlens,
        sequences_k.cu_seqlens,
        sequences_q.max_len,
        sequences_k.max_len,
    )


def _times(x: Tensor, factor: float) -> Tensor:
    return x if abs(factor - 1.0) < 1e-6 else x * factor
