"""Ways of doing the attention of one pack: our back ends, and what people do without them.

Letters: T tokens, L padded length, C sequences, H heads, D head dim.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anycontrast_kernels.attention import varlen_attention
from anycontrast_kernels.backends import BACKENDS
from anycontrast_kernels.dispatch import Situation
from anycontrast_kernels.sequences import Sequences, sequences

MAX_MASK_BYTES = 2**29
"""A mask over all pairs of tokens is left out above this."""

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """One pack."""

    name: str
    head_dim: int
    num_heads: int
    lengths: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def flop(self) -> float:
        """Of the forward pass, useful ones only; the backward pass has 2.5 times as many."""
        return 4.0 * self.head_dim * self.num_heads * sum(n * n for n in self.lengths)

    @property
    def tensor_bytes(self) -> float:
        """Of one of the tensors [T, H, D]."""
        return float(sum(self.lengths) * self.num_heads * self.head_dim * self.dtype.itemsize)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value as views of one tensor, as a model has them; output gradient."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (sum(self.lengths), 4, self.num_heads, self.head_dim)
        drawn = torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
        q, k, v = drawn[:, :3].requires_grad_().unbind(1)
        return q, k, v, drawn[:, 3].contiguous()


def attention_ways(case: Case, wanted: Sequence[str]) -> tuple[dict[str, Way], dict[str, str]]:
    """Return what can run here, and why the rest cannot.

    Args:
        case: the pack.
        wanted: names to keep; empty keeps all.
    """
    runs = sequences(case.lengths, case.device)
    situation = Situation(case.device, case.dtype, case.head_dim)
    ways: dict[str, Way] = {}
    refusals: dict[str, str] = {}
    for backend in BACKENDS:
        reason = backend.refusal(situation)
        if reason is None:
            ways[backend.name] = partial(_packed, runs, backend.name)
        else:
            refusals[backend.name] = reason
    is_uniform = len(set(case.lengths)) == 1
    ways["dense" if is_uniform else "padded"] = partial(_padded, case.lengths)
    if sum(case.lengths) ** 2 > MAX_MASK_BYTES:
        refusals["block mask"] = f"a mask of {sum(case.lengths)}^2 tokens is too large"
    elif len(case.lengths) > 1:
        ways["block mask"] = partial(_masked, _same_sequence(case))
    names = [name for name in ways if not wanted or name in wanted]
    return {name: ways[name] for name in names}, refusals


def _packed(runs: Sequences, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return varlen_attention(q, k, v, runs, backend=backend)


def _padded(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A batch padded to its longest, with a key mask if lengths differ; packing is not counted."""
    longest = max(lengths)
    if min(lengths) == longest:
        shape = (len(lengths), longest, *q.shape[1:])
        q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(0, 1)
    row_L = torch.arange(longest, device=q.device)
    length_C = torch.tensor(lengths, device=q.device)
    keep_CL = row_L < length_C[:, None]
    q, k, v = (_pad(x, keep_CL) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep_CL[:, None, None, :])
    return out.transpose(1, 2)[keep_CL]


def _pad(x_THD: Tensor, keep_CL: Tensor) -> Tensor:
    """[T, H, D] -> [C, H, L, D], zeros where nothing is kept."""
    padded = x_THD.new_zeros((*keep_CL.shape, *x_THD.shape[1:]))
    return padded.masked_scatter(keep_CL[:, :, None, None], x_THD).transpose(1, 2)


def _masked(mask_TT: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All tokens against all, with a mask of what belongs together."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT)
    return out.squeeze(0).transpose(0, 1)


def _same_sequence(case: Case) -> Tensor:
    numbers = torch.arange(len(case.lengths), device=case.device)
    number_T = numbers.repeat_interleave(torch.tensor(case.lengths, device=case.device))
    return number_T[:, None] == number_T
