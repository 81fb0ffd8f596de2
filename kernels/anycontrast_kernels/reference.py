"""Every operation in plain PyTorch: the definition, the oracle of the tests, and the CPU path.

Nothing here is fast on an accelerator and nothing here is clever; a faster implementation is right
when it agrees with this file. Inputs are trusted: the public functions of `attention`, `patch_loss`
and `patchify` check them.

Letters: T tokens, N / M tokens picked from T, S sequences, H heads, D head dim, P voxels per patch,
V volumes, B voxels of all volumes, L tokens of one sequence.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PATCH_VARIANCE_FLOOR = 1e-6
"""Added to the variance of a patch before the root, so that an empty patch stays finite."""


def attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    *,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Attend within each sequence: softmax(q k^T * scale) v, non-causal, in float32.

    A query of a sequence without keys gets 0.

    Args:
        q_THD: [Tq, H, D], sequences one after the other.
        k_THD: [Tk, H, D].
        v_THD: [Tk, H, D].
        lengths_q: queries per sequence.
        lengths_k: keys per sequence.
        scale: default 1 / sqrt(D).

    Returns:
        [Tq, H, D] in the dtype of `q_THD`.
    """
    factor = 1.0 / math.sqrt(q_THD.shape[-1]) if scale is None else scale
    outputs = []
    for q_LHD, k_LHD, v_LHD in zip(
        torch.split(q_THD.float(), list(lengths_q)),
        torch.split(k_THD.float(), list(lengths_k)),
        torch.split(v_THD.float(), list(lengths_k)),
        strict=True,
    ):
        if k_LHD.shape[0] == 0:
            outputs.append(q_LHD * 0.0)
            continue
        scores_HLL = torch.einsum("qhd,khd->hqk", q_LHD, k_LHD) * factor
        outputs.append(torch.einsum("hqk,khd->qhd", scores_HLL.softmax(dim=-1), v_LHD))
    return torch.cat(outputs).to(q_THD.dtype) if outputs else q_THD.clone()


def intensity_map(codes_TP: Tensor, volume_T: Tensor, intensity_V4: Tensor) -> Tensor:
    """Turn stored codes into z-scores: clip(code * gain + bias, low, high), each volume its own.

    Args:
        codes_TP: [T, P] int16.
        volume_T: [T] int64, row of `intensity_V4`.
        intensity_V4: [V, 4] float32, (gain, bias, low, high).

    Returns:
        [T, P] float32.
    """
    gain_T1, bias_T1, low_T1, high_T1 = intensity_V4.index_select(0, volume_T).chunk(4, dim=1)
    return torch.clamp(torch.addcmul(bias_T1, codes_TP.float(), gain_T1), low_T1, high_T1)


def patchify(volume_XYZ: Tensor, patch_vox: tuple[int, int, int]) -> Tensor:
    """Cut a volume into patches; patches and the voxels inside one are in C order of (i, j, k).

    Args:
        volume_XYZ: [X, Y, Z], each a multiple of the patch.
        patch_vox: voxels of a patch along i, j, k.

    Returns:
        [T, P] with T the product of the patch grid, P the product of `patch_vox`.
    """
    a, b, c = patch_vox
    x, y, z = (n // p for n, p in zip(volume_XYZ.shape, patch_vox, strict=True))
    blocks = volume_XYZ.reshape(x, a, y, b, z, c).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(x * y * z, a * b * c)


def unpatchify(
    patches_TP: Tensor, grid: tuple[int, int, int], patch_vox: tuple[int, int, int]
) -> Tensor:
    """Put patches back together: the inverse of `patchify`.

    Args:
        patches_TP: [T, P], every patch of the grid.
        grid: patches along each axis.
        patch_vox: voxels of a patch along i, j, k.

    Returns:
        [X, Y, Z].
    """
    x, y, z = grid
    a, b, c = patch_vox
    blocks = patches_TP.reshape(x, y, z, a, b, c).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(x * a, y * b, z * c)


def gather_patches(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: tuple[int, int, int],
) -> Tensor:
    """Cut patches out of packed volumes, each seen mirrored along the axes it says.

    Voxel x of a patch at grid index g lies at the seen voxel g * p + x of its volume. Seen voxel s
    of an axis of n voxels is the stored voxel s, or n - 1 - s where the axis is flipped; a voxel
    beyond the volume is code 0.

    Args:
        codes_B: [B], the volumes one after the other, each in C order of (i, j, k).
        volume_start_V: [V] int64, first voxel of each volume; volumes may share voxels.
        volume_shape_V3: [V, 3] int64, voxels of each volume along i, j, k.
        flip_V3: [V, 3] bool, axes along which the volume is seen mirrored.
        volume_N: [N] int64, volume of each patch.
        grid_N3: [N, 3] int64, index of each patch in its volume's grid as seen.
        patch_vox: voxels of a patch along i, j, k.

    Returns:
        [N, P] in the dtype of `codes_B`, voxels of a patch in C order.
    """
    axes = [torch.arange(p, device=codes_B.device) for p in patch_vox]
    offset_P3 = torch.cartesian_prod(*axes)
    size_N13 = volume_shape_V3[volume_N].unsqueeze(1)
    seen_NP3 = (grid_N3 * grid_N3.new_tensor(patch_vox)).unsqueeze(1) + offset_P3
    inside_NP = ((seen_NP3 >= 0) & (seen_NP3 < size_N13)).all(dim=2)
    i, j, k = torch.where(flip_V3[volume_N].unsqueeze(1), size_N13 - 1 - seen_NP3, seen_NP3).unbind(
        dim=2
    )
    _, size_j, size_k = size_N13.unbind(dim=2)
    stored_NP = volume_start_V[volume_N].unsqueeze(1) + (i * size_j + j) * size_k + k
    codes_NP = codes_B[torch.where(inside_NP, stored_NP, 0)]
    return torch.where(inside_NP, codes_NP, torch.zeros_like(codes_NP))


def gather_zscores(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    intensity_V4: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cut patches out of packed volumes as z-scores: `gather_patches`, then `intensity_map`.

    Args:
        codes_B: [B], as for `gather_patches`, like all that is not said here.
        volume_start_V: [V] int64.
        volume_shape_V3: [V, 3] int64.
        flip_V3: [V, 3] bool.
        intensity_V4: [V, 4] float32, (gain, bias, low, high).
        volume_N: [N] int64.
        grid_N3: [N, 3] int64.
        patch_vox: voxels of a patch along i, j, k.
        dtype: of the result; computed in float32.

    Returns:
        [N, P].
    """
    codes_NP = gather_patches(
        codes_B, volume_start_V, volume_shape_V3, flip_V3, volume_N, grid_N3, patch_vox
    )
    return intensity_map(codes_NP, volume_N, intensity_V4).to(dtype)


def patch_moments(target_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every patch, as MAE's normalised target uses them.

    The deviation is sqrt(unbiased variance + 1e-6).

    Args:
        target_NP: [N, P] with P >= 2.

    Returns:
        mean [N, 1] and deviation [N, 1], float32.
    """
    variance_N1, mean_N1 = torch.var_mean(target_NP.float(), dim=1, keepdim=True, correction=1)
    return mean_N1, (variance_N1 + PATCH_VARIANCE_FLOOR).sqrt()


def normalize_patches(target_NP: Tensor) -> Tensor:
    """Give every patch mean 0 and deviation 1 (`patch_moments`). [N, P] -> [N, P] float32."""
    mean_N1, deviation_N1 = patch_moments(target_NP)
    return (target_NP.float() - mean_N1) / deviation_N1


def patch_mse(prediction_NP: Tensor, target_NP: Tensor, *, norm_target: bool) -> Tensor:
    """Mean squared error of every patch.

    Args:
        prediction_NP: [N, P].
        target_NP: [N, P], voxels as z-scores.
        norm_target: compare with the patch normalised to mean 0 and deviation 1.

    Returns:
        [N] float32.
    """
    target = normalize_patches(target_NP) if norm_target else target_NP.float()
    return (prediction_NP.float() - target).square().mean(dim=1)
