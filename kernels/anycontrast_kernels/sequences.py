"""Where the sequences of a pack begin and end: offsets, tile lists and the longest length.

Everything an attention kernel needs to know about a pack, made once on the host and moved to the
device. Shapes depend on the token budget and the capacity only, so compiled code is reused from
pack to pack; lengths never enter traced code.

Letters: C sequences (the capacity), K tiles.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

LENGTH_STEP = 512
LENGTH_STEPS_UP_TO = 4096

_extent_on_device = WeakIdKeyDictionary()
"""Offsets on an accelerator -> what the host needs of them, so that it does not wait for it."""


class Sequences(NamedTuple):
    """Sequences one after the other in a row of tokens; make them with `sequences`."""

    cu_seqlens: Tensor
    """[C + 1] int32, sequence s owns tokens cu_seqlens[s]:cu_seqlens[s + 1]. Starts at 0; beyond
    the last sequence the last offset is repeated. Tokens after the last offset are padding."""
    tiles_64: Tensor
    """[K, 2] int32, (sequence, first row within it) of every tile of 64 rows, long sequences
    first; rows of -1 fill up to K = tokens // 64 + C."""
    tiles_128: Tensor
    """[K, 2] int32, the same for tiles of 128 rows."""
    max_len: int
    """No sequence is longer; rounded up to one of few values (`rounded_length`)."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Sequences":
        """Return them with every tensor on `device`."""
        cu_seqlens, tiles_64, tiles_128 = (
            x.to(device, non_blocking=non_blocking)
            for x in (self.cu_seqlens, self.tiles_64, self.tiles_128)
        )
        if cu_seqlens.device.type != "cpu":
            _extent_on_device[cu_seqlens] = _extent("Sequences.to", self.cu_seqlens.tolist())
        return Sequences(cu_seqlens, tiles_64, tiles_128, self.max_len)


def sequences(
    lengths: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    capacity: int | None = None,
    num_tokens: int | None = None,
    max_len: int | None = None,
) -> Sequences:
    """Describe sequences that lie one after the other.

    Args:
        lengths: tokens per sequence, 0 is allowed.
        device: where the attention runs.
        capacity: C, room for sequences; default their number. Fix it to keep shapes static.
        num_tokens: rows of the packed tensors, the token budget; default the sum of `lengths`.
        max_len: longest length allowed; default the longest, rounded up by `rounded_length`.

    Raises:
        ValueError: a length is negative or beyond `max_len`, or they do not fit into `capacity`
            or `num_tokens`.
    """
    capacity = len(lengths) if capacity is None else capacity
    total = sum(lengths)
    num_tokens = total if num_tokens is None else num_tokens
    if len(lengths) > capacity:
        raise ValueError(
            f"sequences: capacity must be at least the {len(lengths)} sequences of lengths, "
            f"got {capacity}"
        )
    offsets = [0, *accumulate(lengths), *[total] * (capacity - len(lengths))]
    max_len = rounded_length(max(lengths, default=0)) if max_len is None else max_len
    _check_fits("sequences: lengths", _extent("sequences: lengths", offsets), num_tokens, max_len)
    lengths_C = np.array([*lengths, *[0] * (capacity - len(lengths))], dtype=np.int64)
    made = Sequences(
        torch.tensor(offsets, dtype=torch.int32),
        torch.from_numpy(_tiles(lengths_C, 64, num_tokens)),
        torch.from_numpy(_tiles(lengths_C, 128, num_tokens)),
        max_len,
    )
    if torch.device(device).type != "cuda":
        return made.to(device)
    # From pinned memory: an ordinary copy would wait for all the work the device has queued.
    pinned = made._replace(
        cu_seqlens=made.cu_seqlens.pin_memory(),
        tiles_64=made.tiles_64.pin_memory(),
        tiles_128=made.tiles_128.pin_memory(),
    )
    return pinned.to(device, non_blocking=True)


def sequences_from_offsets(
    offsets: Tensor | Sequence[int],
    device: torch.device | str = "cpu",
    *,
    num_tokens: int | None = None,
    max_len: int | None = None,
) -> Sequences:
    """Describe sequences by their offsets, which are read on the host.

    Args:
        offsets: [C + 1] integers, from 0, not decreasing.
        device: where the attention runs.
        num_tokens: rows of the packed tensors; default the last offset.
        max_len: longest length allowed; default the longest, rounded up by `rounded_length`.

    Raises:
        TypeError: `offsets` is a tensor that is not of integers.
        ValueError: it does not start at 0, decreases, or breaks `num_tokens` or `max_len`.
    """
    if isinstance(offsets, Tensor):
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"sequences: offsets must be int32 or int64, got {offsets.dtype}")
        if offsets.ndim != 1:
            raise ValueError(f"sequences: offsets must be [C + 1], got {tuple(offsets.shape)}")
        offsets = offsets.tolist()
    found = [int(offset) for offset in offsets]
    _extent("sequences: offsets", found)
    lengths = [stop - start for start, stop in pairwise(found)]
    return sequences(lengths, device, num_tokens=num_tokens, max_len=max_len)


def check_extent(where: str, sequences: Sequences, num_tokens: int) -> None:
    """Refuse sequences that do not fit the tensors they are used with.

    On an accelerator the offsets of a tensor are read at most once, and never if `sequences` or
    `Sequences.to` made it. While a CUDA graph is captured nothing can be read, nor checked.

    Raises:
        ValueError: with `where`, the rule and what was found.
    """
    extent = _known_extent(where, sequences.cu_seqlens)
    if extent is not None:
        _check_fits(where, extent, num_tokens, sequences.max_len)


def clear_padding(x_THD: Tensor, sequences: Sequences) -> Tensor:
    """Set the tokens after the last offset to 0, in place.

    Foreign kernels leave there what the memory held, which may be NaN.

    Args:
        x_THD: [T, H, D].
        sequences: the sequences of `x_THD`.

    Returns:
        `x_THD`.
    """
    extent = _known_extent("clear_padding", sequences.cu_seqlens)
    if extent is not None:
        x_THD[extent.last :].zero_()
        return x_THD
    row_T11 = torch.arange(x_THD.shape[0], device=x_THD.device).view(-1, 1, 1)
    return x_THD.masked_fill_(row_T11 >= sequences.cu_seqlens[-1], 0)


def rounded_length(length: int) -> int:
    """Round a longest length up to one of few values, so that compiled code is reused.

    Steps of 512 up to 4096, then powers of two; the kernels skip the blocks beyond the true end.
    """
    if length <= LENGTH_STEPS_UP_TO:
        return max(LENGTH_STEP, -(-length // LENGTH_STEP) * LENGTH_STEP)
    return 1 << (length - 1).bit_length()


def _tiles(
    lengths_C: npt.NDArray[np.int64], tile_rows: int, num_tokens: int
) -> npt.NDArray[np.int32]:
    """List the tiles of every sequence; a long one first, because its tiles take longest."""
    order_C = np.argsort(-lengths_C, kind="stable")
    count_C = -(-lengths_C[order_C] // tile_rows)
    before_C = np.cumsum(count_C) - count_C
    num_tiles = int(count_C.sum())
    tiles_K2 = np.full((num_tokens // tile_rows + len(lengths_C), 2), -1, dtype=np.int32)
    tiles_K2[:num_tiles, 0] = np.repeat(order_C, count_C)
    tiles_K2[:num_tiles, 1] = (np.arange(num_tiles) - np.repeat(before_C, count_C)) * tile_rows
    return tiles_K2


class _Extent(NamedTuple):
    longest: int
    last: int


def _known_extent(where: str, cu_seqlens: Tensor) -> _Extent | None:
    """Extent of offsets wherever they lie; None if they cannot be read now."""
    if cu_seqlens.device.type == "cpu":
        return _extent(where, cu_seqlens.tolist())
    if cu_seqlens not in _extent_on_device:
        if torch.cuda.is_current_stream_capturing():
            return None
        _extent_on_device[cu_seqlens] = _extent(where, cu_seqlens.tolist())
    found: _Extent = _extent_on_device[cu_seqlens]
    return found


def _extent(where: str, offsets: Sequence[int]) -> _Extent:
    """Longest length and last offset of offsets that are in order."""
    if not offsets or offsets[0] != 0:
        shown = str(list(offsets[:4]))
        raise ValueError(f"{where}: offsets must start at 0, they begin with {shown}")
    longest = 0
    for number, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise ValueError(
                f"{where}: offsets must not decrease (no length below 0), sequence {number} "
                f"runs from {start} to {stop}"
            )
        longest = max(longest, stop - start)
    return _Extent(longest, offsets[-1])


def _check_fits(where: str, extent: _Extent, num_tokens: int, max_len: int) -> None:
    if extent.longest > max_len:
        raise ValueError(
            f"{where}: no sequence may be longer than max_len {max_len}, the longest has "
            f"{extent.longest} tokens"
        )
    if extent.last > num_tokens:
        raise ValueError(
            f"{where}: sequences must end within the {num_tokens} tokens there are, the last "
            f"ends at {extent.last}"
        )
