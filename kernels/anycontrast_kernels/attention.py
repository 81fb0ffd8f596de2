"""Attention over packed sequences: every token attends to its own sequence, nothing is padded.

One call, `varlen_attention`, over one custom operator, so that `torch.compile` sees an opaque node
with static shapes. Which back end computes it is decided where it runs (`dispatch.choose`).

Letters: Tq / Tk tokens, C sequences, K tiles, H heads, D head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor

from anycontrast_kernels.backends import BACKENDS
from anycontrast_kernels.dispatch import Backend, Situation, choose
from anycontrast_kernels.sequences import Sequences, check_extent

MIN_HEAD_DIM = 32
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def varlen_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    sequences_q: Sequences,
    sequences_k: Sequences | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend non-causally within each sequence of a pack; differentiable once.

    A query of a sequence without keys gets 0, and so does a token after the last offset; the
    gradients there are 0 too.

    Args:
        q_THD: [Tq, H, D] float16, bfloat16, float32 or (CPU) float64; heads and head dim
            contiguous, the token stride is free.
        k_THD: [Tk, H, D], same dtype and device.
        v_THD: [Tk, H, D], same dtype and device.
        sequences_q: the sequences of `q_THD`, on the same device.
        sequences_k: the sequences of `k_THD`, as many; default those of `q_THD`.
        scale: factor of the scores, finite and > 0; default 1 / sqrt(D).
        backend: name of a back end (`backends.BACKENDS`); default by `dispatch.choose`.

    Returns:
        [Tq, H, D] in the dtype of `q_THD`, contiguous.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, head dim, device or offset breaks its rule, or `backend`
            cannot run here.
    """
    sequences_k = sequences_q if sequences_k is None else sequences_k
    _check_tensors(q_THD, k_THD, v_THD)
    _check_sequences("sequences_q", sequences_q, q_THD)
    _check_sequences("sequences_k", sequences_k, q_THD)
    if sequences_q.cu_seqlens.shape != sequences_k.cu_seqlens.shape:
        raise ValueError(
            "varlen_attention: sequences_q and sequences_k must have the same capacity, got "
            f"{len(sequences_q.cu_seqlens) - 1} and {len(sequences_k.cu_seqlens) - 1}"
        )
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"varlen_attention: scale must be finite and > 0, got {scale}")
    out_THD: Tensor
    out_THD, _ = _attention(
        q_THD,
        k_THD,
        v_THD,
        *sequences_q,
        *sequences_k,
        1.0 / math.sqrt(q_THD.shape[-1]) if scale is None else float(scale),
        backend,
    )
    return out_THD


@torch.library.custom_op("anycontrast::varlen_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    tiles_64_q: Tensor,
    tiles_128_q: Tensor,
    max_q: int,
    cu_k: Tensor,
    tiles_64_k: Tensor,
    tiles_128_k: Tensor,
    max_k: int,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [Tq, H, D] and, for the backward pass, the log-sum-exp [H, Tq]."""
    sequences_q = Sequences(cu_q, tiles_64_q, tiles_128_q, max_q)
    sequences_k = Sequences(cu_k, tiles_64_k, tiles_128_k, max_k)
    check_extent("varlen_attention: sequences_q", sequences_q, q.shape[0])
    check_extent("varlen_attention: sequences_k", sequences_k, k.shape[0])
    chosen = _chosen(q, backend)
    if q.shape[0] == 0 or k.shape[0] == 0:
        out, lse = _empty_outputs(q)
        return out.zero_(), lse.zero_()
    return chosen.forward(q, k, v, sequences_q, sequences_k, scale)


@_attention.register_fake
def _(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q)


@torch.library.custom_op("anycontrast::varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    tiles_64_q: Tensor,
    tiles_128_q: Tensor,
    max_q: int,
    cu_k: Tensor,
    tiles_64_k: Tensor,
    tiles_128_k: Tensor,
    max_k: int,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; contiguous."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    sequences_q = Sequences(cu_q, tiles_64_q, tiles_128_q, max_q)
    sequences_k = Sequences(cu_k, tiles_64_k, tiles_128_k, max_k)
    run = _chosen(q, backend).backward
    return run(grad.contiguous(), q, k, v, out, lse, sequences_q, sequences_k, scale)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, tiles_64_q, tiles_128_q, ctx.max_q, *keys, ctx.scale, ctx.backend = inputs
    *keys, ctx.max_k = keys
    ctx.save_for_backward(q, k, v, *output, cu_q, tiles_64_q, tiles_128_q, *keys)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    q, k, v, out, lse, *offsets = ctx.saved_tensors
    gradients = _attention_backward(
        grad, q, k, v, out, lse, *offsets[:3], ctx.max_q, *offsets[3:], ctx.max_k, ctx.scale,
        ctx.backend,
    )  # fmt: skip
    return (*gradients, *(None,) * 10)


_attention.register_autograd(_differentiate, setup_context=_save)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=lse_dtype)


def _chosen(q: Tensor, backend: str | None) -> Backend:
    return choose(BACKENDS, Situation(q.device, q.dtype, int(q.shape[-1])), backend=backend)


def _check_tensors(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> None:
    for name, value in (("q_THD", q_THD), ("k_THD", k_THD), ("v_THD", v_THD)):
        if value.dtype not in DTYPES:
            raise TypeError(
                f"varlen_attention: {name} must be float16, bfloat16, float32 or float64, "
                f"got {value.dtype}"
            )
        if value.dtype != q_THD.dtype:
            raise TypeError(
                f"varlen_attention: {name} must have the dtype of q_THD, {q_THD.dtype}, "
                f"got {value.dtype}"
            )
        if value.device != q_THD.device:
            raise ValueError(
                f"varlen_attention: {name} must lie on the device of q_THD, {q_THD.device}, "
                f"got {value.device}"
            )
        if value.ndim != 3 or value.shape[1:] != q_THD.shape[1:]:
            raise ValueError(
                f"varlen_attention: {name} must be [tokens, heads, head dim] with heads and head "
                f"dim of q_THD, {tuple(q_THD.shape)}, got {tuple(value.shape)}"
            )
        if value.stride(-1) != 1:
            raise ValueError(
                f"varlen_attention: the last dim of {name} must be contiguous (stride 1), got "
                f"strides {value.stride()}; call .contiguous() on it"
            )
        if value.shape[1] > 1 and value.stride(1) != value.shape[2]:
            raise ValueError(
                f"varlen_attention: the heads of {name} must be contiguous (stride "
                f"{value.shape[2]}), got strides {value.stride()}; lay q, k and v out as "
                "[tokens, 3, heads, head dim] or call .contiguous() on it"
            )
    if k_THD.shape[0] != v_THD.shape[0]:
        raise ValueError(
            "varlen_attention: k_THD and v_THD must have the same tokens, got "
            f"{k_THD.shape[0]} and {v_THD.shape[0]}"
        )
    head_dim = q_THD.shape[-1]
    if head_dim % 8 or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"varlen_attention: the head dim of q_THD must be a multiple of 8 from {MIN_HEAD_DIM} "
            f"to {MAX_HEAD_DIM}, got {head_dim}; 64 and 128 are the fast ones"
        )


def _check_sequences(name: str, sequences: Sequences, q_THD: Tensor) -> None:
    """Check what is known without reading a value from the device."""
    if not isinstance(sequences, Sequences):
        raise TypeError(
            f"varlen_attention: {name} must be Sequences (see `sequences.sequences`), got "
            f"{type(sequences).__name__}"
        )
    cu_seqlens, tiles_64, tiles_128, _ = sequences
    for field, value in (
        ("cu_seqlens", cu_seqlens),
        ("tiles_64", tiles_64),
        ("tiles_128", tiles_128),
    ):
        if value.dtype != torch.int32:
            raise TypeError(f"varlen_attention: {name}.{field} must be int32, got {value.dtype}")
        if value.device != q_THD.device:
            raise ValueError(
                f"varlen_attention: {name}.{field} must lie on the device of q_THD, "
                f"{q_THD.device}, got {value.device}; move it with {name}.to(...)"
            )
        if not value.is_contiguous():
            raise ValueError(f"varlen_attention: {name}.{field} must be contiguous")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"varlen_attention: {name}.cu_seqlens must be [sequences + 1], got "
            f"{tuple(cu_seqlens.shape)}"
        )
