"""Decode some planes of a volume without the others.

A blosc frame is a header, the offsets of its blocks, and the blocks, each compressed by itself (1
MiB of voxels as we write them). Some of the blocks behind a header and offsets of their own are a
frame again, so that a crop costs the blocks it lies in. Frames that are laid out otherwise are
decoded whole.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.store.codec import HEADER_BYTES, decode_into
from anycontrast_datasets.store.slots import scratch_array, scratch_bytes

Bytes = npt.NDArray[np.uint8]
_HEADER = struct.Struct("<BBBBIII")
_IS_STORED = 2
"""Flag of a frame that is not compressed and has no offsets."""


@dataclass(frozen=True)
class _Frame:
    """A frame taken apart."""

    payload: Bytes
    head: tuple[int, int, int, int]
    """Versions, flags and type size."""
    num_bytes: int
    block_bytes: int
    edges: list[int]
    """Where the blocks begin in the payload, then its end."""

    @property
    def num_blocks(self) -> int:
        return len(self.edges) - 1

    def stop_of(self, first: int, num_bytes: int) -> int:
        """Return past which block to decode to get `num_bytes` from block `first` on.

        A last block that is not full is laid out differently, and so never decoded by itself.
        """
        stop = min(first + -(-num_bytes // self.block_bytes), self.num_blocks)
        is_odd = self.num_bytes % self.block_bytes and stop == self.num_blocks - 1
        return stop + 1 if is_odd else stop

    def decode(self, first: int, stop: int, out: Bytes) -> int:
        """Decode blocks `first` .. `stop` into the head of `out`; return their bytes."""
        start, end = self.edges[first], self.edges[stop]
        num_bytes = min(stop * self.block_bytes, self.num_bytes) - first * self.block_bytes
        body = HEADER_BYTES + 4 * (stop - first)
        if self.payload.flags.writeable:
            # In front of the blocks lie only the header or blocks that have been decoded.
            frame = self.payload[start - body : end]
        else:
            frame = scratch_bytes(body + end - start)
            frame[body:] = self.payload[start:end]
        _HEADER.pack_into(frame.data, 0, *self.head, num_bytes, self.block_bytes, len(frame))
        offsets = [edge - start + body for edge in self.edges[first:stop]]
        struct.pack_into(f"<{len(offsets)}I", frame.data, HEADER_BYTES, *offsets)
        decode_into(frame.data, out[:num_bytes])
        return num_bytes


def decode_planes(
    payload: memoryview, shape: tuple[int, int, int], first: int, stop: int
) -> npt.NDArray[np.int16]:
    """Return planes `first` .. `stop` along i, decoding little more than these.

    Args:
        payload: One whole frame of int16, whose checksum has been compared. What has been decoded
            of it is overwritten if it may be written to.
        shape: Voxels of the volume.
        first: First plane.
        stop: Past the last plane.

    Returns:
        [stop - first, Y, Z] in memory of this thread that the next call uses again.

    Raises:
        ValueError: If the frame is not of this volume, or blosc refuses it.
    """
    frame = _take_apart(payload, shape)
    if frame is None:
        codes_XYZ = scratch_array(shape)
        decode_into(payload, codes_XYZ)
        return codes_XYZ[first:stop]
    plane_bytes = 2 * shape[1] * shape[2]
    # The last block may not be full, and then needs the one before it.
    block = min(first * plane_bytes // frame.block_bytes, frame.num_blocks - 2)
    skipped = first * plane_bytes - block * frame.block_bytes
    wanted = (stop - first) * plane_bytes
    end = frame.stop_of(block, skipped + wanted)
    buffer = scratch_array(((end - block) * frame.block_bytes // 2,)).view(np.uint8)
    frame.decode(block, end, buffer)
    part = buffer[skipped : skipped + wanted]
    return part.view(np.int16).reshape(stop - first, shape[1], shape[2])


def _take_apart(payload: memoryview, shape: tuple[int, int, int]) -> _Frame | None:
    """Return the parts of a frame, or None if it can only be decoded whole."""
    if len(payload) < HEADER_BYTES:
        return None
    *head, num_bytes, block_bytes, num_compressed = _HEADER.unpack_from(payload)
    if num_bytes != 2 * shape[0] * shape[1] * shape[2] or num_compressed != len(payload):
        return None
    num_blocks = -(-num_bytes // block_bytes) if block_bytes else 0
    body = HEADER_BYTES + 4 * num_blocks
    if head[2] & _IS_STORED or num_blocks < 2 or body > len(payload):
        return None
    content = np.frombuffer(payload, dtype=np.uint8)
    offsets_B = np.frombuffer(payload, dtype="<u4", count=num_blocks, offset=HEADER_BYTES)
    edges_B = np.append(offsets_B, num_compressed).astype(np.int64)
    if edges_B[0] != body or (np.diff(edges_B) <= 0).any():
        return None
    version, codec_version, flags, item_bytes = head
    kind = (version, codec_version, flags, item_bytes)
    return _Frame(content, kind, num_bytes, block_bytes, edges_B.tolist())
