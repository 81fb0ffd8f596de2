"""Our Triton attention on a GPU: parity with the definition in float32, and the same bits always.

Cases and comparison are those of the interpreter's tests, with longer sequences beside them.
"""

import runpy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

SHARED = runpy.run_path(str(Path(__file__).with_name("test_triton_attention.py")))
Case, CASES = SHARED["Case"], SHARED["CASES"]
NUM_REPEATS = 20

LONG_Q = (513, 1, 0, 1024, 63, 700)
LONG_K = (300, 64, 5, 1025, 0, 129)
GRID = [
    Case(dtype, head_dim, LONG_Q, lengths_k, 3)
    for dtype, head_dim, lengths_k in product(
        (torch.bfloat16, torch.float16, torch.float32), (32, 64, 96, 128), (None, LONG_K)
    )
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", [*CASES, *GRID], ids=lambda case: case.name)
def test_agrees_with_the_definition(case: Any) -> None:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # the definition multiplies in float32
    try:
        SHARED["check_case"](case, "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_run_gives_the_same_bits(dtype: torch.dtype, head_dim: int) -> None:
    """A race, or a sum in changing order, would show in one run of many."""
    x = SHARED["inputs"](Case(dtype, head_dim, LONG_Q * 4, LONG_K * 4, 4), "cuda")
    first = [y.clone() for y in SHARED["run"](x)]
    for _ in range(NUM_REPEATS):
        for known, found in zip(first, SHARED["run"](x), strict=True):
            assert torch.equal(known, found)


def test_memory_never_written_is_never_read() -> None:
    """Results do not change when all scratch and output memory starts as NaN."""
    case = replace(CASES[2], padding=77)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        SHARED["check_case"](case, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
