"""Studies to a PackedBatch, and studies to packs of equal cost.

In: prepared studies, whole or cropped. Out: a PackedBatch of their voxels, and of all patches of
all volumes that hold foreground. The voxels are copied once, nothing is cut or padded here, and
there is no Python loop over tokens.

Letters: N kept patches of a volume, B voxels of all volumes, XYZ voxels along i, j, k.
"""

import heapq
import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anycontrast_datasets.augment import StudyView
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.cost import DEFAULT_COST
from anycontrast_datasets.intensity import BLOCK_VOX, unpack_occupancy
from anycontrast_datasets.pack_tables import StudyTokens, packed_batch
from anycontrast_datasets.store.partial import patch_grid
from anycontrast_datasets.store.slots import recycled_bytes
from anycontrast_datasets.study import StudyArrays, StudyError, StudyRecord

Vox3 = tuple[int, int, int]

MIN_PATCHES = 2
"""Kept per volume even when empty: one to see, one to hide."""


def pack_studies(
    studies: Sequence[StudyArrays | StudyView],
    patch_vox: tuple[int, int, int],
    *,
    epochs: Sequence[int],
    drop_empty: bool = True,
    labels: bool = False,
) -> PackedBatch:
    """Pack studies into one row of tokens, in the order given.

    Every volume's grid reaches over its far end up to whole patches, with code 0 there. Tokens are
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
    views = [study if isinstance(study, StudyView) else StudyView(study) for study in studies]
    for study, view in zip(studies, views, strict=True):
        _check_shape(view, cropped=isinstance(study, StudyView))
    num_voxels = sum(math.prod(view.shape) * len(view.arrays.codes) for view in views)
    codes_B = recycled_bytes(2 * num_voxels).view(np.int16)
    parts, start = [], 0
    for view, epoch in zip(views, epochs, strict=True):
        part = _place_study(view, codes_B[start:], start, patch_vox, int(epoch), drop_empty, labels)
        parts.append(part)
        start += math.prod(part.shape) * len(part.volumes)
    return packed_batch(parts, codes_B, patch_vox, labels=labels)


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
    return float(DEFAULT_COST(num_tokens))


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
    record: StudyRecord, contrasts: Sequence[str], patch_vox: Vox3
) -> npt.NDArray[np.float64]:
    """Read from the occupancy bitmaps which share of a volume's patches holds foreground: [V]."""
    bits = occupied_patches(record, contrasts, patch_vox)
    share: npt.NDArray[np.float64] = bits.mean(axis=(1, 2, 3))
    return share


def occupied_patches(
    record: StudyRecord, contrasts: Sequence[str], patch_vox: Vox3, *, flips: Sequence[int] = ()
) -> npt.NDArray[np.bool_]:
    """Read from the occupancy bitmaps which patches hold foreground: [V, I, J, K].

    Exact where a patch is made of whole blocks; along other axes a single block stands for a
    patch, and the grid is that of the blocks.

    Args:
        record: The stored study.
        contrasts: Volumes wanted; the result is in the record's order.
        patch_vox: Voxels of a patch along i, j, k.
        flips: Axes along which the study is seen mirrored.
    """
    chosen = [volume for volume in record.volumes if volume.contrast in contrasts]
    blocks = [
        np.flip(unpack_occupancy(volume.occupancy, record.shape), tuple(flips)) for volume in chosen
    ]
    merge = [max(p // BLOCK_VOX, 1) for p in patch_vox]
    whole = [-(-n // m) * m for n, m in zip(blocks[0].shape, merge, strict=True)]
    bits = np.zeros((len(chosen), *whole), dtype=np.bool_)
    x, y, z = blocks[0].shape
    bits[:, :x, :y, :z] = blocks
    for axis, step in enumerate(merge, start=1):
        ahead = (slice(None),) * axis
        bits = reduce(np.logical_or, [bits[(*ahead, slice(i, None, step))] for i in range(step)])
    return bits


def occupied_voxels(codes_XYZ: npt.NDArray[np.int16], patch_vox: Vox3) -> npt.NDArray[np.int64]:
    """Find which patches of a volume hold foreground, but at least the two fullest.

    Args:
        codes_XYZ: [X, Y, Z]; the grid reaches over its far ends up to whole patches.
        patch_vox: Voxels of a patch along i, j, k.

    Returns:
        [N] flat C-order indices into the patch grid, ascending.
    """
    x, y, z = grid = patch_grid(codes_XYZ.shape, patch_vox)
    a, b, c = patch_vox
    shape = (x * a, y * b, z * c)
    if codes_XYZ.shape != shape:
        padded = np.zeros(shape, dtype=np.int16)
        padded[tuple(slice(n) for n in codes_XYZ.shape)] = codes_XYZ
        codes_XYZ = padded
    codes_XYZ = np.ascontiguousarray(codes_XYZ)
    # Whole rows along k are combined first: the long axis keeps the inner loop vectorised.
    rows = codes_XYZ.reshape(x, a, y, b, z * c)
    bits = np.bitwise_or.reduce(np.bitwise_or.reduce(rows, axis=1), axis=2)
    kept = np.flatnonzero(bits.reshape(math.prod(grid), c).any(axis=1))
    if len(kept) >= MIN_PATCHES:
        return kept
    sums = codes_XYZ.reshape(x, a, y, b, z, c).sum(axis=(1, 3, 5), dtype=np.int64).ravel()
    return np.sort(np.argsort(-sums, kind="stable")[:MIN_PATCHES])


def _place_study(
    view: StudyView,
    codes_B: npt.NDArray[np.int16],
    start: int,
    patch_vox: Vox3,
    epoch: int,
    drop_empty: bool,
    labels: bool,
) -> StudyTokens:
    """Copy the volumes to the head of `codes_B`, and say which patches of them are kept."""
    arrays, record = view.arrays, view.arrays.record
    grid = patch_grid(view.shape, patch_vox)
    padded = tuple(g * p for g, p in zip(grid, patch_vox, strict=True))
    volumes = tuple(volume for volume in record.volumes if volume.contrast in arrays.codes)
    size = math.prod(view.shape)
    kept = []
    for number, volume in enumerate(volumes):
        codes_XYZ = codes_B[number * size : (number + 1) * size].reshape(view.shape)
        codes_XYZ[...] = arrays.codes[volume.contrast]
        every = np.arange(math.prod(grid))
        kept.append(occupied_voxels(codes_XYZ, patch_vox) if drop_empty else every)
    return StudyTokens(
        record=record,
        epoch=epoch,
        patch_grid=grid,
        origin_vox=view.origin_vox,
        volumes=volumes,
        kept=tuple(kept),
        starts=tuple(start + number * size for number in range(len(volumes))),
        shape=view.shape,
        label=_pad_label(arrays.label, padded) if labels and arrays.label is not None else None,
    )


def _check_shape(view: StudyView, *, cropped: bool) -> None:
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


def _pad_label(label: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Tensor:
    padded = torch.zeros(shape, dtype=torch.uint8)
    padded.numpy()[tuple(slice(n) for n in label.shape)] = label
    return padded
