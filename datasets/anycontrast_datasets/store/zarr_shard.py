"""One shard of a Zarr array: inner chunks behind each other, then the index that names them.

Inner chunks are blosc frames with a crc32c behind each; the index at the end has offset and size of
every chunk in C order of the chunk grid, and a crc32c of its own. Written in that same order, so
neighbours along k are neighbours on disk. Readers of ours take sizes and an xxh3 per chunk from the
store's table instead of the index: a byte that changed, and a chunk of another array, are found.
"""

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from anycontrast_datasets.store.byte_source import ByteSource
from anycontrast_datasets.store.codec import Codes, decode_into, encode
from anycontrast_datasets.store.partial import Vox3
from anycontrast_datasets.store.zarr_metadata import ArrayLayout

CRC_BYTES = 4
ENTRY_BYTES = 16
"""Of the index, per chunk: offset and size as uint64."""


@dataclass(frozen=True)
class ChunkTable:
    """Size and checksum of every inner chunk, in C order of the chunk grid."""

    num_bytes: tuple[int, ...]
    """Frame and crc32c."""
    xxh3_64: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First byte of every chunk, then the first byte of the index."""
        return (0, *itertools.accumulate(self.num_bytes))

    @property
    def shard_bytes(self) -> int:
        """Size of the whole shard."""
        return sum(self.num_bytes) + ENTRY_BYTES * len(self.num_bytes) + CRC_BYTES


@dataclass(frozen=True)
class ShardFile:
    """The one shard of an array, where it lies and what must be in it."""

    source: ByteSource
    name: str
    """File of the source."""
    layout: ArrayLayout
    table: ChunkTable

    def read(self, start: int, stop: int, *, again: bool = False) -> memoryview:
        """Return a byte range; a cache keeps the shard as one piece."""
        unit = (0, self.table.offsets[-1])
        return self.source.read(self.name, start, stop, unit=unit, again=again)


def encode_shard(array: Codes, layout: ArrayLayout) -> tuple[bytes, ChunkTable]:
    """Write an array as one shard.

    Args:
        array: [X, Y, Z] of the layout's shape and type.
        layout: Chunks and compressor.

    Returns:
        The bytes of the shard, and the table of its chunks.
    """
    import google_crc32c

    assert array.shape == layout.shape and array.dtype.name == layout.dtype, layout
    parts: list[bytes] = []
    sizes: list[int] = []
    hashes: list[int] = []
    for box in _boxes(layout):
        part = array[tuple(slice(a, b) for a, b in box)]
        chunk = np.full(layout.chunk, layout.fill, dtype=array.dtype)
        chunk[tuple(slice(n) for n in part.shape)] = part
        frame = encode(chunk, name=layout.codec, level=layout.level)
        content = frame + struct.pack("<I", google_crc32c.value(frame))
        parts.append(content)
        sizes.append(len(content))
        hashes.append(xxhash.xxh3_64_intdigest(content))
    table = ChunkTable(tuple(sizes), tuple(hashes))
    entries = b"".join(
        struct.pack("<QQ", offset, size) for offset, size in zip(table.offsets, sizes, strict=False)
    )
    return b"".join([*parts, entries, struct.pack("<I", google_crc32c.value(entries))]), table


def decode_box(
    shard: ShardFile,
    box: tuple[Vox3, Vox3],
    out: Codes,
    *,
    numbers: Sequence[int] | None = None,
) -> None:
    """Read the part of an array inside a box; only chunks that it touches are read.

    Args:
        shard: Where the array lies.
        box: First and end voxel, within the array.
        out: Array of the box's shape.
        numbers: Ascending numbers of the only chunks to read, in C order of the chunk grid; the
            other places of `out` stay as they are. None reads every chunk that the box touches.

    Raises:
        ValueError: If a chunk is not the one that was written; says which.
        ShardError: If the bytes cannot be had.
    """
    layout, (first, end) = shard.layout, box
    touched = touched_chunks(layout, box) if numbers is None else numbers
    for number, content in _contents(shard, touched):
        start, stop = _box(layout, number)
        low = [max(a, b) for a, b in zip(first, start, strict=True)]
        high = [min(a, b) for a, b in zip(end, stop, strict=True)]
        part = out[tuple(slice(a - f, b - f) for a, b, f in zip(low, high, first, strict=True))]
        if part.shape == layout.chunk and part.flags.c_contiguous:
            _decode_chunk(content, number, part)
            continue
        chunk: Codes = np.empty(layout.chunk, dtype=layout.dtype)
        _decode_chunk(content, number, chunk)
        part[...] = chunk[
            tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        ]


def touched_chunks(layout: ArrayLayout, box: tuple[Vox3, Vox3]) -> list[int]:
    """Return the numbers, ascending, of the chunks that a box touches."""
    spans = [range(a // c, -(-b // c)) for a, b, c in zip(*box, layout.chunk, strict=True)]
    _, rows, columns = layout.grid
    return [(i * rows + j) * columns + k for i, j, k in itertools.product(*spans)]


def _contents(shard: ShardFile, numbers: Sequence[int]) -> Iterator[tuple[int, memoryview]]:
    """Read chunks by as few ranges as there are runs of neighbours, and check each."""
    offsets = shard.table.offsets
    for run in _runs(numbers):
        base = offsets[run[0]]
        block = shard.read(base, offsets[run[-1] + 1])
        for number in run:
            start, stop = offsets[number], offsets[number + 1]
            wanted = shard.table.xxh3_64[number]
            content = block[start - base : stop - base]
            found = xxhash.xxh3_64_intdigest(content)
            for _ in range(shard.source.tries - 1):
                if found == wanted:
                    break
                content = shard.read(start, stop, again=True)
                found = xxhash.xxh3_64_intdigest(content)
            if found != wanted:
                raise ValueError(
                    f"chunk {number}: xxh3 must be {wanted:016x}, found {found:016x}; the shard "
                    "was damaged after it was written"
                )
            yield number, content


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Split ascending numbers where they jump."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _decode_chunk(content: memoryview, number: int, out: Codes) -> None:
    try:
        decode_into(content[:-CRC_BYTES], out)
    except ValueError as error:
        raise ValueError(f"chunk {number}: {error}") from error


def _box(layout: ArrayLayout, number: int) -> tuple[Vox3, Vox3]:
    """Return first and end voxel of a chunk, cut to the array."""
    _, rows, columns = layout.grid
    at = (number // (rows * columns), number // columns % rows, number % columns)
    first = [a * c for a, c in zip(at, layout.chunk, strict=True)]
    end = [min(f + c, n) for f, c, n in zip(first, layout.chunk, layout.shape, strict=True)]
    return (first[0], first[1], first[2]), (end[0], end[1], end[2])


def _boxes(layout: ArrayLayout) -> Iterator[list[tuple[int, int]]]:
    for number in range(layout.num_chunks):
        start, stop = _box(layout, number)
        yield list(zip(start, stop, strict=True))
