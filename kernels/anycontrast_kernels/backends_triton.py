"""Attention by our own Triton kernels: no dependency but Triton, the same bits on every run.

Letters: Tq tokens, H heads, D head dim.
"""

import importlib.metadata
from importlib.util import find_spec

import torch
from torch import Tensor

from anycontrast_kernels.attention_tiles import HEAD_DIMS, tile_rows
from anycontrast_kernels.dispatch import Situation
from anycontrast_kernels.sequences import Sequences

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences_q: Sequences,
    sequences_k: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `dispatch.Forward`."""
    from anycontrast_kernels.triton_attention import attention_forward

    rows = tile_rows(q.shape[-1], q.dtype, q.device)
    tiles_q = _tiles(sequences_q, rows.forward_q)
    cu_q, cu_k = sequences_q.cu_seqlens, sequences_k.cu_seqlens
    return attention_forward(q, k, v, cu_q, cu_k, tiles_q, scale)


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
    """See `dispatch.Backward`."""
    from anycontrast_kernels.triton_attention_backward import attention_backward

    rows = tile_rows(q.shape[-1], q.dtype, q.device)
    tiles_q, tiles_k = _tiles(sequences_q, rows.backward_q), _tiles(sequences_k, rows.backward_k)
    cu_q, cu_k = sequences_q.cu_seqlens, sequences_k.cu_seqlens
    return attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, tiles_q, tiles_k, scale)


def refusal(situation: Situation) -> str | None:
    """Why the kernels cannot run, or None."""
    if situation.device.type != "cuda":
        return f"needs a CUDA device, this is {situation.device.type}"
    if situation.dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, this is {situation.dtype}"
    if situation.head_dim not in HEAD_DIMS:
        return f"needs a head dim of {HEAD_DIMS}, this is {situation.head_dim}"
    capability = situation.capability
    if capability is not None and capability < MIN_CAPABILITY:
        return f"needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
    if find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"needs triton 3.6, this is {version}"
    return None


def _tiles(sequences: Sequences, rows: int) -> Tensor:
    return sequences.tiles_64 if rows == 64 else sequences.tiles_128
