import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anycontrast_kernels import attention, dispatch
from anycontrast_kernels.dispatch import Candidate, Situation, choose, probe_error

CPU = Situation(torch.device("cpu"), torch.float32, 16)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    yield


def candidate(
    name: str,
    run: Callable[..., Tensor] = attention.loop_attention,
    *,
    refusal: str | None = None,
    native: bool = True,
) -> Candidate:
    return Candidate(name, run, lambda situation: refusal, lambda situation: native)


def wrong_forward(*args: Any, **kwargs: Any) -> Tensor:
    return attention.loop_attention(*args, **kwargs) + 0.1


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return attention.loop_attention(q.detach() + 0.0 * q, k, v, *args, **kwargs)


def nan_forward(*args: Any, **kwargs: Any) -> Tensor:
    return attention.loop_attention(*args, **kwargs) * float("nan")


def missing_kernel(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def test_cpu_runs_the_loop_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert choose(attention.CANDIDATES, CPU).name == "loop"
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "'loop'" in caplog.text


def test_each_situation_is_decided_for_itself() -> None:
    choose(attention.CANDIDATES, CPU)
    choose(attention.CANDIDATES, Situation(torch.device("cpu"), torch.bfloat16, 16))
    choose(attention.CANDIDATES, Situation(torch.device("cpu"), torch.float32, 64))
    assert len(dispatch._chosen) == 3


def test_the_loop_passes_the_probe() -> None:
    assert probe_error(attention.loop_attention, CPU) < 1e-5


def test_the_probe_leaves_random_numbers_and_grad_mode_alone() -> None:
    state = torch.get_rng_state()
    with torch.no_grad():
        probe_error(attention.loop_attention, CPU)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_runs_inside_inference_mode() -> None:
    with torch.inference_mode():
        assert probe_error(attention.loop_attention, CPU) < 1e-5


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (wrong_forward, "off by"),
        (wrong_gradient, "off by"),
        (nan_forward, "off by nan"),
        (missing_kernel, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_candidate_that_fails_the_probe_is_passed_over_with_a_warning(
    broken: Callable[..., Tensor], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = [candidate("fast", broken), candidate("loop", native=False)]
    assert choose(pool, CPU).name == "loop"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "slower" in record.getMessage()
    assert f"fast: the probe {'failed with' if 'Error' in reason else 'is'}" in record.getMessage()
    assert reason in record.getMessage()


def test_the_first_usable_candidate_wins() -> None:
    pool = [candidate("a", refusal="too old"), candidate("b"), candidate("c")]
    assert choose(pool, CPU).name == "b"


def test_no_usable_candidate_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="too old"):
        choose([candidate("a", refusal="too old")], CPU)


def test_environment_orders_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = [candidate("a"), candidate("b")]
    assert choose(pool, CPU).name == "a"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "b")
    assert choose(pool, CPU).name == "b"
    assert choose(pool, CPU, backend="a").name == "a"


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"ANYCONTRAST_ATTN must be one of .*'loop'.*'fastest'"):
        choose(attention.CANDIDATES, CPU)


def test_an_order_that_cannot_be_carried_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    with pytest.raises(ValueError, match=r"cannot run here \(torch: needs a CUDA device"):
        choose(attention.CANDIDATES, CPU)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 64, "needs float16 or bfloat16"),
        (torch.bfloat16, 60, "multiple of 8"),
        (torch.bfloat16, 264, "multiple of 8 up to 256"),
        (torch.bfloat16, 64, None),
    ],
)
def test_what_the_flash_kernels_need(dtype: torch.dtype, head_dim: int, reason: str | None) -> None:
    torch_candidate = attention.CANDIDATES[0]
    found = torch_candidate.refusal(Situation(torch.device("cuda"), dtype, head_dim))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_the_loop_on_cuda_counts_as_slower() -> None:
    loop = attention.CANDIDATES[1]
    assert not loop.is_native(Situation(torch.device("cuda"), torch.float32, 64))
    assert loop.is_native(CPU)
