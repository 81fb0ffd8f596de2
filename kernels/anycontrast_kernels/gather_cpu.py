"""Patches cut out of packed volumes on the CPU: volume by volume, in runs of voxels along k.

Does what `reference.gather_patches` and `gather_zscores` define, for int16 codes. A patch is a few
hundred runs that each lie in one piece, so runs are numbered, not voxels; z-scores are made of a
few patches at a time while these are in the processor's cache. A volume that is not made of whole
patches is first copied, mirrored and padded. Inputs are trusted: `patchify` checks them.

Letters: N patches, P voxels per patch, R runs per patch, V volumes, B voxels of all volumes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Codes = npt.NDArray[np.int16]
Index = npt.NDArray[np.int64]
Vox3 = tuple[int, int, int]

PIECE_VOX = 2**18
"""Voxels cut at a time: 0.5 MB of codes, 1 MB of z-scores."""


@dataclass(frozen=True)
class _Piece:
    """Some patches of one volume of whole patches."""

    volume: int
    rows: slice
    """Of the result."""
    codes_XYZ: Codes
    grid_n3: Index
    """Stored grid index of every patch; may lie outside."""
    mirrored: tuple[bool, bool, bool]

    def cut(self, patch_vox: Vox3, out_nP: Codes) -> None:
        """Copy the patches to the rows of a C-contiguous array."""
        grid = [n // p for n, p in zip(self.codes_XYZ.shape, patch_vox, strict=True)]
        inside_n = np.all((self.grid_n3 >= 0) & (self.grid_n3 < grid), axis=1)
        i, j, k = np.where(inside_n.reshape(-1, 1), self.grid_n3, 0).T
        depth, height, width = patch_vox
        first_n = (i * depth * self.codes_XYZ.shape[1] + j * height) * grid[2] + k
        planes = np.arange(depth)[:: -1 if self.mirrored[0] else 1]
        rows = np.arange(height)[:: -1 if self.mirrored[1] else 1]
        inner_R = ((planes[:, None] * self.codes_XYZ.shape[1] + rows) * grid[2]).reshape(-1)
        run = np.dtype(("V", 2 * width))
        runs = self.codes_XYZ.reshape(-1).view(run)
        # The indices are in range by construction; `raise` would buffer the whole output.
        runs.take(first_n[:, None] + inner_R, out=out_nP.view(run), mode="clip")
        if self.mirrored[2]:
            lines = out_nP.reshape(-1, width)
            lines[...] = lines[:, ::-1].copy()
        if not inside_n.all():
            out_nP[~inside_n] = 0


def gather_patches(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: Vox3,
) -> Tensor:
    """See `reference.gather_patches`; `codes_B` is int16 and all tensors are on the CPU."""
    out_NP = torch.empty((len(volume_N), math.prod(patch_vox)), dtype=torch.int16)
    array_NP = out_NP.numpy()
    for piece in _pieces(
        codes_B, volume_start_V, volume_shape_V3, flip_V3, volume_N, grid_N3, patch_vox
    ):
        piece.cut(patch_vox, array_NP[piece.rows])
    return out_NP


@torch.no_grad()
def gather_zscores(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    intensity_V4: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: Vox3,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `reference.gather_zscores`; `codes_B` is int16 and all tensors are on the CPU."""
    num_voxels = math.prod(patch_vox)
    size = _patches_per_piece(patch_vox)
    out_NP = torch.empty((len(volume_N), num_voxels), dtype=dtype)
    codes_nP = np.empty((size, num_voxels), dtype=np.int16)
    scratch_nP = torch.empty((0 if dtype == torch.float32 else size, num_voxels))
    for piece in _pieces(
        codes_B, volume_start_V, volume_shape_V3, flip_V3, volume_N, grid_N3, patch_vox
    ):
        num_patches = len(piece.grid_n3)
        piece.cut(patch_vox, codes_nP[:num_patches])
        is_direct = dtype == torch.float32
        x_nP = out_NP[piece.rows] if is_direct else scratch_nP[:num_patches]
        x_nP.copy_(torch.from_numpy(codes_nP[:num_patches]))
        gain, _, low, high = intensity_V4[piece.volume].tolist()
        # With numbers in place of tensors these two run ten times as fast.
        torch.add(intensity_V4[piece.volume, 1], x_nP, alpha=gain, out=x_nP)
        x_nP.clamp_(low, high)
        if not is_direct:
            out_NP[piece.rows] = x_nP
    return out_NP


def _pieces(
    codes_B: Tensor,
    volume_start_V: Tensor,
    volume_shape_V3: Tensor,
    flip_V3: Tensor,
    volume_N: Tensor,
    grid_N3: Tensor,
    patch_vox: Vox3,
) -> Iterator[_Piece]:
    """Yield the patches in their order, as long as they are of one volume and fit a piece."""
    size = _patches_per_piece(patch_vox)
    edges = np.flatnonzero(np.diff(volume_N.numpy(), prepend=-1, append=-1)).tolist()
    for first, stop in pairwise(edges):
        volume = int(volume_N[first])
        start, shape = int(volume_start_V[volume]), volume_shape_V3[volume].tolist()
        codes_XYZ = codes_B[start : start + math.prod(shape)].numpy().reshape(shape)
        flips = tuple(flip_V3[volume].tolist())
        grid_n3 = grid_N3[first:stop].numpy()
        if any(n % p for n, p in zip(shape, patch_vox, strict=True)):
            codes_XYZ, flips = _as_seen(codes_XYZ, flips, patch_vox), (False, False, False)
        last_3 = np.array(codes_XYZ.shape) // patch_vox - 1
        stored_n3 = np.where(flips, last_3 - grid_n3, grid_n3)
        for at in range(first, stop, size):
            end = min(at + size, stop)
            some_n3 = stored_n3[at - first : end - first]
            yield _Piece(volume, slice(at, end), codes_XYZ, some_n3, flips)


def _as_seen(codes_XYZ: Codes, flips: tuple[bool, ...], patch_vox: Vox3) -> Codes:
    """Copy a volume mirrored, and padded at its far ends up to whole patches."""
    shape = [-(-n // p) * p for n, p in zip(codes_XYZ.shape, patch_vox, strict=True)]
    padded = np.zeros(shape, dtype=np.int16)
    seen = np.flip(codes_XYZ, tuple(axis for axis in range(3) if flips[axis]))
    padded[tuple(slice(n) for n in codes_XYZ.shape)] = seen
    return padded


def _patches_per_piece(patch_vox: Vox3) -> int:
    return max(PIECE_VOX // math.prod(patch_vox), 1)
