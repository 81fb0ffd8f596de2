"""Which voxels of a volume show tissue rather than air.

In: float32 voxels. Out: a mask that errs on the generous side, because what it leaves out is gone
from the shards.
"""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

ZERO_SHARE = 0.1
ZERO_COHERENCE = 0.9
SPECK_SHARE = 0.01
AIR_SHARE = 0.15
"""Air is darker than this share of the 99th percentile, wherever the histogram would split."""


def foreground_mask(array: Floats, spacing_mm: tuple[float, float, float]) -> Mask:
    """Return where a volume shows tissue.

    A volume whose background is exactly 0 (skull-stripped, or masked by the scanner) keeps every
    nonzero voxel, negative ones included, and the holes enclosed by them. Any other volume is
    thresholded between air and tissue (Otsu on a logarithmic scale, on voxels averaged in pairs
    against noise); the largest piece, its holes and a rim of one averaged voxel are kept. The
    threshold errs on the generous side: what is left out is gone from the shards.

    Args:
        array: [X, Y, Z] float32, finite.
        spacing_mm: Voxel spacing; axes coarser than 2 mm are not averaged.

    Returns:
        [X, Y, Z] bool; all False if nothing stands out.
    """
    nonzero = np.asarray(array != 0)
    if not nonzero.any():
        return nonzero
    if _has_zero_background(nonzero):
        return _within_box(nonzero)
    factors = tuple(
        2 if size >= 16 and step <= 2 else 1
        for size, step in zip(array.shape, spacing_mm, strict=True)
    )
    coarse = _pooled(array if array.min() >= 0 else np.abs(array), factors)
    mask = coarse > _air_threshold(coarse)
    mask = _fill_holes(_largest_piece(mask))
    return _doubled(ndimage.binary_dilation(mask), factors, array.shape)


def _has_zero_background(nonzero: Mask) -> bool:
    """Say whether zeros are a background: many, and next to each other rather than scattered."""
    zero = ~nonzero
    if zero.mean() < ZERO_SHARE:
        return False
    first = zero[..., :-1]
    pairs = int(np.count_nonzero(first & zero[..., 1:]))
    return pairs >= ZERO_COHERENCE * max(1, int(np.count_nonzero(first)))


def _within_box(mask: Mask) -> Mask:
    """Clean a mask inside its bounding box, with a rim of one voxel: less to label."""
    box = tuple(
        slice(max(0, hit[0] - 1), hit[-1] + 2)
        for axis in range(3)
        for hit in [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))]
    )
    out = np.zeros_like(mask)
    out[box] = _without_specks(mask[box])
    return out


def _without_specks(mask: Mask) -> Mask:
    """Drop pieces smaller than a hundredth of the largest, then fill enclosed holes.

    Both are judged at twice the voxel size, eight times as fast: pieces closer than that are one,
    and a hole closer than that to the outside is open.
    """
    padded = np.pad(mask, [(0, size % 2) for size in mask.shape])
    pieces, count = ndimage.label(_halved(padded, np.logical_or))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    is_kept = sizes >= SPECK_SHARE * sizes.max(initial=0)
    if count > 1 and not is_kept[1:].all():
        mask = mask & _doubled(is_kept[pieces], (2, 2, 2), mask.shape)
    solid = _halved(padded, np.logical_and)
    holes = _fill_holes(solid) & ~solid
    return mask | _doubled(holes, (2, 2, 2), mask.shape) if holes.any() else mask


def _halved(mask: Mask, join: np.ufunc) -> Mask:
    """Join blocks of 2 x 2 x 2 voxels of a mask with even sides."""
    mask = join(mask[0::2], mask[1::2])
    mask = join(mask[:, 0::2], mask[:, 1::2])
    return np.asarray(join(mask[:, :, 0::2], mask[:, :, 1::2]))


def _largest_piece(mask: Mask) -> Mask:
    pieces, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.asarray(pieces == sizes.argmax())


def _fill_holes(mask: Mask) -> Mask:
    """Add background that no path of face neighbours joins to the edge of the array."""
    pieces, count = ndimage.label(~mask)
    if count == 0:
        return mask
    is_open = np.zeros(count + 1, dtype=np.bool_)
    for axis in range(3):
        for end in (0, -1):
            is_open[np.take(pieces, end, axis=axis)] = True
    is_open[0] = False
    if is_open.sum() == 1:
        return np.asarray(pieces != is_open.argmax())
    return ~is_open[pieces]


def _pooled(array: Floats, factors: tuple[int, ...]) -> Floats:
    """Average blocks of `factors` voxels; a remainder at the far end is left out."""
    out = array
    for axis, factor in enumerate(factors):
        if factor == 2:
            size = out.shape[axis] // 2 * 2
            even = out[(slice(None),) * axis + (slice(0, size, 2),)]
            odd = out[(slice(None),) * axis + (slice(1, size, 2),)]
            out = (even + odd) * np.float32(0.5)
    return out


def _doubled(mask: Mask, factors: tuple[int, ...], shape: tuple[int, ...]) -> Mask:
    """Repeat every voxel `factors` times; cut, or repeat the far edge, to `shape`."""
    for axis, factor in enumerate(factors):
        mask = np.repeat(mask, factor, axis=axis) if factor > 1 else mask
    mask = mask[tuple(slice(size) for size in shape)]
    widths = [(0, have - got) for have, got in zip(shape, mask.shape, strict=True)]
    return np.pad(mask, widths, mode="edge") if any(w for _, w in widths) else mask


def _air_threshold(array: Floats, bins: int = 256) -> float:
    """Return the threshold that best splits log intensities in two, if that can be air.

    A field of view without air would be split between tissues; hence the upper bound.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979, eq. 18.
    """
    values = array.ravel()[:: max(1, array.size // 2**18)]
    bright = float(np.percentile(values, 99))
    floor = 0.02 * bright
    if floor <= 0:
        return 0.0
    counts, edges = np.histogram(np.log1p(values / np.float32(floor)), bins=bins)
    share = counts / counts.sum()
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(share)
    moment = np.cumsum(share * centres)
    spread = np.zeros(bins)
    inner = (weight > 0) & (weight < 1)
    spread[inner] = (moment[-1] * weight[inner] - moment[inner]) ** 2
    spread[inner] /= weight[inner] * (1 - weight[inner])
    threshold = float(np.expm1(edges[int(spread.argmax()) + 1]) * floor)
    return min(threshold, AIR_SHARE * bright)
