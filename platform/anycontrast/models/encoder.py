"""Encoder: stored patches of any contrasts to tokens that know their whole study.

Tokenize -> add position -> blocks over all contrasts of a study jointly -> norm. Only the tokens
named in `visible` are cut out, mapped and projected; the rest cost nothing.

Letters: T tokens, N visible ones, P voxels per patch, D width, V volumes, S studies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from anycontrast.models.blocks import (
    LAYER_NORM_EPS,
    Block,
    init_blocks,
    recompute_policy,
    run_block,
)
from anycontrast.models.capacity import pad_tokens
from anycontrast.models.patches import patch_zscores
from anycontrast.models.positions import sincos_position
from anycontrast.models.tokenizer import DynamicTokenizer
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import NUM_CONTRAST_IDS
from anycontrast_kernels.sequences import Sequences, sequences

MIN_HEAD_DIM = 64
MAX_HEAD_DIM = 128

Visible = tuple[Tensor, tuple[int, ...], Tensor]
"""(index [N] int64 ascending, tokens per study on the host, their running sum [S + 1] int32)."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the encoder."""

    width: int
    depth: int
    """Number of blocks."""
    num_heads: int
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over `width`."""
    patch_vox: tuple[int, int, int] = (16, 16, 16)
    contrast_vector_size: int = 64
    """Length of the contrast vector of the tokenizer."""
    use_descriptor: bool = False
    paper_exact: bool = False
    contrast_embedding: bool = False
    """Add a learned vector per contrast to the tokens, beside what the tokenizer does."""
    position_patch_mm: float = 16.0
    """Length of one step of the position code, in mm."""
    recompute: bool | str = "none"
    """See `blocks.RECOMPUTE`."""

    def __post_init__(self) -> None:
        recompute_policy(self.recompute, "encoder: recompute")
        check_block_shape("encoder", self.width, self.depth, self.num_heads, self.mlp_ratio)


def check_block_shape(
    name: str, width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0
) -> None:
    """Refuse block shapes that do not work or would run slowly on every accelerator.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    if width < 1 or depth < 1 or num_heads < 1:
        raise ValueError(
            f"{name}: width, depth and num_heads must be >= 1, got {width}, {depth}, {num_heads}"
        )
    if width % num_heads:
        raise ValueError(
            f"{name}: width must be a multiple of num_heads, got {width} and {num_heads}"
        )
    head_dim = width // num_heads
    if head_dim % 8 or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name}: head dim (width / num_heads) must be a multiple of 8 from {MIN_HEAD_DIM} to "
            f"{MAX_HEAD_DIM}, got {width} / {num_heads} = {head_dim}; attention kernels run at a "
            f"fraction of their speed below, use num_heads={max(1, width // MIN_HEAD_DIM)}"
        )
    hidden = width * mlp_ratio
    if not (mlp_ratio > 0 and hidden == int(hidden)):
        raise ValueError(
            f"{name}: mlp_ratio must be > 0 and width * mlp_ratio whole, got {mlp_ratio} * {width}"
        )


class Encoder(nn.Module):
    """Tokenizer, positions, blocks, final norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden_width = int(config.width * config.mlp_ratio)
        recompute = recompute_policy(config.recompute, "encoder: recompute")
        self.has_static_shapes = False
        """Whether blocks get rows padded to one of few numbers; set where they are compiled."""
        self.contrast_embedding = (
            nn.Embedding(NUM_CONTRAST_IDS, config.width) if config.contrast_embedding else None
        )
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, hidden_width, recompute=recompute)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        init_blocks(self)
        # After `init_blocks`: the tokenizer initialises itself.
        self.tokenizer = DynamicTokenizer(
            math.prod(config.patch_vox),
            config.width,
            contrast_vector_size=config.contrast_vector_size,
            use_descriptor=config.use_descriptor,
            paper_exact=config.paper_exact,
        )

    def forward(
        self, batch: PackedBatch, *, visible: Visible | None = None, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode the visible tokens of a pack, every study by itself.

        Args:
            batch: on the device of the weights, with the configured `patch_vox`.
            visible: which tokens to encode; None for all.
            taps: blocks, counted from 0, whose outputs are handed out too.

        Returns:
            [N, D] after the final norm, and the un-normed [N, D] of every tap in the order asked.

        Raises:
            ValueError: another patch size, or a tap that does not exist.
        """
        self._check(batch, taps)
        tokens_ND, runs = self.embed(batch, visible)
        num_tokens = tokens_ND.shape[0]
        if self.has_static_shapes:
            lengths = batch.lengths if visible is None else visible[1]
            tokens_ND, runs = pad_tokens(tokens_ND, lengths)
        tapped: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            tokens_ND = run_block(block, tokens_ND, runs, recompute=self.config.recompute)
            if number in taps:
                tapped[number] = tokens_ND[:num_tokens]
        return self.norm(tokens_ND[:num_tokens]), [tapped[number] for number in taps]

    def embed(self, batch: PackedBatch, visible: Visible | None = None) -> tuple[Tensor, Sequences]:
        """Cut out the visible patches, project and place them: [N, D] and their runs."""
        volume_N, position_N3, index_N = batch.volume_T, batch.position_mm_T3, None
        runs = sequences(batch.lengths, volume_N.device)
        if visible is not None:
            index_N, lengths, _ = visible
            runs = sequences(lengths, volume_N.device)
            volume_N, position_N3 = (x.index_select(0, index_N) for x in (volume_N, position_N3))
        x_NP = patch_zscores(batch, index_N)
        tokens_ND: Tensor = self.tokenizer(x_NP, volume_N, batch.contrast_V, batch.descriptor_VK)
        position_ND = sincos_position(
            position_N3, self.config.width, patch_mm=self.config.position_patch_mm
        )
        tokens_ND = tokens_ND + position_ND.to(tokens_ND.dtype)
        if self.contrast_embedding is not None:
            tokens_ND = tokens_ND + F.embedding(volume_N, self.contrast_embedding(batch.contrast_V))
        return tokens_ND, runs

    def _check(self, batch: PackedBatch, taps: Sequence[int]) -> None:
        if tuple(batch.patch_vox) != tuple(self.config.patch_vox):
            raise ValueError(
                f"encoder: patches must be {tuple(self.config.patch_vox)} voxels, the batch has "
                f"{tuple(batch.patch_vox)}; pack it with the model's patch_vox"
            )
        if any(not 0 <= tap < self.config.depth for tap in taps):
            raise ValueError(
                f"encoder: taps must name blocks 0 to {self.config.depth - 1}, got {tuple(taps)}"
            )
