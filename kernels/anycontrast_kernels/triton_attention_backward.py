"""Attention over packed sequences in Triton: the backward kernels.

Two passes without atomics, so the gradients are the same bits on every run. Each program owns the
rows it writes and walks over the other side of its sequence, recomputing the probabilities p from
the log-sum-exp of the forward pass:

1. `dq_kernel`, a tile of queries: first delta = sum(dout * out) of its rows, kept with the
   log-sum-exp (base 2) for the second pass; then dq = scale * (p * (dout v^T - delta)) k.
2. `dkdv_kernel`, a tile of keys: dv = p^T dout and dk = scale * (p * (dout v^T - delta))^T q, all
   computed transposed, so that a product leaves its result in the layout the next one reads.

Rows beyond a sequence are loaded as 0 and then add exactly 0, so the second pass needs no mask on
p and the first only one on the last tile of keys. Gradients of capacity padding are written as 0.
Method: FlashAttention-2 (arXiv 2307.08691), its backward pass in two passes instead of atomic adds.

Letters as in `triton_attention`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

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
from anycontrast_kernels.triton_attention import (
    LOG2E,
    load_rows,
    locate,
    must_upcast,
    packed,
    store_rows,
    tail_share,
    zero_rows,
)

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _dq_step(
    q, dout, lse2, delta, k_pointer, v_pointer, k_stride, v_stride, limit, scale_log2, acc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to the gradient of the queries."""
    k = load_rows(k_pointer, k_stride, limit, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, UPCAST)
    v = load_rows(v_pointer, v_stride, limit, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    p = tl.exp2(s * scale_log2 - lse2[:, None])
    if MASKED:
        p = tl.where((tl.arange(0, BLOCK_N) < limit)[None, :], p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"])
def dq_kernel(
    dout, q, k, v, out, lse, lse2, delta, dq, cu_q, cu_k, tiles, scale, scale_log2,
    num_tokens, num_sequences, dout_stride, q_stride, k_stride, v_stride, out_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Row statistics and gradient of one tile of queries of one head."""
    head = tl.program_id(1)
    dq_stride = tl.num_programs(1) * HEAD_DIM
    dq += head * HEAD_DIM
    first, end = tail_share(cu_q, num_sequences, num_tokens)
    zero_rows(dq, dq_stride, first, end, HEAD_DIM, BLOCK_D)

    start_q, num_q, start_k, num_k = locate(tiles, tl.program_id(0), cu_q, cu_k)
    if num_q <= 0:
        return
    dout += start_q * dout_stride + head * HEAD_DIM
    out += start_q * out_stride + head * HEAD_DIM
    q += start_q * q_stride + head * HEAD_DIM
    k += start_k * k_stride + head * HEAD_DIM
    v += start_k * v_stride + head * HEAD_DIM
    dout_tile = load_rows(dout, dout_stride, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True, UPCAST)
    out_tile = load_rows(out, out_stride, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True, UPCAST)
    delta_m = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    rows = tl.arange(0, BLOCK_M)
    statistic = head.to(tl.int64) * num_tokens + start_q + rows
    lse2_m = tl.load(lse + statistic, mask=rows < num_q, other=0.0) * _LOG2E
    tl.store(delta + statistic, delta_m, mask=rows < num_q)
    tl.store(lse2 + statistic, lse2_m, mask=rows < num_q)

    q_tile = load_rows(q, q_stride, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True, UPCAST)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.maximum(tl.cdiv(num_k, BLOCK_N) - 1, 0) * BLOCK_N
    acc = _dq_step(
        q_tile, dout_tile, lse2_m, delta_m, k + last.to(tl.int64) * k_stride,
        v + last.to(tl.int64) * v_stride, k_stride, v_stride, num_k - last, scale_log2, acc,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, UPCAST,
    )  # fmt: skip
    for _ in range(0, last, BLOCK_N):
        acc = _dq_step(
            q_tile, dout_tile, lse2_m, delta_m, k, v, k_stride, v_stride, 0, scale_log2, acc,
            HEAD_DIM, BLOCK_D, BLOCK_N, False, UPCAST,
        )  # fmt: skip
        k += BLOCK_N * k_stride
        v += BLOCK_N * v_stride
    store_rows(dq + start_q * dq_stride, dq_stride, acc * scale, num_q, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_step(
    k, v, q_pointer, dout_pointer, lse2_pointer, delta_pointer, q_stride, dout_stride, limit,
    scale_log2, dk, dv, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries gives to the gradients of keys and values."""
    rows = tl.arange(0, BLOCK_M)
    q = load_rows(q_pointer, q_stride, limit, BLOCK_M, HEAD_DIM, BLOCK_D, True, UPCAST)
    dout = load_rows(dout_pointer, dout_stride, limit, BLOCK_M, HEAD_DIM, BLOCK_D, True, UPCAST)
    lse2 = tl.load(lse2_pointer + rows, mask=rows < limit, other=0.0)
    delta = tl.load(delta_pointer + rows, mask=rows < limit, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(s * scale_log2 - lse2[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["num_tokens_q", "num_tokens_k", "num_sequences"])
def dkdv_kernel(
    dout, q, k, v, lse2, delta, dk, dv, cu_q, cu_k, tiles, scale, scale_log2,
    num_tokens_q, num_tokens_k, num_sequences, dout_stride, q_stride, k_stride, v_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one head; after `dq_kernel`."""
    head = tl.program_id(1)
    grad_stride = tl.num_programs(1) * HEAD_DIM
    dk += head * HEAD_DIM
    dv += head * HEAD_DIM
    first, end = tail_share(cu_k, num_sequences, num_tokens_k)
    zero_rows(dk, grad_stride, first, end, HEAD_DIM, BLOCK_D)
    zero_rows(dv, grad_stride, first, end, HEAD_DIM, BLOCK_D)

    start_k, num_k, start_q, num_q = locate(tiles, tl.program_id(0), cu_k, cu_q)
    if num_k <= 0:
        return
    k += start_k * k_stride + head * HEAD_DIM
    v += start_k * v_stride + head * HEAD_DIM
    q += start_q * q_stride + head * HEAD_DIM
    dout += start_q * dout_stride + head * HEAD_DIM
    lse2 += head.to(tl.int64) * num_tokens_q + start_q
    delta += head.to(tl.int64) * num_tokens_q + start_q
    k_tile = load_rows(k, k_stride, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, True, UPCAST)
    v_tile = load_rows(v, v_stride, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, True, UPCAST)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, num_q, BLOCK_M):
        acc_k, acc_v = _dkdv_step(
            k_tile, v_tile, q, dout, lse2, delta, q_stride, dout_stride, num_q - start,
            scale_log2, acc_k, acc_v, HEAD_DIM, BLOCK_D, BLOCK_M, UPCAST,
        )  # fmt: skip
        q += BLOCK_M * q_stride
        dout += BLOCK_M * dout_stride
        lse2 += BLOCK_M
        delta += BLOCK_M
    dk += start_k * grad_stride
    dv += start_k * grad_stride
    store_rows(dk, grad_stride, acc_k * scale, num_k, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv, grad_stride, acc_v, num_k, BLOCK_N, HEAD_DIM, BLOCK_D)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    tiles_q: Tensor,
    tiles_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `triton_attention.attention_forward`, the same bits on every run.

    Values are trusted. Rows beyond the last offset get gradient 0.

    Args:
        dout: [Tq, H, D] gradient of the output.
        q: [Tq, H, D], as in the forward pass.
        k: [Tk, H, D].
        v: [Tk, H, D].
        out: [Tq, H, D], what the forward pass returned.
        lse: [H, Tq] float32, what the forward pass returned.
        cu_q: [C + 1] int32.
        cu_k: [C + 1] int32.
        tiles_q: [K, 2] int32, tiles of `attention_tiles.tile_rows(...).backward_q` queries.
        tiles_k: [K, 2] int32, tiles of `attention_tiles.tile_rows(...).backward_k` keys.
        scale: as in the forward pass.

    Returns:
        dq [Tq, H, D], dk and dv [Tk, H, D], contiguous, in the dtype of `q`.
    """
    _, num_heads, head_dim = q.shape
    num_tiles_q = tiles_q.shape[0] if num_heads else 0
    num_tiles_k = tiles_k.shape[0] if num_heads else 0
    dout, q, k, v, out = (packed(x) for x in (dout, q, k, v, out))
    dq, dk, dv = (
        (torch.empty if num_tiles else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
        for x, num_tiles in ((q, num_tiles_q), (k, num_tiles_k), (v, num_tiles_k))
    )
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    _, for_keys, for_queries = tilings(head_dim, q.dtype, capability_of(q.device))
    block_d, upcast = padded(head_dim), must_upcast(q.dtype)
    if num_tiles_q:
        dq_kernel[num_tiles_q, num_heads](
            dout, q, k, v, out, lse, lse2, delta, dq, cu_q, cu_k, tiles_q, scale, scale * LOG2E,
            q.shape[0], cu_q.shape[0] - 1,
            dout.stride(0), q.stride(0), k.stride(0), v.stride(0), out.stride(0),
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=for_queries.rows,
            BLOCK_N=for_queries.columns, UPCAST=upcast, num_warps=for_queries.warps,
            num_stages=for_queries.stages, **COMPILER_OPTIONS,
        )  # fmt: skip
    if num_tiles_k:
        dkdv_kernel[num_tiles_k, num_heads](
            dout, q, k, v, lse2, delta, dk, dv, cu_q, cu_k, tiles_k, scale, scale * LOG2E,
            q.shape[0], k.shape[0], cu_q.shape[0] - 1,
            dout.stride(0), q.stride(0), k.stride(0), v.stride(0),
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_N=for_keys.rows, BLOCK_M=for_keys.columns,
            UPCAST=upcast, num_warps=for_keys.warps, num_stages=for_keys.stages,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return dq, dk, dv


COMPILE_CASES = [
    *compile_cases(dkdv_kernel, "BLOCK_N", "BLOCK_M", 1),
    *compile_cases(dq_kernel, "BLOCK_M", "BLOCK_N", 2),
]
"""What `compile_check` compiles."""
