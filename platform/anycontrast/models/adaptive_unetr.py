"""Adaptive UNETR: one segmenter for every subset of contrasts.

The pretrained encoder sees all tokens of a study's contrasts together; at every tap the tokens are
max-pooled over the contrasts, location by location, so the convolutional decoder always gets one
map whatever the study has. The full-resolution skip, which the paper leaves open, is built the same
way: one shared single-channel stem per volume, then the maximum over contrasts. The order of the
contrasts cannot matter, and an absent contrast costs nothing.

Letters: T tokens, S studies, V volumes, L patches of a grid, E width, F features, G grid axes.

Source: Das et al., arXiv 2501.09096, section on Adaptive UNETR; decoder: `unetr.py`.
"""

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from anycontrast.models.amae import AMAEConfig
from anycontrast.models.encoder import Encoder
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
        last_TE, taps_TE = self.encoder(batch, taps=self.tap_blocks)
        dtype = next(self.stem.parameters()).dtype
        taps_SEG = [_pooled_map(tap_TE.to(dtype), batch, grid) for tap_TE in taps_TE]
        last_SEG = _pooled_map(last_TE.to(dtype), batch, grid)
        volumes_V1XYZ = dense_volumes(batch)[:, None].to(dtype)
        skip_SFXYZ = max_over_contrasts(self.stem(volumes_V1XYZ), batch)
        logits: Tensor = self.decoder(taps_SEG, last_SEG, skip_SFXYZ)
        return logits

    def load_pretrained(self, tensors: Mapping[str, Tensor]) -> TransferReport:
        """See `Segmenter.load_pretrained`; tokenizer, blocks and norm are taken over whole."""
        names = [name for name in self.state_dict() if name.startswith("encoder.")]
        return take_tensors(self, tensors, {name: name for name in names})


def _pooled_map(x_TE: Tensor, batch: PackedBatch, grid: tuple[int, int, int]) -> Tensor:
    x_VLE = x_TE.view(batch.num_volumes, -1, x_TE.shape[-1])
    return tokens_to_map(max_over_contrasts(x_VLE, batch), grid)


def max_over_contrasts(x_V: Tensor, batch: PackedBatch) -> Tensor:
    """Maximum over the volumes of each study: [V, ...] to [S, ...], volumes contiguous by study."""
    starts = [0, *accumulate(len(names) for names in batch.contrasts)]
    return torch.stack([x_V[start:stop].amax(dim=0) for start, stop in pairwise(starts)])
