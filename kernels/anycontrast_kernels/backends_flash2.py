"""Attention by the package flash-attn, version 2: the kernels torch ships too, of another release.

Letters: Tq tokens, H heads, D head dim.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from anycontrast_kernels import backends_torch
from anycontrast_kernels.dispatch import Situation
from anycontrast_kernels.sequences import Sequences, clear_padding


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences_q: Sequences,
    sequences_k: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `dispatch.Forward`."""
    out, lse, *_ = _package()._flash_attn_varlen_forward(
        q,
        k,
        v,
        sequences_q.cu_seqlens,
        sequences_k.cu_seqlens,
        sequences_q.max_len,
        sequences_k.max_len,
        0.0,
        scale,
        False,
    )
    return clear_padding(out.contiguous(), sequences_q), lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dispatch.Backward`; deterministic if torch is told to be."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _package()._flash_attn_varlen_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        sequences_q.cu_seqlens,
        sequences_k.cu_seqlens,
        sequences_q.max_len,
        sequences_k.max_len,
        0.0,
        scale,
        False,
        -1,
        -1,
        0.0,
        None,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        clear_padding(dq, sequences_q),
        clear_padding(dk, sequences_k),
        clear_padding(dv, sequences_k),
    )


def _package() -> Any:
    return import_module("flash_attn.flash_attn_interface")


def refusal(situation: Situation) -> str | None:
    """Why flash-attn 2 cannot run, or None."""
    is_there = find_spec("flash_attn") and find_spec("flash_attn.flash_attn_interface")
    return backends_torch.device_refusal(situation) or (
        None if is_there else "flash_attn.flash_attn_interface is not installed"
    )
