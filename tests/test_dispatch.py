import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anycontrast_kernels import backends_loop, dispatch
from anycontrast_kernels.attention import varlen_attention
from anycontrast_kernels.backends import BACKENDS
from anycontrast_kernels.dispatch import Backend, Situation, choose, probe_error
from anycontrast_kernels.sequences import sequences

CPU = Situation(torch.device("cpu"), torch.float32, 64)
LOOP = next(backend for backend in BACKENDS if backend.name == "loop")


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_chosen", {})
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
