"""Attention one sequence at a time, with the kernels of torch: every device, no dependency.

On CPU the fastest known way. On an accelerator it launches several kernels per sequence and does
the forward pass again for the gradients: the last resort.

Letters: Tq / Tk tokens, L tokens of one sequence, H heads, D head dim.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from anycontrast_kernels import recompute
from anycontrast_kernels.sequences import Sequences


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences_q: Sequences,
    sequences_k: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `dispatch.Forward`."""
    if q.device.type != "cpu":
        lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
        return _attend(list(_rows(sequences_q, sequences_k)), scale, q, k, v), lse
    out = q.new_zeros(q.shape)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=lse_dtype)
    for rows_q, rows_k in _rows(sequences_q, sequences_k):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q[rows_q]), _heads_first(k[rows_k]), _heads_first(v[rows_k]), scale=scale
        )
        out[rows_q] = found[0].squeeze(0).transpose(0, 1)
        lse[:, rows_q] = found[1].squeeze(0)
    return out, lse


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
    if q.device.type != "cpu":
        attend = partial(_attend, list(_rows(sequences_q, sequences_k)), scale)
        return recompute.gradients(attend, grad, q, k, v)
    gradients = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows_q, rows_k in _rows(sequences_q, sequences_k):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad[rows_q]),
            _heads_first(q[rows_q]),
            _heads_first(k[rows_k]),
            _heads_first(v[rows_k]),
            _heads_first(out[rows_q]),
            lse[:, rows_q].unsqueeze(0),
            0.0,
            False,
            scale=scale,
        )
        for gradient, piece, rows in zip(gradients, found, (rows_q, rows_k, rows_k), strict=True):
            gradient[rows] = piece.squeeze(0).transpose(0, 1)
    return gradients


def _attend(
    rows: Sequence[tuple[slice, slice]], scale: float, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attend on an accelerator: one call per sequence, differentiable."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for rows_q, rows_k in rows:
        found = F.scaled_dot_product_attention(
            _heads_first(q[rows_q]), _heads_first(k[rows_k]), _heads_first(v[rows_k]), scale=scale
        )
        out[rows_q] = found.squeeze(0).transpose(0, 1)
    return out


def _rows(sequences_q: Sequences, sequences_k: Sequences) -> Iterator[tuple[slice, slice]]:
    """Rows of every sequence that has queries and keys."""
    offsets = (sequences.cu_seqlens.tolist() for sequences in (sequences_q, sequences_k))
    for (start_q, stop_q), (start_k, stop_k) in zip(*map(pairwise, offsets), strict=True):
        if start_q < stop_q and start_k < stop_k:
            yield slice(start_q, stop_q), slice(start_k, stop_k)


def _heads_first(x_LHD: Tensor) -> Tensor:
    """[L, H, D] -> [1, H, L, D], a view."""
    return x_LHD.transpose(0, 1).unsqueeze(0)
