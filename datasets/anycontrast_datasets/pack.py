"""Studies to a PackedBatch, and studies to packs of equal cost.

In: prepared studies, whole or cropped. Out: the tokens of all their volumes in one row, patches
without foreground left out, nothing padded but the last patch of an axis. The patches of a volume
are gathered in one pass as runs of voxels along k, so that the cost is near that of copying the
codes twice; there is no Python loop over tokens.

Letters: L patches of a volume, N kept ones, P voxels per patch, XYZ voxels along i, j, k.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anycontrast_datasets.augment import StudyView
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.intensity import BLOCK_VOX, unpack_occupancy
from anycontrast_datasets.study import StudyArrays, StudyError, StudyRecord, VolumeRecord

MIN_PATCHES = 2
"""Kept per volume even when empty: one to see, one to hide."""

LINEAR_COST = 1.0
QUADRATIC_COST = 1.0 / (6 * 768)
"""Cost of a study of L tokens = LINEAR_COST * L + QUADRATIC_COST * L^2.

An estimate, not a fit: a transformer block of width D spends 24 D^2 operations a token on its
projections and 4 D L on attention, hence a quadratic share of 1 / (6 D); D = 768 is ViT-B.
"""


@dataclass(frozen=True)
class _VolumeTokens:
    record: VolumeRecord
    codes_XYZ: npt.NDArray[np.int16]
    """C-contiguous, padded up to whole patches."""
    kept_N: npt.NDArray[np.int64]
    """Flat C-order indices into the patch grid, ascending."""


@dataclass(frozen=True)
class _StudyTokens:
    record: StudyRecord
    patch_grid: tuple[int, int, int]
    origin_vox: tuple[int, int, int]
    volumes: tuple[_VolumeTokens, ...]
    label: Tensor | None

    @property
    def num_tokens(self) -> int:
        return sum(len(volume.kept_N) for volume in self.volumes)


def pack_studies(
    studies: Sequence[StudyArrays | StudyView],
    patch_vox: tuple[int, int, int],
    *,
    epochs: Sequence[int],
    drop_empty: bool = True,
    labels: bool = False,
) -> PackedBatch:
    """Pack studies into one row of tokens, in the order given.

    Every volume's grid is padded at its far end up to whole patches with code 0. Tokens are
    ordered by study, volume (order of the record) and patch grid index in C order. Positions are
    patch centres in mm from the centre of the stored box, so a crop keeps its place.

    Args:
        studies: Whole studies, or `StudyView`s of a part of their box.
        patch_vox: Voxels of a patch along i, j, k.
        epochs: Epoch each study is served for.
        drop_empty: Leave out patches that are all code 0 in their volume; at least two (the
            fullest) are kept per volume. If False every volume has all patches of its grid.
        labels: Also hand on labels, padded with 0 like the codes; None for a study without one.

    Raises:
        StudyError: If a study has no volume, or its arrays differ in shape or from the record.
        ValueError: If there is no study, `patch_vox` is not positive or `epochs` does not match.
    """
    if len(studies) == 0:
        raise ValueError("pack: needs at least one study, got none")
    if len(epochs) != len(studies):
        raise ValueError(f"pack: one epoch per study, got {len(epochs)} for {len(studies)} studies")
    if len(patch_vox) != 3 or any(n < 1 for n in patch_vox):
        raise ValueError(f"pack: patch_vox must be three positive integers, got {patch_vox}")
    parts = [_study_tokens(study, patch_vox, drop_empty, labels) for study in studies]
    volumes = [volume for part in parts for volume in part.volumes]
    lengths = tuple(part.num_tokens for part in parts)
    volume_lengths = tuple(len(volume.kept_N) for volume in volumes)
    grid_T3 = _grid_index(parts)
    return PackedBatch(
        codes_TP=torch.from_numpy(_gather_patches(volumes, patch_vox)),
        volume_T=_repeat(volume_lengths),
        position_mm_T3=torch.from_numpy(_position_mm(parts, grid_T3, patch_vox)),
        grid_T3=torch.from_numpy(grid_T3),
        intensity_V4=torch.tensor([v.record.intensity_map for v in volumes], dtype=torch.float32),
        contrast_V=torch.tensor([contrast_id(v.record.contrast) for v in volumes]),
        descriptor_VK=torch.from_numpy(np.stack([v.record.descriptor.vector() for v in volumes])),
        study_V=_repeat([len(part.volumes) for part in parts]),
        cu_seqlens=torch.tensor((0, *accumulate(lengths)), dtype=torch.int32),
        lengths=lengths,
        volume_lengths=volume_lengths,
        study_ids=tuple(part.record.study_id for part in parts),
        epochs=tuple(int(epoch) for epoch in epochs),
        contrasts=tuple(tuple(v.record.contrast for v in part.volumes) for part in parts),
        patch_grids=tuple(part.patch_grid for part in parts),
        patch_vox=(patch_vox[0], patch_vox[1], patch_vox[2]),
        spacing_mm=tuple(part.record.spacing_mm for part in parts),
        labels=tuple(part.label for part in parts) if labels else (),
    )


def estimate_tokens(
    record: StudyRecord,
    contrasts: Sequence[str],
    patch_vox: tuple[int, int, int],
    *,
    crop_vox: tuple[int, int, int] | None = None,
    drop_empty: bool = True,
) -> float:
    """Estimate how many tokens a study will have, from its record alone.

    Exact for a whole study without a flip whose patches are made of whole occupancy blocks;
    otherwise the occupied share of the box is applied to the patches served.

    Args:
        record: The stored study without its voxels.
        contrasts: The contrasts that will be read.
        patch_vox: Voxels of a patch along i, j, k.
        crop_vox: Size of the crop, None for the whole box.
        drop_empty: Whether patches without foreground are left out.
    """
    size = crop_vox if crop_vox is not None else record.shape
    num_patches = math.prod(-(-n // p) for n, p in zip(size, patch_vox, strict=True))
    if not drop_empty:
        return float(num_patches * len(contrasts))
    share_V = _occupied_share(record, contrasts, patch_vox)
    return float(np.maximum(share_V * num_patches, MIN_PATCHES).sum())


def study_cost(num_tokens: float) -> float:
    """Return the estimated cost of a study of `num_tokens` tokens, in tokens of linear work."""
    return LINEAR_COST * num_tokens + QUADRATIC_COST * num_tokens**2


def assign_packs(costs: Sequence[float], num_packs: int) -> list[list[int]]:
    """Spread studies over packs so that the dearest pack is cheap: longest first, to the cheapest.

    Deterministic; no pack is empty; the dearest pack costs at most 4/3 - 1/(3 num_packs) of the
    best possible one.

    Args:
        costs: Cost of each study, >= 0, see `study_cost`.
        num_packs: Number of packs, 1 .. number of studies.

    Returns:
        Study indices of every pack, ascending within a pack.

    Raises:
        ValueError: If there are fewer studies than packs, or a cost is negative or not finite.

    Source: Graham, Bounds on multiprocessing timing anomalies, 1969 (LPT rule).
    """
    if num_packs < 1 or len(costs) < num_packs:
        raise ValueError(
            f"packs: every pack needs a study, got {len(costs)} studies for {num_packs} packs; "
            "raise studies_per_step or lower packs_per_step"
        )
    if any(not (math.isfinite(cost) and cost >= 0) for cost in costs):
        raise ValueError(f"packs: every cost must be finite and >= 0, got {list(costs)}")
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    # (load, studies, pack): the count comes second so that free studies still fill empty packs.
    heap = [(0.0, 0, pack) for pack in range(num_packs)]
    for study in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, pack = heap[0]
        packs[pack].append(study)
        heapq.heapreplace(heap, (load + costs[study], count + 1, pack))
    return [sorted(pack) for pack in packs]


def _occupied_share(
    record: StudyRecord, contrasts: Sequence[str], patch_vox: tuple[int, int, int]
) -> npt.NDArray[np.float64]:
    """Read from the occupancy bitmaps which share of a volume's patches holds foreground: [V]."""
    chosen = [volume for volume in record.volumes if volume.contrast in contrasts]
    blocks = [unpack_occupancy(volume.occupancy, record.shape) for volume in chosen]
    # Blocks per patch; a patch that is no multiple of a block is judged by single blocks.
    merge = [max(p // BLOCK_VOX, 1) for p in patch_vox]
    whole = [-(-n // m) * m for n, m in zip(blocks[0].shape, merge, strict=True)]
    bits = np.zeros((len(chosen), *whole), dtype=np.bool_)
    x, y, z = blocks[0].shape
    bits[:, :x, :y, :z] = blocks
    for axis, step in enumerate(merge, start=1):
        ahead = (slice(None),) * axis
        bits = reduce(np.logical_or, [bits[(*ahead, slice(i, None, step))] for i in range(step)])
    share: npt.NDArray[np.float64] = bits.mean(axis=(1, 2, 3))
    return share


def _study_tokens(
    study: StudyArrays | StudyView, patch_vox: tuple[int, int, int], drop_empty: bool, labels: bool
) -> _StudyTokens:
    view = study if isinstance(study, StudyView) else StudyView(study)
    arrays, record = view.arrays, view.arrays.record
    shape = _common_shape(view, cropped=isinstance(study, StudyView))
    grid = tuple(-(-n // p) for n, p in zip(shape, patch_vox, strict=True))
    padded = tuple(g * p for g, p in zip(grid, patch_vox, strict=True))
    volumes = []
    for volume in record.volumes:
        if volume.contrast in arrays.codes:
            codes = _pad_codes(arrays.codes[volume.contrast], padded)
            kept = _occupied(codes, patch_vox) if drop_empty else np.arange(math.prod(grid))
            volumes.append(_VolumeTokens(volume, codes, kept))
    label = None
    if labels and arrays.label is not None:
        label = _pad_label(arrays.label, padded)
    return _StudyTokens(record, (grid[0], grid[1], grid[2]), view.origin_vox, tuple(volumes), label)


def _common_shape(view: StudyView, *, cropped: bool) -> tuple[int, ...]:
    arrays, record = view.arrays, view.arrays.record
    unknown = sorted(set(arrays.codes) - set(record.contrasts))
    if not arrays.codes or unknown:
        raise StudyError(
            f"study {record.study_id}: packing needs volumes of the record's contrasts "
            f"{record.contrasts}, found {sorted(arrays.codes)}"
        )
    shapes = {name: codes.shape for name, codes in arrays.codes.items()}
    if arrays.label is not None:
        shapes["label"] = arrays.label.shape
    shape = next(iter(shapes.values()))
    if any(s != shape for s in shapes.values()):
        raise StudyError(f"study {record.study_id}: all arrays share one grid, found {shapes}")
    if not cropped and shape != record.shape:
        raise StudyError(
            f"study {record.study_id}: arrays are {shape}, the record says {record.shape}; "
            "wrap a part of a study in StudyView with its origin_vox"
        )
    return shape


def _pad_codes(codes: npt.NDArray[np.int16], shape: tuple[int, ...]) -> npt.NDArray[np.int16]:
    """Pad at the far end with code 0; hand back the array itself where nothing is to be done."""
    if codes.shape == shape:
        return np.ascontiguousarray(codes)
    padded = np.zeros(shape, dtype=np.int16)
    padded[tuple(slice(n) for n in codes.shape)] = codes
    return padded


def _pad_label(label: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Tensor:
    padded = torch.zeros(shape, dtype=torch.uint8)
    padded.numpy()[tuple(slice(n) for n in label.shape)] = label
    return padded


def _occupied(codes: npt.NDArray[np.int16], patch: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    x, y, z = (n // p for n, p in zip(codes.shape, patch, strict=True))
    # Whole rows along k are combined first: the long axis keeps the inner loop vectorised.
    rows = codes.reshape(x, patch[0], y, patch[1], z * patch[2])
    bits = np.bitwise_or.reduce(np.bitwise_or.reduce(rows, axis=1), axis=2)
    kept = np.flatnonzero(bits.reshape(x * y * z, patch[2]).any(axis=1))
    if len(kept) >= MIN_PATCHES:
        return kept
    blocks = codes.reshape(x, patch[0], y, patch[1], z, patch[2])
    sums = blocks.sum(axis=(1, 3, 5), dtype=np.int64).ravel()
    return np.sort(np.argsort(-sums, kind="stable")[:MIN_PATCHES])


def _gather_patches(
    volumes: Sequence[_VolumeTokens], patch: tuple[int, int, int]
) -> npt.NDArray[np.int16]:
    """Copy the kept patches of all volumes into one new [T, P] array, run by run along k."""
    num_tokens = sum(len(volume.kept_N) for volume in volumes)
    codes_TP = np.empty((num_tokens, math.prod(patch)), dtype=np.int16)
    run = np.dtype(("V", 2 * patch[2]))
    start = 0
    for volume in volumes:
        stop = start + len(volume.kept_N)
        first_N, inner_R = _run_index(volume.codes_XYZ.shape, patch)
        np.take(
            volume.codes_XYZ.view(run).reshape(-1),
            first_N[volume.kept_N][:, None] + inner_R,
            out=codes_TP[start:stop].view(run),
            # The indices are in range by construction; `raise` would buffer the whole output.
            mode="clip",
        )
        start = stop
    return codes_TP


@lru_cache(maxsize=64)
def _run_index(
    shape: tuple[int, ...], patch: tuple[int, int, int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number the runs of a grid: first run of every patch [L], and runs within a patch [R]."""
    x, y, z = (n // p for n, p in zip(shape, patch, strict=True))
    rows = np.arange(x * patch[0] * y * patch[1] * z).reshape(x, patch[0], y, patch[1], z)
    first = np.ascontiguousarray(rows[:, 0, :, 0, :]).reshape(-1)
    inner = np.ascontiguousarray(rows[0, :, 0, :, 0]).reshape(-1)
    return first, inner


def _grid_index(parts: Sequence[_StudyTokens]) -> npt.NDArray[np.int64]:
    index = [
        np.stack(np.unravel_index(volume.kept_N, part.patch_grid), axis=1)
        for part in parts
        for volume in part.volumes
    ]
    return np.concatenate(index).astype(np.int64, copy=False)


def _position_mm(
    parts: Sequence[_StudyTokens], grid_T3: npt.NDArray[np.int64], patch: tuple[int, int, int]
) -> npt.NDArray[np.float32]:
    lengths = [part.num_tokens for part in parts]
    origin_S3 = np.array([part.origin_vox for part in parts], dtype=np.float64)
    centre_S3 = np.array([part.record.shape for part in parts], dtype=np.float64) / 2
    spacing_S3 = np.array([part.record.spacing_mm for part in parts], dtype=np.float64)
    shift_T3 = np.repeat(origin_S3 - centre_S3, lengths, axis=0)
    voxel_T3 = (grid_T3 + 0.5) * np.array(patch, dtype=np.float64) + shift_T3
    position: npt.NDArray[np.float64] = voxel_T3 * np.repeat(spacing_S3, lengths, axis=0)
    return position.astype(np.float32)


def _repeat(counts: Sequence[int]) -> Tensor:
    """Number rows 0, 1, ... and repeat each by its count: [sum(counts)] int64."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
