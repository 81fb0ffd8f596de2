"""UNETR's convolutional decoder for any power-of-two patch, and stock UNETR on a packed batch.

The decoder of `UNETRDecoder` takes token maps on the patch grid and one full-resolution skip; with
patch 16 it has UNETR's four levels and exactly its layers. `UNETR` stacks contrasts as channels in
a fixed order, zeros where a study lacks one; it can take over the blocks of a pretrained encoder
but not its tokenizer, so it gives up what `AdaptiveUNETR` keeps: any contrast, any number of them.

Letters: S studies, V volumes, C channels, L patches of a grid, E width, F features, P voxels per
patch, X Y Z voxels, G the three patch-grid axes.

Source: Hatamizadeh et al., UNETR, arXiv 2103.10504; blocks from MONAI.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import contrast_id
from anycontrast_kernels.patchify import intensity_map

if TYPE_CHECKING:
    from anycontrast.models.amae import AMAEConfig
    from anycontrast.models.segmenter import SegmenterConfig

Stride = tuple[int, int, int]
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
    x_TP = intensity_map(batch.codes_TP, batch.volume_T, batch.intensity_V4)
    x_VGP = x_TP.view(batch.num_volumes, *grid, *batch.patch_vox)
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
