import inspect
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from anycontrast_kernels import (
    backends_flash2,
    backends_flex,
    backends_loop,
    backends_torch,
    backends_triton,
    dispatch,
    recompute,
)
from anycontrast_kernels.attention import varlen_attention
from anycontrast_kernels.attention_tiles import TileRows
from anycontrast_kernels.backends import BACKENDS
from anycontrast_kernels.dispatch import Backend, Situation, choose, probe_error
from anycontrast_kernels.sequences import sequences

CPU = Situation(torch.device("cpu"), torch.float32, 64)
LOOP = next(backend for backend in BACKENDS if backend.name == "loop")


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_ordered", None)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    yield


def backend(
    name: str,
    forward: Callable[..., Any] = backends_loop.forward,
    backward: Callable[..., Any] = backends_loop.backward,
    *,
    refusal: str | None = None,
    native: bool = True,
) -> Backend:
    return Backend(name, forward, backward, lambda situation: refusal, lambda situation: native)


def wrong_forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = backends_loop.forward(*args)
    return out + 0.1, lse


def wrong_gradient(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = backends_loop.backward(*args)
    return dq, 1.1 * dk, dv


def nan_forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = backends_loop.forward(*args)
    return out * float("nan"), lse


def garbage_in_the_padding(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = backends_loop.forward(*args)
    out[-1] = 1.0
    return out, lse


def scale_ignored(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return backends_loop.forward(1.25 * q, *args)


def missing_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image is available\nfor this device")


def test_cpu_runs_the_loop_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "anycontrast_kernels")
    for _ in range(3):
        assert choose(BACKENDS, CPU).name == "loop"
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "'loop'" in record.getMessage()
    assert f"torch {torch.__version__}" in record.getMessage()


def test_each_situation_is_decided_for_itself() -> None:
    choose(BACKENDS, CPU)
    choose(BACKENDS, replace(CPU, dtype=torch.bfloat16))
    choose(BACKENDS, replace(CPU, head_dim=128))
    assert len(dispatch._chosen) == 3


def test_a_narrow_head_is_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "anycontrast_kernels")
    for _ in range(3):
        assert choose(BACKENDS, replace(CPU, head_dim=32)).name == "loop"
    (record,) = caplog.records
    assert "head dim 32 runs at a fraction" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_loop_passes_the_probe(dtype: torch.dtype) -> None:
    error = probe_error(LOOP, replace(CPU, dtype=dtype))
    assert error < {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)


def test_deciding_leaves_random_numbers_and_grad_mode_alone() -> None:
    state = torch.get_rng_state()
    with torch.no_grad():
        choose(BACKENDS, CPU)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_first_call_may_come_in_any_mode(mode: Callable[[], Any]) -> None:
    x = torch.randn(5, 2, 64)
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        varlen_attention(x, x, x, sequences((2, 3)))
    assert len(dispatch._chosen) == 1


def test_the_first_call_may_come_inside_an_activation_checkpoint() -> None:
    x = torch.randn(5, 2, 64, requires_grad=True)
    runs = sequences((2, 3))
    out = torch.utils.checkpoint.checkpoint(varlen_attention, x, x, x, runs, use_reentrant=False)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.any()


@pytest.mark.parametrize(
    ("forward", "backward", "reason"),
    [
        (wrong_forward, backends_loop.backward, "is off by"),
        (backends_loop.forward, wrong_gradient, "is off by"),
        (nan_forward, backends_loop.backward, "is off by nan"),
        (garbage_in_the_padding, backends_loop.backward, "is off by"),
        (scale_ignored, backends_loop.backward, "is off by"),
        (
            missing_kernel,
            backends_loop.backward,
            "failed with RuntimeError: no kernel image is available",
        ),
    ],
)
def test_a_back_end_that_fails_the_probe_is_passed_over_with_a_warning(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = (backend("fast", forward, backward), backend("loop", native=False))
    assert choose(pool, CPU).name == "loop"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "which is slower" in record.getMessage()
    assert f"passed over: fast: the probe {reason}" in record.getMessage()
    assert "for this device" not in record.getMessage()


def test_the_probe_holds_a_device_against_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may be told to multiply float32 as TF32, the definition too."""
    seen: list[Tensor] = []
    plain = Tensor.cpu

    def to_host(x: Tensor) -> Tensor:
        seen.append(x)
        return plain(x)

    monkeypatch.setattr(Tensor, "cpu", to_host)
    probe_error(LOOP, CPU)
    assert len(seen) == 4 + 4  # inputs and what comes of them


def test_a_failed_probe_is_a_warning_even_if_the_next_is_good(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "anycontrast_kernels")
    choose((backend("a", missing_kernel), backend("b")), CPU)
    choose((backend("a", refusal="not installed"), backend("b")), CPU)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "passed over: a: not installed" in caplog.records[1].getMessage()


def test_the_first_usable_back_end_wins() -> None:
    pool = (backend("a", refusal="too old"), backend("b"), backend("c"))
    assert choose(pool, CPU).name == "b"


def test_no_usable_back_end_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="too old"):
        choose((backend("a", refusal="too old"),), CPU)


def test_environment_orders_a_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = (backend("a"), backend("b"))
    assert choose(pool, CPU).name == "a"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "b")
    assert choose(pool, CPU).name == "b"
    assert choose(pool, CPU, backend="a").name == "a"


def test_a_configuration_orders_a_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = (backend("a"), backend("b"), backend("c", refusal="too old"))
    dispatch.order_backend("b")
    assert choose(pool, CPU).name == "b"
    dispatch.order_backend("c")
    with pytest.raises(ValueError, match="the configured back end='c' cannot run here"):
        choose(pool, CPU)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "a")
    assert choose(pool, CPU).name == "a"
    assert choose(pool, CPU, backend="b").name == "b"


def test_unknown_back_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"ANYCONTRAST_ATTN must be one of .*'loop'.*'fastest'"):
        choose(BACKENDS, CPU)


@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.name != "loop"])
def test_an_order_that_cannot_be_carried_out_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(ValueError, match=rf"cannot run here \({name}: needs a CUDA device"):
        choose(BACKENDS, CPU)


def test_the_loop_on_cuda_counts_as_slower() -> None:
    assert not LOOP.is_native(Situation(torch.device("cuda"), torch.float32, 64))
    assert LOOP.is_native(CPU)


CUDA = Situation(torch.device("cuda"), torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("name", "situation", "capability", "reason"),
    [
        ("torch", CUDA, (9, 0), None),
        ("torch", replace(CUDA, dtype=torch.float32), (9, 0), "needs float16 or bfloat16"),
        ("torch", replace(CUDA, head_dim=264), (9, 0), "multiple of 8 up to 256"),
        ("torch", CUDA, (7, 5), "needs compute capability 8.0, this is 7.5"),
        ("fa3", CUDA, (10, 0), "needs compute capability 9.x, this is 10.0"),
        ("fa3", CUDA, (9, 0), "flash_attn_interface is not installed"),
        ("fa4", CUDA, (8, 0), "needs compute capability 9.x or 10.x, this is 8.0"),
        ("fa4", CUDA, (10, 0), "flash_attn.cute is not installed"),
        ("fa2", CUDA, (9, 0), "flash_attn.flash_attn_interface is not installed"),
        ("triton", CUDA, (9, 0), None),
        ("triton", replace(CUDA, dtype=torch.float32), (8, 0), None),
        ("triton", replace(CUDA, dtype=torch.float64), (8, 0), "needs float16, bfloat16 or"),
        ("triton", replace(CUDA, head_dim=256), (8, 0), r"needs a head dim of \(32, 64"),
        ("triton", CUDA, (7, 0), "needs compute capability 8.0"),
        ("flex", CUDA, (9, 0), None),
        ("flex", replace(CUDA, dtype=torch.float64), (9, 0), "needs float16, bfloat16 or"),
    ],
)
def test_what_every_back_end_needs(
    name: str,
    situation: Situation,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for module in (backends_torch, backends_flash2):
        monkeypatch.setattr(
            module, "find_spec", lambda name: None if "flash" in name else find_spec(name)
        )
    (found,) = (backend.refusal for backend in BACKENDS if backend.name == name)
    answer = found(situation)
    assert answer is None if reason is None else re.search(reason, answer or "")


def test_the_order_of_preference() -> None:
    names = [backend.name for backend in BACKENDS]
    assert names == ["fa4", "fa3", "torch", "fa2", "triton", "flex", "loop"]
    native = [backend.name for backend in BACKENDS if backend.is_native(CUDA)]
    assert native == ["fa4", "fa3", "torch", "fa2", "triton"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_the_last_resort_of_accelerators_and_flex_agree_with_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator().manual_seed(0)
    runs_q, runs_k = (
        sequences(n, num_tokens=90, capacity=6) for n in ((33, 1, 0, 7), (5, 64, 3, 0))
    )
    q, k, v, grad = (torch.randn(90, 2, 64, generator=generator) for _ in range(4))
    out, lse = backends_loop.forward(q, k, v, runs_q, runs_k, 0.2)
    expected = backends_loop.backward(grad, q, k, v, out, lse, runs_q, runs_k, 0.2)
    attend = partial(backends_loop._attend, list(backends_loop._rows(runs_q, runs_k)), 0.2)
    torch.testing.assert_close(attend(q, k, v), out)
    with torch.inference_mode():
        found = recompute.gradients(attend, grad, q, k, v)
    torch.testing.assert_close(found, expected)
    # Uncompiled: on a CPU it can only go forward, and compiling takes half a minute.
    monkeypatch.setattr(backends_flex, "_compiled", lambda: flex_attention)
    for _ in range(2):
        torch.testing.assert_close(backends_flex.forward(q, k, v, runs_q, runs_k, 0.2)[0], out)


def test_torch_is_called_with_the_seven_arguments_of_every_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stands in for the operator, which has no CPU kernel; the real one is called the same way."""
    seen: list[tuple[Any, ...]] = []

    class Operators:
        def _varlen_attn(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            seen.append(arguments)
            q, k, v, *_ = arguments
            out, lse = backends_loop.forward(q, k, v, runs, runs, q.shape[-1] ** -0.5)
            out[-1] = torch.nan
            return out, lse, torch.zeros(2)

        def _varlen_attn_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
            seen.append(arguments)
            grad, q, k, v, out, lse, *_ = arguments
            return backends_loop.backward(grad, q, k, v, out, lse, runs, runs, q.shape[-1] ** -0.5)

    monkeypatch.setattr(backends_torch, "_operators", Operators)
    runs = sequences((4, 6), num_tokens=11)
    q, k, v, grad = (torch.randn(11, 2, 64) for _ in range(4))
    out, lse = backends_torch.forward(q, k, v, runs, runs, 0.2)
    found = backends_torch.backward(grad, q, k, v, out, lse, runs, runs, 0.2)
    expected_out, expected_lse = backends_loop.forward(q, k, v, runs, runs, 0.2)
    expected = backends_loop.backward(grad, q, k, v, expected_out, expected_lse, runs, runs, 0.2)
    torch.testing.assert_close((out, *found), (expected_out, *expected))
    assert [len(arguments) for arguments in seen] == [7, 12]
    schema = inspect.signature(varlen_attn)
    kinds = [p.kind for p in schema.parameters.values()]
    assert kinds[:7] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 7


def test_flash_attn_2_is_called_by_its_published_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stands in for the package with its parameters, names and order as published."""
    runs = sequences((4, 6), num_tokens=11)
    deterministic_seen: list[bool] = []

    class Package:
        @staticmethod
        def _flash_attn_varlen_forward(
            q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
            max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
            causal: bool,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
            assert (max_seqlen_q, max_seqlen_k, dropout_p, causal) == (512, 512, 0.0, False)
            given = runs._replace(cu_seqlens=cu_seqlens_q)
            out, lse = backends_loop.forward(q, k, v, given, given, softmax_scale)
            out[-1] = torch.nan
            return out, lse, q, q

        @staticmethod
        def _flash_attn_varlen_backward(
            dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
            dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
            max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
            causal: bool, window_size_left: int, window_size_right: int, softcap: float,
            alibi_slopes: None, deterministic: bool,
        ) -> None:  # fmt: skip
            assert (dropout_p, causal, softcap) == (0.0, False, 0.0)
            assert (window_size_left, window_size_right) == (-1, -1)
            deterministic_seen.append(deterministic)
            found = backends_loop.backward(
                dout, q, k, v, out, softmax_lse, runs, runs, softmax_scale
            )
            for target, gradient in zip((dq, dk, dv), found, strict=True):
                target.copy_(gradient)
                target[-1] = torch.nan

    monkeypatch.setattr(backends_flash2, "_package", Package)
    q, k, v, grad = (torch.randn(11, 2, 64) for _ in range(4))
    out, lse = backends_flash2.forward(q, k, v, runs, runs, 0.2)
    found = backends_flash2.backward(grad, q, k, v, out, lse, runs, runs, 0.2)
    expected_out, expected_lse = backends_loop.forward(q, k, v, runs, runs, 0.2)
    expected = backends_loop.backward(grad, q, k, v, expected_out, expected_lse, runs, runs, 0.2)
    torch.testing.assert_close((out, *found), (expected_out, *expected))
    assert deterministic_seen == [False]


def test_our_kernels_get_the_tiles_they_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_attention = pytest.importorskip("anycontrast_kernels.triton_attention")
    triton_attention_backward = pytest.importorskip("anycontrast_kernels.triton_attention_backward")
    seen: list[list[Tensor]] = []

    def record(*arguments: Any) -> tuple[Tensor, ...]:
        seen.append([x for x in arguments if isinstance(x, Tensor) and x.ndim == 2])
        return ()

    monkeypatch.setattr(triton_attention, "attention_forward", record)
    monkeypatch.setattr(triton_attention_backward, "attention_backward", record)
    monkeypatch.setattr(
        backends_triton,
        "tile_rows",
        lambda head_dim, dtype, device: TileRows(forward_q=128, backward_q=64, backward_k=128),
    )
    runs_q, runs_k = sequences((200, 70)), sequences((300, 5))
    x, lse = torch.zeros(1, 2, 64), torch.zeros(0)
    backends_triton.forward(x, x, x, runs_q, runs_k, 0.2)
    backends_triton.backward(x, x, x, x, x, lse, runs_q, runs_k, 0.2)
    assert [[id(x) for x in tiles] for tiles in seen] == [
        [id(runs_q.tiles_128)],
        [id(runs_q.tiles_64), id(runs_k.tiles_128)],
    ]
