"""What a model asks of a GPU: parameters, operations per study, memory per rank, all by formula.

In: the configuration. Out: plain numbers. The formulas are simple on purpose and stated with the
numbers they give: a plan that can be checked by hand.
"""

import math
from dataclasses import dataclass

import torch

from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.masking import MaskingConfig
from anycontrast_datasets.cost import BlockStack, CostModel, flops_cost

TRAINING_FACTOR = 3.0
"""A backward pass costs twice the forward pass."""
BYTES_PER_LAYER = {"none": 34, "selective": 18, "full": 2}
"""Activations a token keeps per block and unit of width, bf16, without attention matrices, by what
is recomputed."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Numbers of one model."""

    num_parameters: int
    flops: CostModel
    """Operations of one training step on a study, forward and backward, over its tokens."""
    activation_bytes_per_token: float
    """Kept for the backward pass, per token of the pack, hidden ones counted."""


def model_cost(model: AMAEConfig, masking: MaskingConfig) -> ModelCost:
    """Count parameters, operations and activations of pretraining.

    Source: activations: Korthikanti et al., arXiv 2205.05198, section 4.1 (34 s b h bytes a layer;
    the attention matrices are never kept).
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AMAE(model).parameters())
    size = model.resolved()
    assert size.width and size.depth and size.decoder_width and size.decoder_depth
    assert size.mlp_ratio is not None
    visible = 1.0 - masking.hidden_fraction
    targets = masking.hidden_fraction * masking.target_fraction
    is_joint = model.decoder == "joint"
    decoded = 1.0 if is_joint else targets
    num_voxels = math.prod(model.patch_vox)
    forward = flops_cost(
        [
            BlockStack(
                width=size.width, depth=size.depth, token_share=visible, mlp_ratio=size.mlp_ratio
            ),
            BlockStack(
                width=size.decoder_width,
                depth=size.decoder_depth,
                token_share=decoded,
                context_share=None if is_joint else visible,
            ),
        ],
        per_token=2 * num_voxels * (size.width * visible + size.decoder_width * targets)
        + 2 * size.width * size.decoder_width * visible,
    )
    linear, quadratic = _training_factors(str(model.recompute), size.mlp_ratio)
    per_layer = BYTES_PER_LAYER[str(model.recompute)]
    layers = size.width * size.depth * visible + size.decoder_width * size.decoder_depth * decoded
    # As float32 the visible voxels, and target and prediction of the targets.
    voxels = num_voxels * (4 * visible + 8 * targets)
    return ModelCost(
        num_parameters=parameters,
        flops=CostModel(linear=linear * forward.linear, quadratic=quadratic * forward.quadratic),
        activation_bytes_per_token=per_layer * layers + voxels,
    )


def _training_factors(recompute: str, mlp_ratio: float) -> tuple[float, float]:
    """Operations of a training step over those of its forward pass: projections, attention."""
    if recompute == "full":
        return TRAINING_FACTOR + 1.0, TRAINING_FACTOR + 1.0
    if recompute == "selective":
        # The first layer of the MLP again: 2 m of a block's 8 + 4 m.
        return TRAINING_FACTOR + 2 * mlp_ratio / (8 + 4 * mlp_ratio), TRAINING_FACTOR
    return TRAINING_FACTOR, TRAINING_FACTOR


def gpu_bytes(
    cost: ModelCost,
    *,
    pack_tokens: float,
    world_size: int,
    zero_stage: int,
    pack_bytes: float = 0.0,
) -> dict[str, float]:
    """Estimate the memory of one rank.

    Weights, gradients and two AdamW moments in float32, shared out as the ZeRO stage says, a bf16
    copy of the weights for autocast, the activations of one pack, and `pack_bytes` of its voxels.
    """
    shared = {0: 0, 1: 8, 2: 12, 3: 16}[zero_stage]
    state = cost.num_parameters * (16 - shared + shared / world_size + 2)
    activations = pack_tokens * cost.activation_bytes_per_token
    return {
        "state": state,
        "activations": activations,
        "voxels": pack_bytes,
        "total": state + activations + pack_bytes,
    }
