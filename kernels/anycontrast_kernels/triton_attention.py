"""Attention over packed sequences in Triton: the forward kernel.

The method is FlashAttention-2 (Dao 2023, arXiv 2307.08691): a program keeps one tile of queries and
walks over the keys of its sequence with a running maximum and sum, so the scores never reach
memory. What is particular here:

- The grid is the exact tile list of the pack times the heads: no program is launched for rows that
  do not exist, whatever the longest sequence is. A padding entry (-1) owns no rows.
- Only the last tile of keys is masked, and it is taken first, while few registers are live; the
  loop over the whole tiles carries no mask.
- log2(e) is folded into the scale, so a probability is one multiply-add and one exp2.
- fp32 accumulation; fp32 inputs are multiplied in true fp32 (`ieee`), never in TF32.
- Rows of the output beyond the last offset (capacity padding) are written as 0 by all programs in
  equal shares, so the caller allocates without filling.

Tiles, warps and stages: `attention_tiles`. Backward: `triton_attention_backward`.

Letters: Tq / Tk tokens, C sequences, H heads, D head dim, K tiles; m query rows, n key rows.
"""

# Triton's decorator has no types, and neither do the arguments of a kernel.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from anycontrast_kernels.attention_tiles import (
    COMPILER_OPTIONS,
    capability_of,
    compile_cases,
    padded,
    tilings,
)

LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
_INTERPRETED: bool = triton.knobs.runtime.interpret


def must_upcast(dtype: torch.dtype) -> bool:
    """Whether kernels compute on fp32 copies: in the interpreter bf16 arithmetic is wrong."""
    return _INTERPRETED and dtype == torch.bfloat16


@triton.jit
def locate(tiles, tile, cu_own, cu_other):
    """Find a tile: its first row, its rows left in the sequence; the other side's first, rows.

    An entry of -1 has no rows on either side.
    """
    sequence = tl.load(tiles + 2 * tile)
    row = tl.maximum(tl.load(tiles + 2 * tile + 1), 0)
    is_tile = (sequence >= 0).to(tl.int32)
    sequence = tl.maximum(sequence, 0)
    start_own = tl.load(cu_own + sequence)
    start_other = tl.load(cu_other + sequence)
    num_own = (tl.load(cu_own + sequence + 1) - start_own - row) * is_tile
    num_other = (tl.load(cu_other + sequence + 1) - start_other) * is_tile
    return start_own.to(tl.int64) + row, num_own, start_other.to(tl.int64), num_other


@triton.jit
def tail_share(cu_seqlens, num_sequences, num_tokens):
    """Rows beyond the last offset that this program fills: first and end."""
    used = tl.load(cu_seqlens + num_sequences)
    share = tl.cdiv(num_tokens - used, tl.num_programs(0))
    first = used + tl.program_id(0) * share
    return first, tl.minimum(first + share, num_tokens)


@triton.jit
def zero_rows(pointer, stride, first, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write 0 to rows first..end-1 of one head."""
    rows = tl.arange(0, 16)
    columns = tl.arange(0, BLOCK_D)
    zeros = tl.zeros([16, BLOCK_D], pointer.dtype.element_ty)
    for start in range(first, end, 16):
        keep = (start + rows < end)[:, None] & (columns < HEAD_DIM)[None, :]
        offsets = (start + rows).to(tl.int64)[:, None] * stride + columns[None, :]
        tl.store(pointer + offsets, zeros, mask=keep)


@triton.jit
def load_rows(
    pointer, stride, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load [ROWS, BLOCK_D]; 0 beyond the head dim and, if MASKED, from row `limit` on."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    if MASKED:
        x = tl.load(pointers, (rows < limit)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(pointers, (columns < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_rows(
    pointer, stride, x, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store rows below `limit` of [ROWS, BLOCK_D] in the dtype of the pointer."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    keep = (rows < limit)[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=keep)


@triton.jit
def _attend(
    q, k_pointer, v_pointer, k_stride, v_stride, limit, scale_log2, maximum, total, acc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running maximum, the sum and the accumulator."""
    k = load_rows(k_pointer, k_stride, limit, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where((tl.arange(0, BLOCK_N) < limit)[None, :], s, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - new_maximum[:, None])
    alpha = tl.exp2(maximum - new_maximum)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v = load_rows(v_pointer, v_stride, limit, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, UPCAST)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return new_maximum, total, acc


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"])
def forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, tiles, scale_log2, num_tokens, num_sequences,
    q_stride, k_stride, v_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of queries of one head to the keys of its sequence."""
    head = tl.program_id(1)
    out_stride = tl.num_programs(1) * HEAD_DIM
    rows = tl.arange(0, BLOCK_M)
    out += head * HEAD_DIM
    lse += head.to(tl.int64) * num_tokens

    first, end = tail_share(cu_q, num_sequences, num_tokens)
    zero_rows(out, out_stride, first, end, HEAD_DIM, BLOCK_D)
    for start in range(first, end, BLOCK_M):
        tl.store(lse + start + rows, float("-inf"), mask=start + rows < end)

    start_q, num_q, start_k, num_k = locate(tiles, tl.program_id(0), cu_q, cu_k)
    if num_q <= 0:
        return
    q += start_q * q_stride + head * HEAD_DIM
    k += start_k * k_stride + head * HEAD_DIM
    v += start_k * v_stride + head * HEAD_DIM
    q_tile = load_rows(q, q_stride, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True, UPCAST)
    # Finite, so that a tile without any key gives probabilities of 0 and not of NaN.
    maximum = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.maximum(tl.cdiv(num_k, BLOCK_N) - 1, 0) * BLOCK_N
    maximum, total, acc = _attend(
        q_tile, k + last.to(tl.int64) * k_stride, v + last.to(tl.int64) * v_stride,
        k_stride, v_stride, num_k - last, scale_log2, maximum, total, acc,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, UPCAST,
    )  # fmt: skip
    for _ in range(0, last, BLOCK_N):
        maximum, total, acc = _attend(
            q_tile, k, v, k_stride, v_stride, 0, scale_log2, maximum, total, acc,
            HEAD_DIM, BLOCK_D, BLOCK_N, False, UPCAST,
        )  # fmt: skip
        k += BLOCK_N * k_stride
        v += BLOCK_N * v_stride

    if num_k == 0:
        total += 1.0
        maximum += float("-inf")
    tl.store(lse + start_q + rows, (maximum + tl.log2(total)) * _LN2, mask=rows < num_q)
    out += start_q * out_stride
    store_rows(out, out_stride, acc / total[:, None], num_q, BLOCK_M, HEAD_DIM, BLOCK_D)


def packed(x: Tensor) -> Tensor:
    """Return `x` [T, H, D] itself if only its token stride is free, else a contiguous copy."""
    _, num_heads, head_dim = x.shape
    is_packed = x.stride(2) == 1 and (num_heads == 1 or x.stride(1) == head_dim)
    return x if is_packed else x.contiguous()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, tiles_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend non-causally within each sequence of a pack.

    Values are trusted (`attention.varlen_attention` checks them). A query of a sequence without
    keys gets 0 and a log-sum-exp of -inf, and so do rows beyond the last offset.

    Args:
        q: [Tq, H, D] float16, bfloat16 or float32, any token stride (views of one qkv tensor).
        k: [Tk, H, D].
        v: [Tk, H, D].
        cu_q: [C + 1] int32, sequence c owns q[cu_q[c]:cu_q[c + 1]].
        cu_k: [C + 1] int32, the same for keys.
        tiles_q: [K, 2] int32, (sequence, first row within it) of every tile of
            `attention_tiles.tile_rows(...).forward_q` queries; -1 entries are padding.
        scale: factor of the scores, > 0.

    Returns:
        Output [Tq, H, D] in the dtype of `q` and the natural log-sum-exp [H, Tq] float32.
    """
    num_tokens, num_heads, head_dim = q.shape
    if 0 in (tiles_q.shape[0], num_heads):
        lse = torch.full((num_heads, num_tokens), -math.inf, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    q, k, v = packed(q), packed(k), packed(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q.device)
    tiling = tilings(head_dim, q.dtype, capability_of(q.device)).forward
    forward_kernel[tiles_q.shape[0], num_heads](
        q, k, v, out, lse, cu_q, cu_k, tiles_q, scale * LOG2E, num_tokens, cu_q.shape[0] - 1,
        q.stride(0), k.stride(0), v.stride(0),
        HEAD_DIM=head_dim, BLOCK_D=padded(head_dim),
        BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, UPCAST=must_upcast(q.dtype),
        num_warps=tiling.warps, num_stages=tiling.stages, **COMPILER_OPTIONS,
    )  # fmt: skip
    return out, lse


COMPILE_CASES = compile_cases(forward_kernel, "BLOCK_M", "BLOCK_N", 0)
"""What `compile_check` compiles."""
