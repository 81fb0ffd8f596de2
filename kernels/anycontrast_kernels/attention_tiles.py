"""Tile sizes, warps and pipeline stages of the Triton attention, one plain table per chip.

A kernel owns a tile of `rows` tokens and walks over the other side in tiles of `columns`. The
caller lists the tiles (`sequences.tiles_64`, `tiles_128`), so it asks `tile_rows` which list each
kernel takes. Nothing is tuned at run time: the same shapes always run the same code.

The entries start from what FlashAttention-2 and FlexAttention ship for these chips, and were kept
where the compiled code spills no register, fits the shared memory and leaves room for two programs
on a multiprocessor (`compile_check` shows registers and shared memory). They were chosen from the
compiled code and not timed on a GPU.
"""

from typing import NamedTuple

import torch

HEAD_DIMS = (32, 64, 96, 128)
"""Head dims the kernels hold; 96 is computed as 128 with zeros."""

CAPABILITIES = (80, 90, 100)
"""Chips with a table of their own; another chip uses the nearest one below it."""


class Tiling(NamedTuple):
    """How one kernel is cut."""

    rows: int
    """Tokens a program owns: 64 or 128."""
    columns: int
    """Tokens of the other side in one iteration."""
    warps: int
    stages: int
    """Iterations whose loads are in flight."""


class Tilings(NamedTuple):
    """The three kernels of one (head dim, dtype, chip)."""

    forward: Tiling
    dkdv: Tiling
    dq: Tiling


class TileRows(NamedTuple):
    """Rows of the tile lists the launchers take."""

    forward_q: int
    backward_q: int
    backward_k: int


_HALF = {
    (80, 64): Tilings(Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    (80, 128): Tilings(Tiling(128, 64, 8, 3), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    (90, 64): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3)),
    (90, 128): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2)),
    (100, 64): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2)),
    (100, 128): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2)),
}
_SINGLE = {
    64: Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2)),
    128: Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2)),
}


def tilings(head_dim: int, dtype: torch.dtype, capability: int) -> Tilings:
    """Return how the three kernels are cut.

    Args:
        head_dim: one of `HEAD_DIMS`.
        dtype: float16, bfloat16 or float32.
        capability: of the chip, 90 for 9.0; chips between two tables use the lower one.
    """
    width = 64 if head_dim <= 64 else 128
    if dtype == torch.float32:
        return _SINGLE[width]
    nearest = max((c for c in CAPABILITIES if c <= capability), default=CAPABILITIES[0])
    return _HALF[nearest, width]


def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number; the interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_rows(head_dim: int, dtype: torch.dtype, device: torch.device) -> TileRows:
    """Return which tile list each launcher takes: `tiles_64` or `tiles_128` by its rows."""
    forward, dkdv, dq = tilings(head_dim, dtype, capability_of(device))
    return TileRows(forward_q=forward.rows, backward_q=dq.rows, backward_k=dkdv.rows)
