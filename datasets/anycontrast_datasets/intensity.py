"""Robust statistics of one volume, and its codes, as fine as its noise deserves.

In: float32 voxels and the mask of what is tissue. Out: int16 codes with a linear map back to the
source unit, and the few numbers a reader needs to normalise without looking at the voxels again.
Code 0 is background and nothing else; foreground takes codes 1..4095 at most. One step is a
sixteenth of the noise: the rounding error, 1.8 % of the noise (1 / 16 / sqrt(12)), adds 0.016 % to
it, and the low bits, which are noise that no compressor can shrink, are not stored. That is how
archives of astronomical images do it, with steps up to a quarter of the noise. A volume without
measurable noise has steps of a 4094th of its range (12 bits), and one on the integers of its source
keeps these exactly where they are the coarser. Gives up: values above 110 % of the range up to
the 99.95th percentile saturate at the last code, except for maps whose values are measurements
(`ADC` and the like), which keep their whole range and 12 bits.

Source: Pence, Seaman & White 2009, Lossless astronomical image compression and the effects of
noise, PASP 121:414; White & Greenfield 1999, ADASS VIII, 125.
"""

import base64
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.study import ShardError, StudyError

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

MAX_CODE = 4095
MIN_CODES = 256
"""However noisy a volume is, its range is divided into as many steps."""
CODES_PER_NOISE = 16.0
NOISE_SAMPLE = 2**17
"""Voxels whose noise is looked at, in pairs of neighbouring planes spread over the volume."""
MIN_NOISE_VOX = 256
MAX_OFF_STEP = 0.01
"""How far a value may lie off a whole number of source steps, in steps."""
BLOCK_VOX = 8
MIN_FOREGROUND_VOX = 8
QUANTITATIVE = frozenset({"ADC", "FA", "CBF"})
"""Contrasts whose values are measurements: nothing is clipped."""
HEADROOM = 1.1
TAIL_SAMPLE = 2**15
CHUNK = 2**15
"""Voxels worked on at a time, so that they stay in the processor's cache."""


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


def encode(
    array: Floats, mask: Mask, contrast: str, codes_per_noise: float | None = CODES_PER_NOISE
) -> CodedVolume:
    """Quantise the foreground of a volume and take its statistics.

    One step is the coarser of a 4094th of the range and `noise_sigma / codes_per_noise`, and at
    most a 255th of the range. Where all values are whole multiples of a step of their own (integers
    on the grid they were stored on, scaled or not) and that one is coarser still, it is taken: the
    codes are then the integers of the source, lossless up to the value that saturates, and smaller.

    Args:
        array: [X, Y, Z] float32.
        mask: [X, Y, Z] bool, the foreground.
        contrast: Vocabulary name; decides whether outliers may saturate, and whether the values are
            measurements, whose steps are 4094ths of the range always.
        codes_per_noise: Steps per standard deviation of the noise; None: 4094ths of the range.

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
    low, high = float(values.min()), float(values.max())
    p0_5, p99_5, p99_95 = tail_percentiles(values, (0.5, 99.5, 99.95))
    mean, std = _clipped_statistics(values, p0_5, p99_5)
    if not std > 1e-7 * max(abs(p0_5), abs(p99_5)):
        raise StudyError(
            f"{contrast}: the foreground must vary, found {values.size} voxels between {p0_5:g} "
            f"and {p99_5:g} with standard deviation {std:g}; leave the volume out",
            code="empty_foreground",
        )
    is_map = contrast in QUANTITATIVE
    top = high if is_map else min(high, low + HEADROOM * (p99_95 - low))
    scale = (top - low) / (MAX_CODE - 1)
    if codes_per_noise is not None and not is_map:
        noise_step = min(noise_sigma(array, mask) / codes_per_noise, (top - low) / (MIN_CODES - 1))
        scale = max(scale, noise_step)
        scale = _source_step(values, low, scale) or scale
    offset = low - scale
    codes = np.zeros(array.shape, dtype=np.int16)
    codes[mask] = _quantised(values, low, top, scale)
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


def noise_sigma(array: Floats, mask: Mask) -> float:
    """Return the standard deviation of what differs between neighbours and is no structure.

    Differences are taken along all three axes at once, over cubes of 2 x 2 x 2 voxels that lie in
    the foreground: edges and slopes cancel, independent noise does not, and the median is deaf to
    the few cubes where they do not cancel. Noise that neighbours share, as after resampling, is
    underestimated, so that codes come out finer than they need be, never coarser.

    Args:
        array: [X, Y, Z] float32.
        mask: [X, Y, Z] bool, the foreground.

    Returns:
        In the unit of the array; 0 where fewer than 256 cubes lie in the foreground.

    Source: Coupe et al. 2010, Robust Rician noise estimation for MR images, Medical Image Analysis
    14:483: the median absolute deviation of the finest diagonal wavelet coefficients.
    """
    num_planes = array.shape[0]
    wanted = max(1, NOISE_SAMPLE // max(1, array[0].size))
    first = np.arange(0, num_planes - 1, max(1, num_planes // wanted))
    cube = array[first + 1] - array[first]
    inside = mask[first + 1] & mask[first]
    cube = cube[:, 1:] - cube[:, :-1]
    inside = inside[:, 1:] & inside[:, :-1]
    found = (cube[..., 1:] - cube[..., :-1])[inside[..., 1:] & inside[..., :-1]]
    if found.size < MIN_NOISE_VOX:
        return 0.0
    return float(np.median(np.abs(found)) / (0.67449 * np.sqrt(8)))


def tail_percentiles(values: Floats, percents: tuple[float, ...]) -> list[float]:
    """Return exact percentiles near 0 or 100, several times as fast as by a partition of all.

    A sample says where a tail begins; only the values in it are ordered.

    Args:
        values: [N] float32, N > 0.
        percents: Each 0..100; those far from both ends fall back to ordering everything.
    """
    sample = np.sort(values[:: max(1, values.size // TAIL_SAMPLE)])
    # The widest tail of a side first: those of percentiles further out lie in it.
    tails: dict[bool, Floats] = {}
    found = {
        percent: _percentile(values, sample, percent, tails)
        for percent in sorted(percents, key=lambda percent: abs(percent - 50))
    }
    return [found[percent] for percent in percents]


def _clipped_statistics(values: Floats, low: float, high: float) -> tuple[float, float]:
    """Return mean and standard deviation of the values clipped to low..high, in one pass."""
    pivot = float(np.float32(np.clip(values[:CHUNK], low, high).mean(dtype=np.float64)))
    total = squares = 0.0
    for first in range(0, values.size, CHUNK):
        chunk = np.clip(values[first : first + CHUNK], low, high)
        chunk -= np.float32(pivot)
        total += float(chunk.sum(dtype=np.float64))
        squares += float(np.square(chunk, out=chunk).sum(dtype=np.float64))
    shift = total / values.size
    return pivot + shift, float(np.sqrt(max(0.0, squares / values.size - shift**2)))


def _source_step(values: Floats, low: float, least: float) -> float | None:
    """Return the step of which all values are whole multiples above `low`, if it is > `least`."""
    levels = np.unique(values[:: max(1, values.size // TAIL_SAMPLE)])
    gap = float(np.diff(levels).min(initial=np.inf))
    if not least < gap < np.inf:
        return None
    span = float(levels[-1]) - low
    step = span / round(span / gap)
    for first in range(0, values.size, CHUNK):
        chunk = (values[first : first + CHUNK] - np.float32(low)) * np.float32(1 / step)
        if np.abs(chunk - np.rint(chunk)).max() > MAX_OFF_STEP:
            return None
    return step


def _quantised(values: Floats, low: float, top: float, scale: float) -> npt.NDArray[np.int16]:
    """Return codes from 1 for `low`; the cast cuts off, so the half that is added makes it round.

    Values above `top` get the code of `top`.
    """
    last = np.float32(int((top - low) / scale + 1.5))
    codes = np.empty(values.shape, dtype=np.int16)
    for first in range(0, values.size, CHUNK):
        chunk = values[first : first + CHUNK] - np.float32(low)
        chunk *= np.float32(1 / scale)
        chunk += np.float32(1.5)
        codes[first : first + CHUNK] = np.minimum(chunk, last, out=chunk)
    return codes


def _percentile(values: Floats, sample: Floats, percent: float, tails: dict[bool, Floats]) -> float:
    """Interpolate linearly between the two nearest ranks, as `np.percentile` does.

    `tails` keeps the low and the high values, the latter negated, for the next percentile.
    """
    is_low = percent < 50
    position = (values.size - 1) * (percent if is_low else 100 - percent) / 100
    rank = int(position)
    margin = min(sample.size - 1, int(2 * position / values.size * sample.size) + 64)
    if is_low not in tails:
        tails[is_low] = (
            values[values <= sample[margin]]
            if is_low
            else -values[values >= sample[sample.size - 1 - margin]]
        )
    ranks = [rank, min(rank + 1, values.size - 1)]
    if tails[is_low].size <= ranks[1]:
        tails[is_low] = values if is_low else -values
    tail = tails[is_low]
    near, far = (float(v) for v in np.partition(tail, ranks)[ranks])
    found = near + (far - near) * (position - rank)
    return found if is_low else -found


def pack_occupancy(codes: npt.NDArray[np.int16]) -> str:
    """Return which blocks of 8^3 voxels hold a nonzero code: packed bits, C order, base64.

    Args:
        codes: [X, Y, Z] int16, every side a multiple of 8.
    """
    x, y, z = codes.shape
    assert not any(n % BLOCK_VOX for n in codes.shape), codes.shape
    # A run of 8 codes is two words of 64 bits; a block is empty if all its words are.
    words = np.ascontiguousarray(codes).view(np.uint64)
    layers = words.reshape(x // BLOCK_VOX, BLOCK_VOX, y // BLOCK_VOX, BLOCK_VOX, z // 4)
    columns = np.bitwise_or.reduce(np.bitwise_or.reduce(layers, axis=1), axis=2)
    blocks = (columns[..., 0::2] | columns[..., 1::2]) != 0
    return base64.b64encode(np.packbits(blocks, axis=None).tobytes()).decode("ascii")


def unpack_occupancy(text: str, shape: tuple[int, int, int]) -> Mask:
    """Return [X/8, Y/8, Z/8] bool from `VolumeRecord.occupancy` of a study of `shape` voxels.

    Raises:
        ShardError: If the text is no base64, or has not one bit per block.
    """
    grid = tuple(n // BLOCK_VOX for n in shape)
    count = int(np.prod(grid))
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except ValueError as error:
        raise ShardError(f"occupancy of a volume: must be base64, found {error}") from error
    if packed.size != -(-count // 8):
        raise ShardError(
            f"occupancy of a volume of {shape} voxels: must have {-(-count // 8)} bytes for "
            f"{count} blocks, found {packed.size}; run `anycontrast shard` again"
        )
    return np.unpackbits(packed, count=count).reshape(grid).astype(np.bool_)
