"""AMAE: a masked autoencoder over a study's contrasts, whichever it has. Read `AMAE.forward` first.

In: a `MaskedPack`, studies with any contrasts and any grids in one row of tokens, and which of
them are hidden. Out: the error of every predicted patch. Absent contrasts have no tokens and no
loss; averaging is left to the caller, who knows the count over all ranks.

Letters: N visible tokens, M targets, D width, P voxels per patch.

Source: Das, Zhao, Liu et al., arXiv 2501.09096. The paper leaves decoder size, patch size and
contrast vector length open; the presets fill them in.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from anycontrast.models.blocks import recompute_policy
from anycontrast.models.decoder import DecoderConfig, build_decoder
from anycontrast.models.encoder import Encoder, EncoderConfig
from anycontrast.models.masking import MaskedPack
from anycontrast.models.patches import patch_zscores, stored_error
from anycontrast_kernels.patch_loss import denormalize_patches, normalize_patches, patch_mse


class Preset(NamedTuple):
    """A named size. The MLP ratio is 4 everywhere, the head dim 64."""

    width: int
    depth: int
    num_heads: int
    decoder_width: int
    decoder_depth: int
    decoder_num_heads: int
    mlp_ratio: float = 4.0


PRESETS = {
    "tiny": Preset(128, 2, 2, 64, 1, 1),
    "small": Preset(384, 12, 6, 384, 3, 6),
    "base": Preset(768, 12, 12, 384, 3, 6),
    "large": Preset(1024, 24, 16, 384, 3, 6),
    "huge": Preset(1280, 32, 20, 384, 3, 6),
}
"""`tiny` is for tests and the demo; the others are ViT-S, -B, -L and -H, with heads of 64."""


@dataclass(frozen=True, kw_only=True)
class AMAEConfig:
    """Shape of an AMAE: a preset, and what differs from it."""

    preset: Literal["tiny", "small", "base", "large", "huge"] = "base"
    patch_vox: tuple[int, int, int] = (16, 16, 16)
    """Voxels of a patch along i, j, k."""
    decoder: Literal["joint", "cross"] = "joint"
    """`joint`: as the paper. `cross`: cheaper, can predict a sample of the hidden tokens."""
    norm_target: bool = False
    """Predict every patch normalised to mean 0 and deviation 1 instead of its z-scores."""
    paper_exact: bool = False
    """Multiplicative tokenizer of the paper instead of one that starts as the identity."""
    use_descriptor: bool = False
    """Let echo time, b-value and the like shape the contrast vector, not the contrast id alone."""
    encoder_contrast_embedding: bool = False
    """Add a learned vector per contrast before the encoder, beside what the tokenizer does."""
    contrast_vector_size: int = 64
    """Length of the tokenizer's contrast vector."""
    position_patch_mm: float = 16.0
    """Length of one step of the position code, in mm."""
    recompute: bool | str = "none"
    """Which activations are computed again in the backward pass instead of kept: `none`,
    `selective` (the MLPs' wide layers: half the memory for about a tenth more work) or `full` (a
    sixteenth of the memory for about a third more work). True is `full`, false is `none`."""
    width: int | None = None
    """Width of the encoder; None takes the preset's, as for all below."""
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    """Hidden width of the encoder's MLP over `width`; the decoder's ratio is 4."""
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"model.preset must be one of {tuple(PRESETS)}, got {self.preset!r}")
        if len(self.patch_vox) != 3 or any(n < 1 for n in self.patch_vox):
            raise ValueError(f"model.patch_vox must be three sizes >= 1, got {self.patch_vox}")
        if self.norm_target and math.prod(self.patch_vox) < 2:
            raise ValueError("model.norm_target needs a patch_vox of 2 voxels or more")
        if self.contrast_vector_size < 1:
            raise ValueError(
                f"model.contrast_vector_size must be >= 1, got {self.contrast_vector_size}; use 64"
            )
        if not (math.isfinite(self.position_patch_mm) and self.position_patch_mm > 0):
            raise ValueError(
                f"model.position_patch_mm must be > 0, got {self.position_patch_mm}; use the "
                "patch's width in mm"
            )
        # A frozen dataclass; older configurations hold a bool.
        policy = recompute_policy(self.recompute, "model.recompute")
        object.__setattr__(self, "recompute", policy)
        # Both check their block shape.
        self.encoder_config()
        self.decoder_config()

    def resolved(self) -> "AMAEConfig":
        """Return the config with every size filled in from the preset."""
        sizes = PRESETS[self.preset]._asdict()
        return replace(
            self, **{name: size for name, size in sizes.items() if getattr(self, name) is None}
        )

    def encoder_config(self) -> EncoderConfig:
        """Shape of the encoder alone, what finetuning builds."""
        return EncoderConfig(
            width=self._size("width"),
            depth=self._size("depth"),
            num_heads=self._size("num_heads"),
            mlp_ratio=self._mlp_ratio(),
            patch_vox=self.patch_vox,
            contrast_vector_size=self.contrast_vector_size,
            use_descriptor=self.use_descriptor,
            paper_exact=self.paper_exact,
            contrast_embedding=self.encoder_contrast_embedding,
            position_patch_mm=self.position_patch_mm,
            recompute=self.recompute,
        )

    def decoder_config(self) -> DecoderConfig:
        """Shape of the decoder alone."""
        return DecoderConfig(
            kind=self.decoder,
            encoder_width=self._size("width"),
            num_voxels=math.prod(self.patch_vox),
            width=self._size("decoder_width"),
            depth=self._size("decoder_depth"),
            num_heads=self._size("decoder_num_heads"),
            position_patch_mm=self.position_patch_mm,
            recompute=self.recompute,
        )

    def _mlp_ratio(self) -> float:
        return PRESETS[self.preset].mlp_ratio if self.mlp_ratio is None else self.mlp_ratio

    def _size(self, name: str) -> int:
        override = getattr(self, name)
        return int(getattr(PRESETS[self.preset], name) if override is None else override)


class AMAEOutput(NamedTuple):
    """What one forward pass gives; a tuple, so that engines can hook its tensors."""

    loss_M: Tensor
    """[M] float32, mean squared error of every predicted patch."""
    prediction_MP: Tensor
    """[M, P]; [0, P] if only the loss was asked for."""
    target_MP: Tensor
    """[M, P] float32, what was to be predicted: z-scores, or normalised patches; or [0, P]."""


class AMAE(nn.Module):
    """Masked autoencoder over studies with any contrasts."""

    def __init__(self, config: AMAEConfig) -> None:
        super().__init__()
        self.config = config.resolved()
        self.encoder = Encoder(self.config.encoder_config())
        self.decoder = build_decoder(self.config.decoder_config())

    def forward(self, pack: MaskedPack, *, loss_only: bool = False) -> AMAEOutput:
        """Encode what is visible, decode what is hidden, compare.

        Args:
            pack: on the device of the weights.
            loss_only: leave prediction and target out, as training does: targets are then never
                made as a whole, and the gradient takes the memory of the prediction.
        """
        encoded_ND = self.encode(pack)
        prediction_MP = self.decode(encoded_ND, pack)
        if loss_only:
            loss_M = stored_error(
                pack.batch,
                pack.target_index_M,
                prediction_MP,
                norm_target=self.config.norm_target,
            )
            nothing_0P = loss_M.detach().new_empty(0, prediction_MP.shape[1])
            return AMAEOutput(loss_M, nothing_0P, nothing_0P)
        target_MP = self.target(pack)
        loss_M = patch_mse(prediction_MP, target_MP, norm_target=False)
        return AMAEOutput(loss_M, prediction_MP, target_MP)

    def encode(self, pack: MaskedPack) -> Tensor:
        """Encode the visible tokens: [N, D]."""
        visible = (pack.visible_index_N, pack.visible_lengths, pack.cu_visible)
        encoded_ND: Tensor = self.encoder(pack.batch, visible=visible)[0]
        return encoded_ND

    def decode(self, encoded_ND: Tensor, pack: MaskedPack) -> Tensor:
        """Predict the voxels of the targets: [M, P]."""
        prediction_MP: Tensor = self.decoder(encoded_ND, pack)
        return prediction_MP

    def target(self, pack: MaskedPack) -> Tensor:
        """Voxels of the targets, normalised per patch if `norm_target`: [M, P] float32."""
        voxels_MP = target_voxels(pack)
        return normalize_patches(voxels_MP) if self.config.norm_target else voxels_MP

    @torch.no_grad()
    def reconstruct(self, pack: MaskedPack) -> Tensor:
        """Predict the targets as z-scores, for pictures: [M, P] float32.

        With `norm_target` the mean and deviation of the true patch are put back, which a picture
        should say: brightness and contrast of a patch are then not the model's.
        """
        prediction_MP = self.decode(self.encode(pack), pack).float()
        if self.config.norm_target:
            return denormalize_patches(prediction_MP, target_voxels(pack))
        return prediction_MP


def target_voxels(pack: MaskedPack) -> Tensor:
    """Voxels of the targets as z-scores: [M, P] float32."""
    return patch_zscores(pack.batch, pack.target_index_M)
