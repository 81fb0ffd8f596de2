"""The same AMAE on a padded batch with a key mask, as one would run it without packing.

Every study is padded to given lengths in the encoder, the decoder and the head; padded tokens are
cut out, projected, attended and predicted like others, except that no query sees them as a key.
Weights and results are those of the packed model.

Letters: S studies, L padded tokens, N padded visible tokens, M padded targets, P voxels, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anycontrast.models.amae import AMAE, target_voxels
from anycontrast.models.blocks import Block
from anycontrast.models.masking import MaskedPack
from anycontrast.models.patches import patch_zscores
from anycontrast.models.positions import sincos_position
from anycontrast_kernels.patch_loss import patch_mse


@dataclass(frozen=True)
class PaddedRows:
    """Tokens of every study, filled up to one length with the study's first token."""

    index_SL: Tensor
    """[S, L] int64, token of the pack."""
    is_real_SL: Tensor
    """[S, L] bool, False for padding."""


def padded_loss(model: AMAE, pack: MaskedPack, longest: tuple[int, int, int]) -> Tensor:
    """Error of every predicted patch of a padded batch: [M] float32 over the real targets.

    Args:
        model: with the joint decoder and without `norm_target`.
        pack: the studies of the batch.
        longest: tokens, visible tokens and targets to which every study is padded.
    """
    offsets = pack.batch.offsets
    everything = torch.arange(pack.batch.num_tokens)
    tokens = _rows(everything, pack.batch.lengths, longest[0])
    visible = _rows(pack.visible_index_N, pack.visible_lengths, longest[1])
    targets = _rows(pack.target_index_M, pack.target_lengths, longest[2])
    start_S1 = torch.tensor(offsets[:-1])[:, None]

    x_SND = _embed(model, pack, visible)
    for block in model.encoder.blocks:
        x_SND = _block(block, x_SND, visible.is_real_SL)
    encoded_SND = model.encoder.norm(x_SND)

    decoder = model.decoder
    place_SLD = decoder.place(pack)[tokens.index_SL]
    shown_SND = decoder.project(encoded_SND)
    x_SLD = decoder.mask_token.expand_as(place_SLD).clone()
    study_SN = torch.arange(len(offsets) - 1)[:, None].expand_as(visible.index_SL)
    slot_SN = visible.index_SL - start_S1
    real_SN = visible.is_real_SL
    x_SLD = x_SLD.index_put((study_SN[real_SN], slot_SN[real_SN]), shown_SND[real_SN])
    x_SLD = x_SLD + place_SLD
    for block in decoder.blocks:
        x_SLD = _block(block, x_SLD, tokens.is_real_SL)
    slot_SM = targets.index_SL - start_S1
    picked_SMD = x_SLD.gather(1, slot_SM[:, :, None].expand(-1, -1, x_SLD.shape[-1]))
    prediction_SMP = decoder.head(decoder.norm(picked_SMD))
    return patch_mse(prediction_SMP[targets.is_real_SL], target_voxels(pack), norm_target=False)


def _rows(index_N: Tensor, lengths: Sequence[int], longest: int) -> PaddedRows:
    index_SL = torch.stack(
        [
            F.pad(index_N[start:stop], (0, longest - (stop - start)), value=int(index_N[start]))
            for start, stop in pairwise([0, *accumulate(lengths)])
        ]
    )
    return PaddedRows(index_SL, torch.arange(longest) < torch.tensor(lengths)[:, None])


def _embed(model: AMAE, pack: MaskedPack, visible: PaddedRows) -> Tensor:
    """Tokens before the first block: [S, N, D]."""
    batch, encoder = pack.batch, model.encoder
    index = visible.index_SL.flatten()
    x_NP = patch_zscores(batch, index)
    tokens_ND = encoder.tokenizer(
        x_NP, batch.volume_T[index], batch.contrast_V, batch.descriptor_VK
    )
    config = encoder.config
    position_ND = sincos_position(
        batch.position_mm_T3[index], config.width, patch_mm=config.position_patch_mm
    )
    return torch.add(tokens_ND, position_ND).view(*visible.index_SL.shape, -1)


def _block(block: nn.Module, x_SLD: Tensor, is_real_SL: Tensor) -> Tensor:
    assert isinstance(block, Block)
    attention = block.attention
    qkv = attention.qkv(block.norm1(x_SLD)).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=is_real_SL[:, None, None, :])
    x_SLD = x_SLD + attention.out(y.transpose(1, 2).flatten(2))
    out: Tensor = x_SLD + block.mlp(block.norm2(x_SLD))
    return out
