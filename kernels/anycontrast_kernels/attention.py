"""Attention over packed sequences: every token attends to its own sequence, nothing is padded.

One call, several implementations (`dispatch` chooses once):

- `torch`: the flash kernels inside torch, on CUDA in half precision;
- `loop`: one `scaled_dot_product_attention` per sequence, everywhere. On CPU it is the fastest
  known way; on CUDA it launches one kernel per sequence.

Letters: Tq / Tk tokens, S sequences, H heads, D head dim.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from anycontrast_kernels.dispatch import Candidate, Situation, choose

FLASH_MAX_HEAD_DIM = 256
LENGTH_STEP = 512
LENGTH_STEPS_UP_TO = 4096


def varlen_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend non-causally within each sequence of a pack.

    A query of a sequence without keys gets 0; a sequence without queries yields nothing.

    Args:
        q_THD: [Tq, H, D] floating, sequences one after the other.
        k_THD: [Tk, H, D], same dtype and device.
        v_THD: [Tk, H, D], same dtype and device.
        cu_seqlens_q: [S + 1] int32 on the same device, sequence s owns
            q[cu_seqlens_q[s]:cu_seqlens_q[s + 1]].
        cu_seqlens_k: [S + 1] int32, the same for keys.
        lengths_q: queries per sequence on the host, so that nothing waits for the device.
        lengths_k: keys per sequence on the host.
        scale: factor of the scores, default 1 / sqrt(D).
        backend: `loop` or `torch`; default by `dispatch.choose`.

    Returns:
        [Tq, H, D] in the dtype of `q_THD`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, length or device contradicts the others, or `backend` cannot run.
    """
    _check_tensors(q_THD, k_THD, v_THD)
    _check_sequences("q", q_THD, cu_seqlens_q, lengths_q)
    _check_sequences("k", k_THD, cu_seqlens_k, lengths_k)
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            "varlen_attention: lengths_q and lengths_k must name the same sequences, got "
            f"{len(lengths_q)} and {len(lengths_k)}"
        )
    situation = Situation(q_THD.device, q_THD.dtype, int(q_THD.shape[-1]))
    run = choose(CANDIDATES, situation, backend=backend).run
    return run(
        q_THD,
        k_THD,
        v_THD,
        cu_seqlens_q,
        cu_seqlens_k,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        scale=scale,
    )


def loop_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    scale: float | None,
) -> Tensor:
    """One call of `scaled_dot_product_attention` per sequence; arguments as `varlen_attention`."""
    outputs = []
    for q_LHD, k_LHD, v_LHD in zip(
        torch.split(q_THD, list(lengths_q)),
        torch.split(k_THD, list(lengths_k)),
        torch.split(v_THD, list(lengths_k)),
        strict=True,
    ):
        if q_LHD.shape[0] == 0:
            continue
        if k_LHD.shape[0] == 0:
            outputs.append(torch.zeros_like(q_LHD))
            continue
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LHD, k_LHD, v_LHD))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.zeros_like(q_THD)


def torch_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    scale: float | None,
) -> Tensor:
    """The flash kernels inside torch; arguments as `varlen_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    if q_THD.shape[0] == 0 or k_THD.shape[0] == 0:
        return torch.zeros_like(q_THD)
    out = varlen_attn(
        q_THD,
        k_THD,
        v_THD,
        cu_seqlens_q,
        cu_seqlens_k,
        rounded_length(max(lengths_q)),
        rounded_length(max(lengths_k)),
        scale=scale,
    )
    assert isinstance(out, Tensor)
    return out


def rounded_length(length: int) -> int:
    """Round a longest length up to one of few values, so that compiled code is reused.

    Steps of 512 up to 4096, then powers of two; the kernels skip the blocks beyond the true end.
    """
    if length <= LENGTH_STEPS_UP_TO:
        return max(LENGTH_STEP, -(-length // LENGTH_STEP) * LENGTH_STEP)
    return 1 << (length - 1).bit_length()


def _torch_refusal(situation: Situation) -> str | None:
    if situation.device.type != "cuda":
        return f"needs a CUDA device, this is {situation.device.type}"
    if situation.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, this is {situation.dtype}"
    if situation.head_dim % 8 or situation.head_dim > FLASH_MAX_HEAD_DIM:
        return f"needs a head dim that is a multiple of 8 up to 256, this is {situation.head_dim}"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None


CANDIDATES = (
    Candidate("torch", torch_attention, _torch_refusal, lambda situation: True),
    Candidate(
        "loop",
        loop_attention,
        lambda situation: None,
        lambda situation: situation.device.type == "cpu",
    ),
)
"""Implementations in order of preference."""


def _check_tensors(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> None:
    for name, value in (("q_THD", q_THD), ("k_THD", k_THD), ("v_THD", v_THD)):
        if not value.is_floating_point():
            raise TypeError(f"varlen_attention: {name} must be floating, got {value.dtype}")
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
    if k_THD.shape[0] != v_THD.shape[0]:
        raise ValueError(
            "varlen_attention: k_THD and v_THD must have the same tokens, got "
            f"{k_THD.shape[0]} and {v_THD.shape[0]}"
        )


def _check_sequences(side: str, x_THD: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]) -> None:
    if any(length < 0 for length in lengths) or sum(lengths) != x_THD.shape[0]:
        raise ValueError(
            f"varlen_attention: lengths_{side} must be >= 0 and sum to the {x_THD.shape[0]} tokens "
            f"of {side}_THD, got {tuple(lengths)} (sum {sum(lengths)})"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(
            f"varlen_attention: cu_seqlens_{side} must be int32, got {cu_seqlens.dtype}"
        )
    if tuple(cu_seqlens.shape) != (len(lengths) + 1,):
        raise ValueError(
            f"varlen_attention: cu_seqlens_{side} must be [{len(lengths) + 1}] for {len(lengths)} "
            f"sequences, got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x_THD.device:
        raise ValueError(
            f"varlen_attention: cu_seqlens_{side} must lie on the device of {side}_THD, "
            f"{x_THD.device}, got {cu_seqlens.device}"
        )
    # Only on the host: reading the values on an accelerator would make it wait.
    if cu_seqlens.device.type == "cpu" and cu_seqlens.tolist() != [0, *accumulate(lengths)]:
        raise ValueError(
            f"varlen_attention: cu_seqlens_{side} must be the running sum of lengths_{side}, got "
            f"{cu_seqlens.tolist()} for {tuple(lengths)}"
        )
