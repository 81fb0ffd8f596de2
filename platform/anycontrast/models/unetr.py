"""UNETR's convolutional decoder for any power-of-two patch, and stock UNETR on a packed batch.

The decoder of `UNETRDecoder` takes token maps on the patch grid and one full-resolution skip; with
patch 16 it has UNETR's four levels and exactly its layers. `UNETR` stacks contrasts as channels in
a fixed order, zeros where a study lacks one; it can take over the blocks of a pretrained encoder
but not its tokenizer, so it gives up what `AdaptiveUNETR` keeps: any contrast, any number of them.

Letters: S studies, V volumes, C channels, L patches of a grid, E width, F features, P voxels per
patch, X Y Z voxels, G the three patch-grid axes.

Source: Hatamizadeh et al., UNETR, arXiv 2103.10504; blocks from MONAI.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from anycontrast.models.amae import AMAEConfig
from anycontrast.models.blocks import run_block
from anycontrast.models.encoder import Encoder
from anycontrast.models.patches import patch_zscores
from anycontrast.models.positions import sincos_position
from anycontrast.models.segmenter import Segmenter, SegmenterConfig, TransferReport, take_tensors
from anycontrast.models.tokenizer import DynamicTokenizer
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import DESCRIPTOR_SIZE, contrast_id
from anycontrast_datasets.study import StudyError
from anycontrast_kernels.sequences import sequences

Stride = tuple[int, int, int]

PRIOR = 0.01
"""Probability of every region that a fresh head predicts everywhere."""
NORM = "instance"


def level_strides(patch_vox: tuple[int, int, int]) -> list[Stride]:
    """Return the upsampling factors from patch grid to voxels, coarsest level first.

    An axis with a smaller patch is upsampled by the coarse levels only, so the finest levels work
    in-plane where slices are thick: (8, 8, 4) gives (2,2,2), (2,2,2), (2,2,1).

    Raises:
        ValueError: a patch edge is not a power of two, or the patch is a single voxel.
    """
    if any(n < 1 or n & (n - 1) for n in patch_vox) or max(patch_vox) < 2:
        raise ValueError(
            "building a UNETR decoder: every edge of model.patch_vox must be a power of 2 and one "
            f"at least 2, got {patch_vox}; choose e.g. (16, 16, 16) or (16, 16, 4)"
        )
    exponents = [n.bit_length() - 1 for n in patch_vox]
    levels = range(max(exponents))
    return [
        (_factor(level, exponents[0]), _factor(level, exponents[1]), _factor(level, exponents[2]))
        for level in levels
    ]


def _factor(level: int, exponent: int) -> int:
    return 2 if level < exponent else 1


def tap_blocks(depth: int, num_levels: int) -> list[int]:
    """Return the 0-based encoder blocks whose outputs feed the decoder, shallow (finest) first.

    Depth 12 with 4 levels gives UNETR's 3, 6, 9. A shallow encoder may repeat a block.
    """
    return [min(depth * j // num_levels, depth - 1) for j in range(1, num_levels)]


def dense_volumes(batch: PackedBatch) -> Tensor:
    """Return every volume of the batch on its grid, z-scored: [V, X, Y, Z] float32.

    Raises:
        ValueError: studies differ in grid, or a volume lacks patches (packed with drop_empty=True).
    """
    grid = common_grid(batch)
    x_VGP = patch_zscores(batch).view(batch.num_volumes, *grid, *batch.patch_vox)
    x_VXYZ = x_VGP.permute(0, 1, 4, 2, 5, 3, 6)
    shape = [g * p for g, p in zip(grid, batch.patch_vox, strict=True)]
    return x_VXYZ.reshape(batch.num_volumes, *shape)


def common_grid(batch: PackedBatch) -> tuple[int, int, int]:
    """Return the one patch grid of all studies, all patches present.

    Raises:
        ValueError: studies differ in grid, or a volume lacks patches (packed with drop_empty=True).
    """
    grids = set(batch.patch_grids)
    if len(grids) != 1:
        raise ValueError(
            "segmenting a batch: all studies must share one patch grid, got "
            f"{sorted(grids)}; crop every study to the same window"
        )
    grid = next(iter(grids))
    expected = grid[0] * grid[1] * grid[2]
    if any(length != expected for length in batch.volume_lengths):
        raise ValueError(
            f"segmenting a batch: every volume needs all {expected} patches of its grid, got "
            f"{sorted(set(batch.volume_lengths))}; pack with drop_empty=False"
        )
    return grid


class _TapUp(nn.Module):
    """Bring a token map up to a level: transposed convolutions and residual blocks."""

    def __init__(self, width: int, features: int, strides: Sequence[Stride]) -> None:
        super().__init__()
        self.first = _up(width, features, strides[0])
        self.rest = nn.ModuleList(
            nn.Sequential(_up(features, features, stride), _residual(features, features))
            for stride in strides[1:]
        )

    def forward(self, x_SEG: Tensor) -> Tensor:
        x: Tensor = self.first(x_SEG)
        for block in self.rest:
            x = block(x)
        return x


def _up(channels_in: int, channels_out: int, stride: Stride) -> nn.Module:
    block: nn.Module = UnetrPrUpBlock(
        3, channels_in, channels_out, 0, 3, 1, upsample_kernel_size=stride, norm_name=NORM
    )
    return block


def _residual(channels_in: int, channels_out: int) -> nn.Module:
    block: nn.Module = UnetrBasicBlock(
        3, channels_in, channels_out, 3, 1, norm_name=NORM, res_block=True
    )
    return block


def full_resolution_stem(channels: int, features: int) -> nn.Module:
    """Return UNETR's residual block on the image itself: [_, channels, X, Y, Z] to features."""
    return _residual(channels, features)


class UNETRDecoder(nn.Module):
    """Token maps and a full-resolution skip to logits.

    Args:
        width: E of the encoder.
        patch_vox: voxels per patch; decides number and factors of the levels.
        features: channels at full resolution.
        num_regions: output channels.
    """

    def __init__(
        self, width: int, patch_vox: tuple[int, int, int], features: int, num_regions: int
    ) -> None:
        super().__init__()
        strides = level_strides(patch_vox)
        num_levels = len(strides)
        # Channels after each upsampling, coarse to fine: 8F, 4F, 2F, F for patch 16.
        channels = [features * 2**k for k in range(num_levels - 1, -1, -1)]
        self.taps = nn.ModuleList(
            _TapUp(width, channels[level], strides[: level + 1]) for level in range(num_levels - 1)
        )
        self.ups = nn.ModuleList(
            UnetrUpBlock(
                3,
                channels_in,
                channels_out,
                3,
                upsample_kernel_size=stride,
                norm_name=NORM,
                res_block=True,
            )
            for channels_in, channels_out, stride in zip(
                [width, *channels[:-1]], channels, strides, strict=True
            )
        )
        self.out = UnetOutBlock(3, features, num_regions)
        # Lesions fill about a hundredth of a window: starting at even odds, the first steps of a
        # finetune would only teach the head to say no. Source: Lin et al., Focal Loss, section 4.1.
        torch.nn.init.constant_(self.out.conv.conv.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, taps_SEG: Sequence[Tensor], last_SEG: Tensor, skip_SFXYZ: Tensor) -> Tensor:
        """Decode to logits.

        Args:
            taps_SEG: per tap [S, E, gx, gy, gz], shallow block first (it feeds the finest level).
            last_SEG: [S, E, gx, gy, gz], the normalised encoder output.
            skip_SFXYZ: [S, F, X, Y, Z] full-resolution features.

        Returns:
            [S, R, X, Y, Z] float32 logits.
        """
        deep_first = list(reversed(taps_SEG))
        x = last_SEG
        for level, up in enumerate(self.ups):
            skip = self.taps[level](deep_first[level]) if level < len(self.taps) else skip_SFXYZ
            x = up(x, skip)
        logits: Tensor = self.out(x)
        return logits.float()


def tokens_to_map(x_SLE: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[S, L, E] tokens in C order of the grid -> [S, E, gx, gy, gz] contiguous."""
    num_studies, _, width = x_SLE.shape
    return x_SLE.transpose(1, 2).reshape(num_studies, width, *grid)


class UNETR(Segmenter):
    """Stock UNETR: contrasts are channels in the configured order, zeros where a study lacks one.

    A study's contrasts outside the configured order are not used; it must have one inside it.

    Args:
        config: channel order, regions and features.
        model: config of the pretraining model whose blocks this is built around.
    """

    def __init__(self, config: SegmenterConfig, model: AMAEConfig) -> None:
        super().__init__(config, model.patch_vox)
        self.contrasts = tuple(config.contrasts)
        self.tile_patch_embedding = config.tile_patch_embedding
        self.shape = model.encoder_config()
        encoder = Encoder(self.shape)
        self.blocks = encoder.blocks
        self.norm = encoder.norm
        self.patch_embedding = nn.Conv3d(
            len(self.contrasts), self.shape.width, model.patch_vox, stride=model.patch_vox
        )
        self.tap_blocks = tap_blocks(self.shape.depth, len(level_strides(model.patch_vox)))
        self.stem = full_resolution_stem(len(self.contrasts), config.feature_size)
        self.decoder = UNETRDecoder(
            self.shape.width, model.patch_vox, config.feature_size, len(config.region_values)
        )

    def accepts(self, contrasts: Collection[str]) -> bool:
        """See `Segmenter.accepts`: those that have a channel."""
        return set(contrasts) <= set(self.contrasts)

    def forward(self, batch: PackedBatch) -> Tensor:
        """See `Segmenter.forward`."""
        grid = common_grid(batch)
        image_SCXYZ = self.channels(batch).to(self.patch_embedding.weight.dtype)
        taps_SLE, last_SLE = self._encode(image_SCXYZ, batch)
        dtype = image_SCXYZ.dtype
        taps_SEG = [tokens_to_map(x_SLE.to(dtype), grid) for x_SLE in taps_SLE]
        last_SEG = tokens_to_map(last_SLE.to(dtype), grid)
        logits: Tensor = self.decoder(taps_SEG, last_SEG, self.stem(image_SCXYZ))
        return logits

    def channels(self, batch: PackedBatch) -> Tensor:
        """Stack the contrasts of every study: [S, C, X, Y, Z] float32, zeros for missing.

        Raises:
            StudyError: a study has none of the configured contrasts.
        """
        volumes_VXYZ = dense_volumes(batch)
        places = [
            (study, self.contrasts.index(name), volume)
            for volume, (study, name) in enumerate(
                (s, name) for s, names in enumerate(batch.contrasts) for name in names
            )
            if name in self.contrasts
        ]
        absent = set(range(batch.num_studies)) - {study for study, _, _ in places}
        if absent:
            study = min(absent)
            raise StudyError(
                f"segmenting study {batch.study_ids[study]}: the unetr head needs one of its "
                f"channels {self.contrasts}, the study shows {batch.contrasts[study]}; use a study "
                "with one of them, or a model with the adaptive head"
            )
        shape = (batch.num_studies, len(self.contrasts), *volumes_VXYZ.shape[1:])
        image_SCXYZ = volumes_VXYZ.new_zeros(shape)
        studies, channels, volumes = (list(column) for column in zip(*places, strict=True))
        image_SCXYZ[studies, channels] = volumes_VXYZ[volumes]
        return image_SCXYZ

    def _encode(self, image_SCXYZ: Tensor, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
        x_SEG = self.patch_embedding(image_SCXYZ)
        num_studies, width = x_SEG.shape[:2]
        tokens_TE = x_SEG.flatten(2).transpose(1, 2).reshape(-1, width)
        position_TE = sincos_position(
            _study_positions(batch), width, patch_mm=self.shape.position_patch_mm
        )
        tokens_TE = tokens_TE + position_TE.to(tokens_TE.dtype)
        num_patches = tokens_TE.shape[0] // num_studies
        runs = sequences((num_patches,) * num_studies, tokens_TE.device)
        tapped: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            tokens_TE = run_block(block, tokens_TE, runs, recompute=self.shape.recompute)
            if number in self.tap_blocks:
                tapped[number] = tokens_TE
        last_TE = self.norm(tokens_TE)
        by_study = (num_studies, num_patches, width)
        return [tapped[n].view(by_study) for n in self.tap_blocks], last_TE.view(by_study)

    def load_pretrained(self, tensors: Mapping[str, Tensor]) -> TransferReport:
        """See `Segmenter.load_pretrained`; blocks and norm, and the tiled tokenizer if asked."""
        names = {n: f"encoder.{n}" for n in self.state_dict() if n.startswith(("blocks.", "norm."))}
        report = take_tensors(self, tensors, names)
        if not self.tile_patch_embedding:
            return report
        self._tile_tokenizer(tensors)
        tiled = ("patch_embedding.weight", "patch_embedding.bias")
        return TransferReport(
            loaded=(*report.loaded, *tiled),
            fresh=tuple(n for n in report.fresh if n not in tiled),
            unused=tuple(n for n in report.unused if not n.startswith("encoder.tokenizer.")),
        )

    @torch.no_grad()
    def _tile_tokenizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Start as the mean over channels of what the tokenizer would make of each contrast."""
        prefix = "encoder.tokenizer."
        tokenizer = DynamicTokenizer(
            self.patch_vox[0] * self.patch_vox[1] * self.patch_vox[2],
            self.shape.width,
            contrast_vector_size=self.shape.contrast_vector_size,
            use_descriptor=self.shape.use_descriptor,
            paper_exact=self.shape.paper_exact,
        )
        names = {name: f"{prefix}{name}" for name in tokenizer.state_dict()}
        take_tensors(tokenizer, tensors, names)
        kernels, shifts = zip(
            *(_effective_kernel(tokenizer, contrast) for contrast in self.contrasts), strict=True
        )
        weight_ECP = torch.stack(kernels, dim=1) / len(self.contrasts)
        self.patch_embedding.weight.copy_(weight_ECP.view_as(self.patch_embedding.weight))
        assert self.patch_embedding.bias is not None
        self.patch_embedding.bias.copy_(torch.stack(shifts).mean(dim=0))


def _effective_kernel(tokenizer: DynamicTokenizer, contrast: str) -> tuple[Tensor, Tensor]:
    """What the tokenizer does to one contrast, physics unknown: kernel [E, P] and shift [E]."""
    num_voxels = tokenizer.projection.in_features
    probe_NP = torch.cat([torch.zeros(1, num_voxels), torch.eye(num_voxels)])
    tokens_NE = tokenizer(
        probe_NP,
        torch.zeros(num_voxels + 1, dtype=torch.int64),
        torch.tensor([contrast_id(contrast)]),
        torch.zeros(1, DESCRIPTOR_SIZE),
    )
    return (tokens_NE[1:] - tokens_NE[0]).T, tokens_NE[0]


def _study_positions(batch: PackedBatch) -> Tensor:
    """Patch centres of the first volume of every study, in mm: [S * L, 3] float32."""
    first = [0, *accumulate(len(names) for names in batch.contrasts)][:-1]
    position_VL3 = batch.position_mm_T3.view(batch.num_volumes, -1, 3)
    return position_VL3[first].reshape(-1, 3)
