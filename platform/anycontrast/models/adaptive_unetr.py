"""Adaptive UNETR: one segmenter for every subset of contrasts.

The pretrained encoder sees all tokens of a study's contrasts together; at every tap the tokens are
max-pooled over the contrasts, location by location, so the convolutional decoder always gets one
map whatever the study has. Background patches are no tokens here either; their places hold 0. The
full-resolution skip, which the paper leaves open, is built the same way: one shared single-channel
stem per volume, then the maximum over contrasts. The order of the contrasts cannot matter, and an
absent contrast costs nothing.

Letters: T tokens, N tokens with foreground, S studies, V volumes, L patches of a grid, E width,
F features, G grid axes.

Source: Das et al., arXiv 2501.09096, section on Adaptive UNETR; decoder: `unetr.py`.
"""

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from anycontrast.models.amae import AMAEConfig
from anycontrast.models.encoder import Encoder, Visible
from anycontrast.models.patches import patch_codes
from anycontrast.models.segmenter import Segmenter, SegmenterConfig, TransferReport, take_tensors
from anycontrast.models.unetr import (
    UNETRDecoder,
    common_grid,
    dense_volumes,
    full_resolution_stem,
    level_strides,
    tap_blocks,
    tokens_to_map,
)
from anycontrast_datasets.batch import PackedBatch


class AdaptiveUNETR(Segmenter):
    """Encoder, max over contrasts at every tap, convolutional decoder.

    Args:
        config: regions and features of the head.
        model: config of the pretraining model whose encoder this is built around.
    """

    def __init__(self, config: SegmenterConfig, model: AMAEConfig) -> None:
        super().__init__(config, model.patch_vox)
        shape = model.encoder_config()
        self.encoder = Encoder(shape)
        self.tap_blocks = tap_blocks(shape.depth, len(level_strides(model.patch_vox)))
        self.stem = full_resolution_stem(1, config.feature_size)
        self.decoder = UNETRDecoder(
            shape.width, model.patch_vox, config.feature_size, len(config.region_values)
        )

    def forward(self, batch: PackedBatch) -> Tensor:
        """See `Segmenter.forward`."""
        grid = common_grid(batch)
        # Pretraining has no background tokens; a finetune that showed them would feed the encoder
        # what it never saw, and let them attend to the anatomy.
        occupied = occupied_tokens(batch)
        last_NE, taps_NE = self.encoder(batch, visible=occupied, taps=self.tap_blocks)
        dtype = next(self.stem.parameters()).dtype
        index_N = occupied[0]
        taps_SEG = [_pooled_map(tap_NE.to(dtype), index_N, batch, grid) for tap_NE in taps_NE]
        last_SEG = _pooled_map(last_NE.to(dtype), index_N, batch, grid)
        volumes_V1XYZ = dense_volumes(batch)[:, None].to(dtype)
        skip_SFXYZ = max_over_contrasts(self.stem(volumes_V1XYZ), batch)
        logits: Tensor = self.decoder(taps_SEG, last_SEG, skip_SFXYZ)
        return logits

    def load_pretrained(self, tensors: Mapping[str, Tensor]) -> TransferReport:
        """See `Segmenter.load_pretrained`; tokenizer, blocks and norm are taken over whole."""
        names = [name for name in self.state_dict() if name.startswith("encoder.")]
        return take_tensors(self, tensors, {name: name for name in names})


def occupied_tokens(batch: PackedBatch) -> Visible:
    """Which tokens hold any foreground: what pretraining would have packed."""
    has_any_T = (patch_codes(batch) != 0).any(dim=1)
    counts = [int(part.sum()) for part in torch.split(has_any_T.cpu(), list(batch.lengths))]
    cu_seqlens = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    index_N = has_any_T.nonzero().squeeze(1)
    return index_N, tuple(counts), cu_seqlens.to(batch.codes_B.device)


def _pooled_map(
    x_NE: Tensor, index_N: Tensor, batch: PackedBatch, grid: tuple[int, int, int]
) -> Tensor:
    """Maximum over the contrasts that have a token at a location; 0 where none has."""
    lowest = torch.finfo(x_NE.dtype).min
    x_TE = x_NE.new_full((batch.num_tokens, x_NE.shape[-1]), lowest)
    x_VLE = x_TE.index_copy(0, index_N, x_NE).view(batch.num_volumes, -1, x_NE.shape[-1])
    pooled_SLE = max_over_contrasts(x_VLE, batch)
    return tokens_to_map(pooled_SLE.masked_fill(pooled_SLE == lowest, 0.0), grid)


def max_over_contrasts(x_V: Tensor, batch: PackedBatch) -> Tensor:
    """Maximum over the volumes of each study: [V, ...] to [S, ...], volumes contiguous by study."""
    starts = [0, *accumulate(len(names) for names in batch.contrasts)]
    return torch.stack([x_V[start:stop].amax(dim=0) for start, stop in pairwise(starts)])
