"""Memory that is used again: slots a caller hands in, and one scratch volume per thread.

Fresh memory of 39 MB a study costs as much in page faults as the copy of the study itself, and a
volume decoded into the memory of the one before it is still in the processor's cache when its
patches are gathered.
"""

import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

_scratch = threading.local()


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


def scratch_bytes(size: int) -> npt.NDArray[np.uint8]:
    """Return other memory of this thread, for compressed bytes; handed out again likewise."""
    return _scratch_bytes("bytes", size)


def _scratch_bytes(name: str, size: int) -> npt.NDArray[np.uint8]:
    buffer: npt.NDArray[np.uint8] | None = getattr(_scratch, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, dtype=np.uint8)
        setattr(_scratch, name, buffer)
    return buffer[:size]
