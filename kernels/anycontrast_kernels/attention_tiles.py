"""Tile sizes, warps and pipeline stages of the Triton attention, one plain table per chip.

A kernel owns a tile of `rows` tokens and walks over the other side in tiles of `columns`. The
caller lists the tiles (`sequences.tiles_64`, `tiles_128`), so it asks `tile_rows` which list each
kernel takes. Nothing is tuned at run time: the same shapes always run the same code.

The entries start from what FlashAttention-2 and FlexAttention ship for these chips, and were kept
where the compiled code spills no register, fits the shared memory and leaves room for two programs
on a multiprocessor (`compile_check` shows registers and shared memory). They were chosen from the
compiled code and not timed on a GPU.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

HEAD_DIMS = (32, 64, 96, 128)
"""Head dims the kernels hold; 96 is computed as 128 with zeros."""

CAPABILITIES = (80, 90, 100)
"""Chips with a table of their own; another chip uses the nearest one below it."""


COMPILER_OPTIONS = {"enable_fp_fusion": True}
"""A multiply and an add become one instruction; Triton 3.9 leaves that off."""


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
    (80, 64): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 3)),
    (80, 128): Tilings(Tiling(128, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(128, 32, 8, 2)),
    (90, 64): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3)),
    (90, 128): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 3), Tiling(128, 64, 8, 2)),
    (100, 64): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 3)),
    (100, 128): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
}
_SINGLE = {
    32: Tilings(Tiling(64, 16, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2)),
    64: Tilings(Tiling(64, 32, 8, 2), Tiling(64, 16, 8, 2), Tiling(64, 32, 8, 2)),
    128: Tilings(Tiling(64, 16, 16, 2), Tiling(64, 16, 8, 2), Tiling(64, 16, 16, 2)),
}


def tilings(head_dim: int, dtype: torch.dtype, capability: int) -> Tilings:
    """Return how the three kernels are cut.

    Args:
        head_dim: one of `HEAD_DIMS`.
        dtype: float16, bfloat16 or float32.
        capability: of the chip, 90 for 9.0; chips between two tables use the lower one.
    """
    if dtype == torch.float32:
        return _SINGLE[padded(head_dim)]
    width = 64 if head_dim <= 64 else 128
    nearest = max((c for c in CAPABILITIES if c <= capability), default=CAPABILITIES[0])
    return _HALF[nearest, width]


def padded(head_dim: int) -> int:
    """Columns a tile has in registers: the next power of two."""
    return 1 << (head_dim - 1).bit_length()


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


def shipped() -> Iterator[tuple[int, torch.dtype, int, Tilings]]:
    """Yield (head dim, dtype, capability, tilings) of every code that a chip may be given."""
    for head_dim, capability in product(HEAD_DIMS, CAPABILITIES):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield head_dim, dtype, capability, tilings(head_dim, dtype, capability)


def compile_cases(
    kernel: Any, rows_name: str, columns_name: str, index: int
) -> list[tuple[Any, dict[str, str], dict[str, object], list[str], dict[str, object]]]:
    """List what `compile_check` compiles of one attention kernel.

    Args:
        kernel: the decorated function; the types follow from the names of its arguments.
        rows_name: compile-time argument that takes the rows of a tile.
        columns_name: the one that takes its columns.
        index: of the kernel's entry in `Tilings`.
    """
    names: list[str] = [name for name in kernel.arg_names if not name.isupper()]
    pointers = {"lse": "*fp32", "lse2": "*fp32", "delta": "*fp32"}
    pointers |= {"cu_q": "*i32", "cu_k": "*i32", "tiles": "*i32"}
    codes = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    cases = []
    for head_dim, dtype, capability, entry in shipped():
        types: dict[str, str] = {}
        for name in names:
            is_number = name.startswith(("num_", "scale")) or name.endswith("_stride")
            number = "fp32" if name.startswith("scale") else "i32"
            types[name] = number if is_number else pointers.get(name, codes[dtype])
        multiples = [n for n in names if types[n].startswith("*") or n.endswith("_stride")]
        tiling = entry[index]
        constexprs: dict[str, object] = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)}
        constexprs |= {rows_name: tiling.rows, columns_name: tiling.columns, "UPCAST": False}
        options: dict[str, object] = {
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
            **COMPILER_OPTIONS,
        }
        options["capabilities"] = (capability,)
        cases.append((kernel, types, constexprs, multiples, options))
    return cases
