"""Transformer blocks over packed tokens.

Pre-norm residual blocks: x + Attention(LN x), then x + MLP(LN x). A pack is described by
`Sequences`; attention never leaves one, so a study's result does not depend on what it is packed
with.

Letters: T tokens, M queries, N memory tokens, D width, H heads, S studies.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import init
from torch.utils.checkpoint import checkpoint

from anycontrast_kernels.attention import varlen_attention
from anycontrast_kernels.linear import linear
from anycontrast_kernels.sequences import Sequences

LAYER_NORM_EPS = 1e-5
"""As BM-MAE and PyTorch; 1e-6 (timm) is below what bfloat16 and float16 inputs resolve."""

RECOMPUTE = ("none", "selective", "full")
"""What is computed again in the backward pass instead of kept: nothing; the wide layer of every
MLP and its GELU, half of a block's bytes for a tenth more work; or whole blocks, nearly all of the
bytes for a third more work."""


def recompute_policy(value: bool | str, name: str) -> str:
    """Return one of `RECOMPUTE`; true and false of older configurations are full and none.

    Raises:
        ValueError: with `name`, if it is none of these.
    """
    if isinstance(value, bool):
        return "full" if value else "none"
    if value not in RECOMPUTE:
        raise ValueError(f"{name} must be one of {RECOMPUTE}, got {value!r}")
    return value


class Linear(nn.Linear):
    """`nn.Linear` with the CPU's faster matrix product, see `anycontrast_kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Multi-head attention within each sequence."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x_TD: Tensor, runs: Sequences) -> Tensor:
        """[T, D] -> [T, D]."""
        q, k, v = self.qkv(x_TD).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        y = varlen_attention(q, k, v, runs)
        out: Tensor = self.out(y.flatten(1))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention of queries to the memory of their own sequence."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def forward(
        self, x_MD: Tensor, memory_ND: Tensor, runs: Sequences, memory_runs: Sequences
    ) -> Tensor:
        """[M, D] queries, [N, D] memory -> [M, D]."""
        q = self.q(x_MD).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(memory_ND).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        y = varlen_attention(q, k, v, runs, memory_runs)
        out: Tensor = self.out(y.flatten(1))
        return out


class MLP(nn.Sequential):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__(Linear(width, hidden_width), nn.GELU(), Linear(hidden_width, width))


class Block(nn.Module):
    """Self-attention block."""

    def __init__(
        self, width: int, num_heads: int, hidden_width: int, *, recompute: str = "none"
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, hidden_width)
        self.recompute_mlp = recompute == "selective"

    def forward(self, x_TD: Tensor, runs: Sequences) -> Tensor:
        """[T, D] -> [T, D]."""
        x_TD = x_TD + self.attention(self.norm1(x_TD), runs)
        return x_TD + _run_mlp(self, self.norm2(x_TD))


class CrossBlock(nn.Module):
    """Cross-attention block: queries look at a memory, not at each other."""

    def __init__(
        self, width: int, num_heads: int, hidden_width: int, *, recompute: str = "none"
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, hidden_width)
        self.recompute_mlp = recompute == "selective"

    def forward(
        self, x_MD: Tensor, memory_ND: Tensor, runs: Sequences, memory_runs: Sequences
    ) -> Tensor:
        """[M, D] queries, [N, D] normed memory -> [M, D]."""
        x_MD = x_MD + self.attention(self.norm1(x_MD), memory_ND, runs, memory_runs)
        return x_MD + _run_mlp(self, self.norm2(x_MD))


def _run_mlp(block: Block | CrossBlock, normed_TD: Tensor) -> Tensor:
    """Run the MLP; with `selective` nothing of it is kept but its input."""
    if block.recompute_mlp:
        return _again_in_backward(block.mlp, normed_TD)
    out: Tensor = block.mlp(normed_TD)
    return out


def run_block(block: nn.Module, *inputs: object, recompute: bool | str) -> Tensor:
    """Run a block; with `full` all its activations are computed again in the backward pass."""
    if recompute_policy(recompute, "recompute") == "full":
        return _again_in_backward(block, *inputs)
    out: Tensor = block(*inputs)
    return out


def _again_in_backward(module: nn.Module, *inputs: object) -> Tensor:
    # Blocks draw no random numbers, so there is no state to keep.
    out: Any = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)
    return out


def init_blocks(module: nn.Module) -> None:
    """Initialise linear layers (Xavier uniform, bias 0, as MAE) and embeddings (truncated 0.02)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            init.xavier_uniform_(part.weight)
            if part.bias is not None:
                init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            init.trunc_normal_(part.weight, std=0.02)
