"""Segmenters: what a segmentation model is told, and how one is built.

Both heads take the same `PackedBatch` (every patch of every volume present, `drop_empty=False`, all
studies of one patch grid) and return the same logits `[S, R, X, Y, Z]`, one sigmoid per region, so
training, inference and release never ask which head they have. Regions may overlap (whole tumour
holds tumour core), which a softmax over label values could not express.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import contrast_id

if TYPE_CHECKING:
    from anycontrast.models.amae import AMAEConfig


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Head, regions and window of a segmentation model."""

    head: Literal["adaptive", "unetr"] = "adaptive"
    """`adaptive` takes any subset of contrasts; `unetr` takes fixed channels, zeros for missing."""
    regions: dict[str, list[int]] = field(default_factory=dict)
    """Region name -> label values it is made of; empty means one region `lesion` of every label
    value above 0. Output channels are in the order of `region_values`."""
    contrasts: list[str] = field(default_factory=list)
    """Channel order of the `unetr` head, vocabulary names. Not used by `adaptive`."""
    window_vox: tuple[int, int, int] = (128, 128, 128)
    """Training crop and inference window, voxels; whole patches along every axis."""
    feature_size: int = 16
    """Channels at full resolution in the convolutional decoder; doubled at every level down."""
    tile_patch_embedding: bool = True
    """`unetr` only: start its patch embedding from the tokenizer's kernels divided by channels."""

    def __post_init__(self) -> None:
        for name, values in self.regions.items():
            if not values or any(not 1 <= value <= 255 for value in values):
                raise ValueError(
                    f"segmenter.regions.{name} must list label values in 1..255, got {values}; "
                    "0 is background and belongs to no region"
                )
        if any(n < 1 for n in self.window_vox):
            raise ValueError(f"segmenter.window_vox must be positive, got {self.window_vox}")
        if self.feature_size < 1:
            raise ValueError(f"segmenter.feature_size must be >= 1, got {self.feature_size}")
        for name in self.contrasts:
            contrast_id(name)
        if len(set(self.contrasts)) != len(self.contrasts):
            raise ValueError(f"segmenter.contrasts must not repeat, got {self.contrasts}")
        if self.head == "unetr" and not self.contrasts:
            raise ValueError(
                "segmenter.contrasts must list the channel order when segmenter.head is unetr, "
                "got none; list the contrasts or use head: adaptive"
            )

    @property
    def region_values(self) -> dict[str, list[int]]:
        """`regions` with the default filled in, sorted by name: the order of the output channels.

        Sorted, because JSON writers may sort keys: no stored file can swap channels.
        """
        regions = self.regions or {"lesion": list(range(1, 256))}
        return {name: regions[name] for name in sorted(regions)}


@dataclass(frozen=True)
class TransferReport:
    """Which tensors a pretrained model gave a segmenter."""

    loaded: tuple[str, ...]
    """Tensors of the segmenter that now hold pretrained values."""
    fresh: tuple[str, ...]
    """Tensors of the segmenter that keep their initialisation: the head."""
    unused: tuple[str, ...]
    """Pretrained tensors that have no place in the segmenter: the decoder."""


class Segmenter(nn.Module):
    """What both heads are: an encoder, a decoder, and what inference needs to know of them.

    Args:
        config: regions and window of the head.
        patch_vox: voxels per patch of the encoder.
    """

    def __init__(self, config: SegmenterConfig, patch_vox: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_vox = patch_vox
        self.window_vox = config.window_vox
        self.regions = dict(config.region_values)

    def accepts(self, contrasts: Collection[str]) -> bool:
        """Whether the model sees every one of these contrasts."""
        return True

    @abstractmethod
    def forward(self, batch: PackedBatch) -> Tensor:
        """Segment every study of the batch.

        Args:
            batch: packed with `drop_empty=False`, all studies on one patch grid.

        Returns:
            [S, R, X, Y, Z] float32 logits, one sigmoid per region.

        Raises:
            ValueError: the studies differ in grid, or patches were dropped.
        """

    @abstractmethod
    def load_pretrained(self, tensors: Mapping[str, Tensor]) -> TransferReport:
        """Take over the encoder of a pretrained model.

        Args:
            tensors: state dict of an `AMAE`, encoder names under `encoder.`.

        Raises:
            ValueError: a tensor of the encoder is missing or has another shape; nothing is loaded.
        """


def build_segmenter(config: SegmenterConfig, model: "AMAEConfig") -> Segmenter:
    """Build the segmenter of `config` around an encoder of `model`, with fresh weights.

    Args:
        config: head, regions and window.
        model: the pretraining model's config; its encoder is the segmenter's encoder.

    Returns:
        A module mapping a `PackedBatch` to logits [S, R, X, Y, Z] float32.

    Raises:
        ValueError: the window is not whole patches, or the patch cannot be decoded by factors of 2.
    """
    patch_vox = model.patch_vox
    if any(w % p for w, p in zip(config.window_vox, patch_vox, strict=True)):
        raise ValueError(
            f"segmenter.window_vox must be whole patches of {patch_vox} along every axis, "
            f"got {config.window_vox}; choose multiples of model.patch_vox"
        )
    if config.head == "unetr":
        from anycontrast.models.unetr import UNETR

        return UNETR(config, model)
    from anycontrast.models.adaptive_unetr import AdaptiveUNETR

    return AdaptiveUNETR(config, model)


def take_tensors(
    target: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> TransferReport:
    """Copy tensors by name, all of them or none.

    Args:
        target: the segmenter.
        tensors: the pretrained state dict.
        names: segmenter name -> pretrained name of every tensor that must be taken over.

    Raises:
        ValueError: a pretrained tensor is missing or has another shape; nothing is copied.
    """
    own = target.state_dict()
    missing = [source for source in names.values() if source not in tensors]
    reshaped = [
        f"{source} {tuple(tensors[source].shape)} for {tuple(own[name].shape)}"
        for name, source in names.items()
        if source in tensors and tensors[source].shape != own[name].shape
    ]
    if missing or reshaped:
        raise ValueError(
            "taking over pretrained weights: every tensor of the encoder must be there in its "
            f"shape; missing {missing[:3]} ({len(missing)} in all), other shape {reshaped[:3]} "
            f"({len(reshaped)} in all); use a checkpoint of the same model config"
        )
    target.load_state_dict({name: tensors[source] for name, source in names.items()}, strict=False)
    return TransferReport(
        loaded=tuple(names),
        fresh=tuple(name for name in own if name not in names),
        unused=tuple(name for name in tensors if name not in set(names.values())),
    )


def segmenter_model_config(config: SegmenterConfig, model: "AMAEConfig") -> dict[str, object]:
    """Return what `state.json` and releases keep of a segmenter: both configs as plain values."""
    return {"segmenter": asdict(config), "amae": asdict(model.resolved())}


def segmenter_from_model_config(model_config: Mapping[str, object]) -> Segmenter:
    """Rebuild a segmenter, with fresh weights, from `segmenter_model_config`'s dictionary.

    Raises:
        ValueError: the dictionary lacks one of its two parts.
    """
    config, model = parse_segmenter_model_config(model_config)
    return build_segmenter(config, model)


def parse_segmenter_model_config(
    model_config: Mapping[str, object],
) -> tuple[SegmenterConfig, "AMAEConfig"]:
    """Read both configs back from JSON values (lists become tuples again).

    Raises:
        ValueError: the dictionary lacks one of its two parts.
    """
    from anycontrast.models.amae import AMAEConfig

    parts: list[dict[str, object]] = []
    for key in ("segmenter", "amae"):
        part = model_config.get(key)
        if not isinstance(part, Mapping):
            raise ValueError(
                f"rebuilding a segmenter: model_config must hold {key!r}, found "
                f"{sorted(model_config)}; this is not the config of a segmenter"
            )
        parts.append(
            {
                str(name): tuple(value) if str(name).endswith("_vox") else value
                for name, value in part.items()
            }
        )
    return SegmenterConfig(**parts[0]), AMAEConfig(**parts[1])  # type: ignore[arg-type]


def segmentation_loss(
    logits_SRXYZ: Tensor, target_SRXYZ: Tensor, *, kind: Literal["dice", "dice_ce"]
) -> Tensor:
    """Return the loss of every study: soft Dice, optionally plus binary cross-entropy.

    Both are averaged over regions. The cross-entropy is binary per region, because regions may
    overlap; MONAI's `DiceCELoss` would take a softmax over regions here.

    Args:
        logits_SRXYZ: [S, R, X, Y, Z].
        target_SRXYZ: same shape, zeros and ones.
        kind: `dice`, or `dice_ce` for the sum of both.

    Returns:
        [S] float32, differentiable.
    """
    from monai.losses import DiceLoss

    logits_SRXYZ = logits_SRXYZ.float()
    dice_SR: Tensor = DiceLoss(sigmoid=True, reduction="none")(logits_SRXYZ, target_SRXYZ)
    loss_S = dice_SR.flatten(1).mean(dim=1)
    if kind == "dice_ce":
        entropy = nn.functional.binary_cross_entropy_with_logits(
            logits_SRXYZ, target_SRXYZ, reduction="none"
        )
        loss_S = loss_S + entropy.flatten(1).mean(dim=1)
    return loss_S


def region_targets(label_SXYZ: Tensor, regions: Mapping[str, list[int]]) -> Tensor:
    """Turn label values into one binary channel per region.

    Args:
        label_SXYZ: [S, X, Y, Z] integer label values, 0 background.
        regions: region name -> label values.

    Returns:
        [S, R, X, Y, Z] float32 of zeros and ones, regions in the mapping's order.
    """
    channels = [
        torch.isin(
            label_SXYZ, torch.tensor(values, device=label_SXYZ.device, dtype=label_SXYZ.dtype)
        )
        for values in regions.values()
    ]
    return torch.stack(channels, dim=1).to(torch.float32)
