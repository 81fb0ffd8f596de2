"""Memory that is used again: slots of a caller, scratch of a thread, and what nobody holds.

Fresh memory must be cleared by the kernel page by page, which costs more than to copy a study into
it: 5 ms for 39 MB.
"""

import math
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_MIN_RECYCLED = 2**20
"""Smaller memory is as cheap from the allocator."""
_MAX_FREE = 8
_scratch = threading.local()
# Appending and popping are atomic, so that memory may come back in the middle of anything.
_free: deque[Bytes] = deque(maxlen=_MAX_FREE)


def slot_array(
    out: Mapping[str, npt.NDArray[np.int16]] | None, contrast: str, shape: Sequence[int]
) -> npt.NDArray[np.int16]:
    """Return [X, Y, Z] int16 to decode into: the head of the caller's slot, or a new array.

    Args:
        out: Contrast -> C-contiguous int16 array of any shape with room enough; None makes new
            arrays.
        contrast: Whose slot.
        shape: Voxels of the volume.

    Raises:
        ValueError: If the slot is missing, of another type, not contiguous or too small.
    """
    if out is None:
        return np.empty(tuple(shape), dtype=np.int16)
    slot = out.get(contrast)
    size = math.prod(shape)
    if slot is None or slot.dtype != np.int16 or not slot.flags.c_contiguous or slot.size < size:
        found = "no slot" if slot is None else f"{slot.dtype} {slot.shape}"
        raise ValueError(
            f"reading {contrast}: `out` must hold a C-contiguous int16 array of at least {size} "
            f"voxels, got {found}"
        )
    return slot.reshape(-1)[:size].reshape(tuple(shape))


def scratch_array(shape: Sequence[int]) -> npt.NDArray[np.int16]:
    """Return int16 memory of this thread; the next call in the thread hands it out again."""
    size = math.prod(shape)
    return _scratch_bytes("codes", 2 * size).view(np.int16).reshape(tuple(shape))


def scratch_bytes(size: int) -> Bytes:
    """Return other memory of this thread, for compressed bytes; handed out again likewise."""
    return _scratch_bytes("bytes", size)


def recycled_bytes(size: int) -> Bytes:
    """Return uint8 memory that is taken back, and handed out again, once nothing refers to it.

    As safe to keep, slice, view or hand to torch as any array: what refers to a part of it keeps
    all of it.
    """
    if size < _MIN_RECYCLED:
        return np.empty(size, dtype=np.uint8)
    buffer = _take_free(size)
    if buffer is None:
        buffer = np.empty(size + size // 8, dtype=np.uint8)
    # Through a memoryview, so that views of the array refer to it and not to the buffer.
    array = np.frombuffer(buffer.data[:size], dtype=np.uint8)
    weakref.finalize(array, _free.append, buffer).atexit = False
    return array


def _take_free(size: int) -> Bytes | None:
    """Return free memory of at least `size` bytes, and not much more than twice that."""
    for _ in range(len(_free)):
        try:
            buffer = _free.popleft()
        except IndexError:
            return None
        if size <= buffer.size <= 2 * size + 2 * _MIN_RECYCLED:
            return buffer
        _free.append(buffer)
    return None


def _scratch_bytes(name: str, size: int) -> Bytes:
    buffer: Bytes | None = getattr(_scratch, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, dtype=np.uint8)
        setattr(_scratch, name, buffer)
    return buffer[:size]
