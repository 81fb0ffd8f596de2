"""Foreground, robust statistics and 12-bit codes of one volume.

In: float32 voxels. Out: a mask of what is imaged tissue rather than air, int16 codes with a linear
map back to the source unit, and the few numbers a reader needs to normalise without looking at the
voxels again. Code 0 is background and nothing else; foreground takes codes 1..4095, so one step is
a four-thousandth of the range (0.3 to 0.4 % of the noise of a clinical scan). Gives up: values
above 110 % of the range up to the 99.95th percentile saturate at the last code, except for maps
whose values are measurements (`ADC` and the like), which keep their whole range.
"""

import base64
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from anycontrast_datasets.study import StudyError

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

MAX_CODE = 4095
BLOCK_VOX = 8
MIN_FOREGROUND_VOX = 8
QUANTITATIVE = frozenset({"ADC", "FA", "CBF"})
"""Contrasts whose values are measurements: nothing is clipped."""
HEADROOM = 1.1
ZERO_SHARE = 0.1
ZERO_COHERENCE = 0.9
SPECK_SHARE = 0.01
AIR_SHARE = 0.15
"""Air is darker than this share of the 99th percentile, wherever the histogram would split."""


@dataclass(frozen=True, kw_only=True)
class CodedVolume:
    """One volume as int16 codes: `value = code * scale + offset` in source units."""

    codes: npt.NDArray[np.int16]
    scale: float
    offset: float
    p0_5: float
    p99_5: float
    mean: float
    std: float
    num_foreground: int


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
    coarse = _pooled(np.abs(array), factors)
    mask = coarse > _air_threshold(coarse)
    mask = _fill_holes(_largest_piece(mask))
    mask = ndimage.binary_dilation(mask)
    for axis, factor in enumerate(factors):
        mask = np.repeat(mask, factor, axis=axis)
    widths = [(0, have - got) for have, got in zip(array.shape, mask.shape, strict=True)]
    return np.pad(mask, widths, mode="edge")


def encode(array: Floats, mask: Mask, contrast: str) -> CodedVolume:
    """Quantise the foreground of a volume and take its statistics.

    Args:
        array: [X, Y, Z] float32.
        mask: [X, Y, Z] bool, the foreground.
        contrast: Vocabulary name; decides whether outliers may saturate.

    Raises:
        StudyError: Code `empty_foreground`, if there are fewer than 8 foreground voxels or they
            all have one value.
    """
    values = array[mask]
    if values.size < MIN_FOREGROUND_VOX:
        raise StudyError(
            f"{contrast}: the foreground must have at least {MIN_FOREGROUND_VOX} voxels within the "
            f"field of view of the reference volume, found {values.size}; "
            "leave the volume out or check its affine",
            code="empty_foreground",
        )
    low, p0_5, p99_5, p99_95, high = (
        float(p) for p in np.percentile(values, [0, 0.5, 99.5, 99.95, 100])
    )
    clipped = np.clip(values, p0_5, p99_5)
    mean, std = float(clipped.mean(dtype=np.float64)), float(clipped.std(dtype=np.float64))
    if not std > 1e-7 * max(abs(p0_5), abs(p99_5)):
        raise StudyError(
            f"{contrast}: the foreground must vary, found {values.size} voxels between {p0_5:g} "
            f"and {p99_5:g} with standard deviation {std:g}; leave the volume out",
            code="empty_foreground",
        )
    top = high if contrast in QUANTITATIVE else min(high, low + HEADROOM * (p99_95 - low))
    scale = (top - low) / (MAX_CODE - 1)
    offset = low - scale
    clipped[:] = values
    clipped -= np.float32(low)
    clipped *= np.float32(1 / scale)
    np.rint(clipped, out=clipped)
    clipped += 1
    np.clip(clipped, 1, MAX_CODE, out=clipped)
    codes = np.zeros(array.shape, dtype=np.int16)
    codes[mask] = clipped.astype(np.int16)
    return CodedVolume(
        codes=codes,
        scale=scale,
        offset=offset,
        p0_5=p0_5,
        p99_5=p99_5,
        mean=mean,
        std=std,
        num_foreground=int(values.size),
    )


def pack_occupancy(codes: npt.NDArray[np.int16]) -> str:
    """Return which blocks of 8^3 voxels hold a nonzero code: packed bits, C order, base64.

    Args:
        codes: [X, Y, Z] int16, every side a multiple of 8.
    """
    x, y, z = codes.shape
    assert not any(n % BLOCK_VOX for n in codes.shape), codes.shape
    rows = (codes != 0).reshape(x, y, z // BLOCK_VOX, BLOCK_VOX).any(axis=3)
    blocks = rows.reshape(x // BLOCK_VOX, BLOCK_VOX, y // BLOCK_VOX, BLOCK_VOX, -1).any(axis=(1, 3))
    return base64.b64encode(np.packbits(blocks, axis=None).tobytes()).decode("ascii")


def unpack_occupancy(text: str, shape: tuple[int, int, int]) -> Mask:
    """Return [X/8, Y/8, Z/8] bool from `VolumeRecord.occupancy` of a study of `shape` voxels."""
    grid = tuple(n // BLOCK_VOX for n in shape)
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(packed, count=int(np.prod(grid))).reshape(grid).astype(np.bool_)


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
    """Drop pieces smaller than a hundredth of the largest, then fill enclosed holes."""
    pieces, count = ndimage.label(mask)
    if count > 1:
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        mask = (sizes >= SPECK_SHARE * sizes.max())[pieces]
    return _fill_holes(mask)


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
