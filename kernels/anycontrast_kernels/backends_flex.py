"""Attention by torch's compiled FlexAttention with a block mask over the sequences of a pack.

The backward pass is FlexAttention's own, found by autograd, which needs the forward pass again.
The block mask is made once per pair of `Sequences`.

Letters: Tq / Tk tokens, H heads, D head dim.
"""

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anycontrast_kernels.dispatch import Situation, in_own_thread
from anycontrast_kernels.recompute import gradients
from anycontrast_kernels.sequences import Sequences

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_masks = WeakIdKeyDictionary()
"""Offsets of the queries -> (weak reference to those of the keys, shape, block mask)."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences_q: Sequences,
    sequences_k: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `dispatch.Forward`."""
    attend = _attention(q, k, sequences_q, sequences_k, scale)

    def run() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v).contiguous()

    return in_own_thread(run), q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)


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
    return gradients(_attention(q, k, sequences_q, sequences_k, scale), grad, q, k, v)


def refusal(situation: Situation) -> str | None:
    """Why FlexAttention cannot run, or None."""
    if situation.device.type != "cuda":
        return f"needs a CUDA device, this is {situation.device.type}"
    if situation.dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, this is {situation.dtype}"
    return None


def _attention(
    q: Tensor, k: Tensor, sequences_q: Sequences, sequences_k: Sequences, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    mask = _block_mask(sequences_q, sequences_k, q.shape[0], k.shape[0])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out: Tensor = _compiled()(*heads_first, block_mask=mask, scale=scale)
        return out.squeeze(0).transpose(0, 1)

    return attend


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _block_mask(
    sequences_q: Sequences, sequences_k: Sequences, tokens_q: int, tokens_k: int
) -> Any:
    """Mask of equal sequence numbers; numbers of padding tokens match nothing."""
    from torch.nn.attention.flex_attention import create_block_mask

    cu_q, cu_k = sequences_q.cu_seqlens, sequences_k.cu_seqlens
    if cu_q in _masks:
        keys, shape, mask = _masks[cu_q]
        if keys() is cu_k and shape == (tokens_q, tokens_k):
            return mask
    sequence_q = _sequence_numbers(cu_q, tokens_q, -1)
    sequence_k = _sequence_numbers(cu_k, tokens_k, -2)

    def is_same(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return sequence_q[row] == sequence_k[column]

    mask = create_block_mask(is_same, None, None, tokens_q, tokens_k, device=cu_q.device)
    _masks[cu_q] = (weakref.ref(cu_k), (tokens_q, tokens_k), mask)
    return mask


def _sequence_numbers(cu_seqlens: Tensor, num_tokens: int, padding: int) -> Tensor:
    row_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32)
    number_T = torch.searchsorted(cu_seqlens[1:], row_T, right=True)
    return torch.where(row_T < cu_seqlens[-1], number_T, padding)
