"""Our Triton attention in the interpreter: forward and every gradient, no GPU needed.

The interpreter must be on before a kernel is decorated, hence all checks run in one process of
their own, which this file starts with itself as the script; each check is one test here. The cases
and `run` serve `test_gpu_attention` too.
"""

import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anycontrast_kernels import reference
from anycontrast_kernels.attention_tiles import tile_rows
from anycontrast_kernels.sequences import Sequences, sequences

pytest.importorskip("triton")

ATOL = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
RTOL = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# A key row beyond the sequence has probabilities over what fp16 holds; its sums are never stored.
WARNINGS = (
    *("-W", "error"),
    *("-W", "ignore:overflow encountered:RuntimeWarning"),
    *("-W", "ignore:invalid value encountered in matmul:RuntimeWarning"),
)
RAGGED = (1, 17, 64, 65, 130, 0)
OTHER = (70, 0, 5, 64, 129, 33)


@dataclass(frozen=True)
class Case:
    """Lengths of queries and keys; `lengths_k` None is self-attention on views of one tensor."""

    dtype: torch.dtype
    head_dim: int
    lengths_q: tuple[int, ...] = RAGGED
    lengths_k: tuple[int, ...] | None = OTHER
    num_heads: int = 2
    padding: int = 21
    """Rows after the last sequence, NaN in every input."""
    scale: float | None = None

    @property
    def name(self) -> str:
        kind = "self" if self.lengths_k is None else "cross"
        lengths = "_".join(map(str, self.lengths_q))
        return f"{kind}-{str(self.dtype).removeprefix('torch.')}-{self.head_dim}-{lengths}"


CASES = [
    Case(torch.float32, 64, num_heads=1),
    Case(torch.float32, 64, (65, 0, 3), None, padding=0),
    Case(torch.float16, 64, (1, 65, 130, 0), (70, 0, 129, 33)),
    Case(torch.float16, 64, (17, 65, 0), None, num_heads=1, scale=0.2),
    Case(torch.bfloat16, 64, (1, 65, 0), (70, 0, 33), 1),
    Case(torch.float32, 32, (65, 3), (17, 70), 1),
    Case(torch.float16, 96, (0, 130), (3, 129), 1),
    Case(torch.float32, 96, (66,), (33,), 1, 0),
    Case(torch.float16, 128, (64, 129), (65, 128), 1),
    Case(torch.bfloat16, 128, (65,), (18,), 1),
    Case(torch.float32, 128, (65,), (18,), 1),
    Case(torch.float16, 64, (0, 0), (17, 64), 1),
    Case(torch.float16, 64, (17, 64), (0, 0), 1),
]


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    for_q: Sequences
    for_k: Sequences
    scale: float


def inputs(case: Case, device: str) -> Inputs:
    """Random tensors; q, k and v are views with a token stride of their own."""
    lengths_k = case.lengths_q if case.lengths_k is None else case.lengths_k
    shape = (case.num_heads, case.head_dim)
    generator = torch.Generator().manual_seed(case.head_dim)

    def random(length: int, parts: int) -> Tensor:
        x = torch.randn(length + case.padding, parts, *shape, generator=generator)
        x[length:] = math.nan
        return x.to(device, case.dtype)

    num_q, num_k = sum(case.lengths_q), sum(lengths_k)
    q, k, v = random(num_q, 3).unbind(1)
    if case.lengths_k is not None:
        k, v = random(num_k, 2).unbind(1)
    capacity = len(lengths_k) + 1
    for_q, for_k = (
        sequences(lengths, device, capacity=capacity, num_tokens=sum(lengths) + case.padding)
        for lengths in (case.lengths_q, lengths_k)
    )
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return Inputs(q, k, v, random(num_q, 1)[:, 0], for_q, for_k, scale)


def run(x: Inputs) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, gradients of q, k and v by the kernels."""
    from anycontrast_kernels.triton_attention import attention_forward
    from anycontrast_kernels.triton_attention_backward import attention_backward

    def tiles(of: Sequences, rows: int) -> Tensor:
        return {64: of.tiles_64, 128: of.tiles_128}[rows]

    rows = tile_rows(x.q.shape[2], x.q.dtype, x.q.device)
    cu_q, cu_k = x.for_q.cu_seqlens, x.for_k.cu_seqlens
    tiles_q = tiles(x.for_q, rows.forward_q)
    out, lse = attention_forward(x.q, x.k, x.v, cu_q, cu_k, tiles_q, x.scale)
    tiles_q, tiles_k = tiles(x.for_q, rows.backward_q), tiles(x.for_k, rows.backward_k)
    grads = attention_backward(
        x.dout, x.q, x.k, x.v, out, lse, cu_q, cu_k, tiles_q, tiles_k, x.scale
    )
    return (out, lse, *grads)


def expected(case: Case, x: Inputs) -> tuple[Tensor, ...]:
    """The same by the plain definition in float32, without the padding."""
    lengths_q = case.lengths_q
    lengths_k = lengths_q if case.lengths_k is None else case.lengths_k
    num_q, num_k = sum(lengths_q), sum(lengths_k)
    q, k, v = (t.detach().float() for t in (x.q[:num_q], x.k[:num_k], x.v[:num_k]))
    leaves = tuple(t.clone().requires_grad_() for t in (q, k, v))
    out = reference.attention(*leaves, lengths_q=lengths_q, lengths_k=lengths_k, scale=x.scale)
    grads = torch.autograd.grad(out, leaves, x.dout[:num_q].float(), materialize_grads=True)
    parts = zip(torch.split(q, [*lengths_q]), torch.split(k, [*lengths_k]), strict=True)
    lse = [torch.einsum("qhd,khd->hqk", a, b).mul(x.scale).logsumexp(2) for a, b in parts]
    return (out.detach(), torch.cat(lse, 1), *grads)


def check_case(case: Case, device: str) -> None:
    """Every result agrees with the definition; padding rows are 0 and their log-sum-exp -inf."""
    x = inputs(case, device)
    atol, rtol = ATOL[case.dtype], RTOL[case.dtype]
    names = ("out", "lse", "dq", "dk", "dv")
    for name, found, known in zip(names, run(x), expected(case, x), strict=True):
        if name == "lse":
            assert found[:, known.shape[1] :].eq(-math.inf).all(), name
            found = found[:, : known.shape[1]]
        else:
            assert found.dtype == case.dtype, name
            assert found[len(known) :].eq(0).all(), name
            found = found[: len(known)]
        torch.testing.assert_close(
            found.float(), known, atol=atol, rtol=rtol, msg=(f"{name}: {{}}").format
        )


def check_isolation() -> None:
    """A sequence full of NaN leaves the bits of every other sequence alone."""
    case = Case(torch.float16, 64, (17, 65, 33), (64, 30, 66), 1)
    clean, spoilt = inputs(case, "cpu"), inputs(case, "cpu")
    spoilt.q[17:82] = spoilt.dout[17:82] = math.nan
    spoilt.k[64:94] = spoilt.v[64:94] = math.nan
    keep_q = torch.ones(len(clean.q), dtype=torch.bool)
    keep_q[17:82] = False
    keep_k = torch.ones(len(clean.k), dtype=torch.bool)
    keep_k[64:94] = False
    for number, (a, b) in enumerate(zip(run(clean), run(spoilt), strict=True)):
        if number == 1:
            assert torch.equal(a[:, keep_q], b[:, keep_q])
        else:
            keep = keep_k if number > 2 else keep_q
            assert torch.equal(a[keep], b[keep])


def check_large_scores() -> None:
    """Scores far from 0 on either side overflow nothing, in rows with masked keys least of all."""
    for sign in (1.0, -1.0):
        case = Case(torch.float16, 64, (65, 3), (70, 1), 1)
        x = inputs(case, "cpu")
        x.q[:68] = x.q[:68].abs() * 4
        x.k[:71] = x.k[:71].abs() * 4 * sign
        for found, known in zip(run(x), expected(case, x), strict=True):
            rows = found[:, : known.shape[1]] if found.ndim == 2 else found[: len(known)]
            torch.testing.assert_close(rows.float(), known, atol=4e-2, rtol=1e-2)


def check_other_strides() -> None:
    """A gradient that is one number everywhere, or heads stored apart, gives the same bits."""
    x = inputs(Case(torch.float16, 64, (17, 65), (30, 3), padding=0), "cpu")
    ones = torch.ones((), dtype=x.dout.dtype)
    plain = run(replace(x, dout=ones.expand(x.dout.shape).contiguous()))
    apart = x.q.transpose(0, 1).contiguous().transpose(0, 1)
    other = run(replace(x, q=apart, dout=ones.expand(x.dout.shape)))
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


CHECKS: dict[str, Callable[[], None]] = {
    **{case.name: partial(check_case, case, "cpu") for case in CASES},
    "isolation": check_isolation,
    "large_scores": check_large_scores,
    "other_strides": check_other_strides,
}


def run_checks() -> Iterator[tuple[str, str]]:
    """Run every check with uninitialised memory full of NaN; yields (name, error or nothing)."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
    for name, function in CHECKS.items():
        try:
            function()
            yield name, ""
        except Exception:
            yield name, traceback.format_exc()


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """What the interpreter's process says about every check."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *WARNINGS, str(Path(__file__))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", list(CHECKS))
def test_interpreted(errors: dict[str, str], name: str) -> None:
    assert not errors[name], errors[name]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(run_checks())))
