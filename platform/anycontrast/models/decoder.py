"""Decoders: encoded visible tokens to the voxels of hidden patches.

`joint` is the paper's: mask tokens are put back among the visible ones and all attend to all.
`cross` gives mask tokens queries only: they look at the visible tokens and not at each other, so a
sample of the targets may be decoded and costs only its share. Both predict at the targets only.

Letters: T tokens, N visible, M targets, D encoder width, d decoder width, P voxels per patch,
V volumes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init

from anycontrast.models.blocks import (
    LAYER_NORM_EPS,
    Block,
    CrossBlock,
    Linear,
    init_blocks,
    recompute_policy,
    run_block,
)
from anycontrast.models.capacity import pad_tokens
from anycontrast.models.encoder import check_block_shape
from anycontrast.models.masking import MaskedPack
from anycontrast.models.positions import sincos_position
from anycontrast_datasets.contrast import NUM_CONTRAST_IDS
from anycontrast_kernels.sequences import Sequences, sequences


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of the decoder."""

    encoder_width: int
    num_voxels: int
    """Voxels per patch, what one token predicts."""
    width: int
    depth: int
    num_heads: int
    kind: Literal["joint", "cross"] = "joint"
    mlp_ratio: float = 4.0
    position_patch_mm: float = 16.0
    """Length of one step of the position code, in mm."""
    recompute: bool | str = "none"
    """See `blocks.RECOMPUTE`."""

    def __post_init__(self) -> None:
        recompute_policy(self.recompute, "decoder: recompute")
        if self.kind not in ("joint", "cross"):
            raise ValueError(f"decoder.kind must be joint or cross, got {self.kind!r}")
        check_block_shape("decoder", self.width, self.depth, self.num_heads, self.mlp_ratio)


class Decoder(nn.Module):
    """What both decoders share: projection, mask token, place and contrast, norm and head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden_width = int(config.width * config.mlp_ratio)
        recompute = recompute_policy(config.recompute, "decoder: recompute")
        self.has_static_shapes = False
        """Whether blocks get rows padded to one of few numbers; set where they are compiled."""
        block = Block if config.kind == "joint" else CrossBlock
        self.project = Linear(config.encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.contrast_embedding = nn.Embedding(NUM_CONTRAST_IDS, config.width)
        self.blocks = nn.ModuleList(
            block(config.width, config.num_heads, hidden_width, recompute=recompute)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.head = Linear(config.width, config.num_voxels)
        init_blocks(self)
        init.trunc_normal_(self.mask_token, std=0.02)

    def place(self, pack: MaskedPack) -> Tensor:
        """Position code plus contrast embedding of every token: [T, d]."""
        contrast_Vd = self.contrast_embedding(pack.batch.contrast_V)
        position_Td = sincos_position(
            pack.batch.position_mm_T3, self.config.width, patch_mm=self.config.position_patch_mm
        )
        return F.embedding(pack.batch.volume_T, contrast_Vd) + position_Td.to(contrast_Vd.dtype)

    def rows(self, x_Td: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Sequences]:
        """Tokens as the blocks get them, and their sequences."""
        if self.has_static_shapes:
            return pad_tokens(x_Td, lengths)
        return x_Td, sequences(lengths, x_Td.device)


class JointDecoder(Decoder):
    """Self-attention over all tokens of a study, visible and hidden.

    Source: AMAE, arXiv 2501.09096, section 2; MAE, arXiv 2111.06377, section 3.
    """

    def forward(self, encoded_ND: Tensor, pack: MaskedPack) -> Tensor:
        """Predict the targets: [N, D] -> [M, P]."""
        place_Td = self.place(pack)
        mask_Td = self.mask_token.to(place_Td.dtype).expand_as(place_Td)
        visible_Nd = self.project(encoded_ND).to(place_Td.dtype)
        x_Td = mask_Td.index_copy(0, pack.visible_index_N, visible_Nd) + place_Td
        x_Td, runs = self.rows(x_Td, pack.batch.lengths)
        for block in self.blocks:
            x_Td = run_block(block, x_Td, runs, recompute=self.config.recompute)
        prediction_MP: Tensor = self.head(self.norm(x_Td.index_select(0, pack.target_index_M)))
        return prediction_MP


class CrossDecoder(Decoder):
    """Mask queries attend to the visible tokens of their study, not to each other.

    Source: MultiMAE, arXiv 2204.01678, section 3.3, with one decoder for all contrasts.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.memory_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, encoded_ND: Tensor, pack: MaskedPack) -> Tensor:
        """Predict the targets: [N, D] -> [M, P]."""
        place_Td = self.place(pack)
        visible_Nd = self.project(encoded_ND).to(place_Td.dtype)
        memory_Nd = self.memory_norm(visible_Nd + place_Td.index_select(0, pack.visible_index_N))
        x_Md = self.mask_token + place_Td.index_select(0, pack.target_index_M)
        x_Md, runs = self.rows(x_Md, pack.target_lengths)
        memory_Nd, memory_runs = self.rows(memory_Nd, pack.visible_lengths)
        for block in self.blocks:
            x_Md = run_block(
                block, x_Md, memory_Nd, runs, memory_runs, recompute=self.config.recompute
            )
        prediction_MP: Tensor = self.head(self.norm(x_Md[: pack.num_targets]))
        return prediction_MP


def build_decoder(config: DecoderConfig) -> JointDecoder | CrossDecoder:
    """Build the decoder that `config.kind` names."""
    return JointDecoder(config) if config.kind == "joint" else CrossDecoder(config)
