"""Patches of a PackedBatch: cut out of its volumes where they are needed, or compared there.

Letters: T tokens, N of them picked, P voxels per patch.
"""

import torch
from torch import Tensor

from anycontrast_datasets.batch import PackedBatch
from anycontrast_kernels.patch_loss import stored_patch_mse
from anycontrast_kernels.patchify import gather_patches, gather_zscores


def patch_codes(batch: PackedBatch, index_N: Tensor | None = None) -> Tensor:
    """Return the stored codes of the tokens: [N, P] int16.

    Args:
        batch: on any device.
        index_N: [N] int64, which tokens; None for all T.
    """
    volume_N, grid_N3 = _picked(batch, index_N)
    return gather_patches(
        batch.codes_B,
        batch.volume_start_V,
        batch.volume_shape_V3,
        batch.flip_V3,
        volume_N,
        grid_N3,
        batch.patch_vox,
    )


def patch_zscores(
    batch: PackedBatch, index_N: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the voxels of the tokens as z-scores: [N, P].

    Args:
        batch: on any device.
        index_N: [N] int64, which tokens; None for all T.
        dtype: of the result; computed in float32.
    """
    volume_N, grid_N3 = _picked(batch, index_N)
    return gather_zscores(
        batch.codes_B,
        batch.volume_start_V,
        batch.volume_shape_V3,
        batch.flip_V3,
        batch.intensity_V4,
        volume_N,
        grid_N3,
        batch.patch_vox,
        dtype=dtype,
    )


def stored_error(
    batch: PackedBatch, index_N: Tensor, prediction_NP: Tensor, *, norm_target: bool
) -> Tensor:
    """Compare predictions with the stored patches of tokens: [N] float32, mean squared errors.

    Args:
        batch: on the device of the predictions.
        index_N: [N] int64, which tokens were predicted.
        prediction_NP: [N, P] floating; its memory is taken for the gradient and must not be read
            afterwards.
        norm_target: compare with patches normalised to mean 0 and deviation 1.
    """
    volume_N, grid_N3 = _picked(batch, index_N)
    return stored_patch_mse(
        prediction_NP,
        batch.codes_B,
        batch.volume_start_V,
        batch.volume_shape_V3,
        batch.flip_V3,
        batch.intensity_V4,
        volume_N,
        grid_N3,
        batch.patch_vox,
        norm_target=norm_target,
        overwrite_prediction=True,
    )


def _picked(batch: PackedBatch, index_N: Tensor | None) -> tuple[Tensor, Tensor]:
    if index_N is None:
        return batch.volume_T, batch.grid_T3
    return batch.volume_T.index_select(0, index_N), batch.grid_T3.index_select(0, index_N)
