"""Linear layers on CPU: the same numbers whichever library multiplies, chosen for a reason."""

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from anycontrast_kernels import linear as module
from anycontrast_kernels.linear import is_onednn_chosen, linear

needs_onednn = pytest.mark.skipif(
    module._onednn_failure() is not None, reason="torch has no usable oneDNN on this CPU"
)


@pytest.fixture(autouse=True)
def _choose_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE, raising=False)
    is_onednn_chosen.cache_clear()
    yield
    is_onednn_chosen.cache_clear()


def order(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, name)
    is_onednn_chosen.cache_clear()


def grads(
    rows: int, *, has_bias: bool, features: tuple[int, int] = (384, 400)
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features[0], generator=generator, requires_grad=True)
    weight = torch.randn(features[1], features[0], generator=generator, requires_grad=True)
    bias = torch.randn(features[1], generator=generator, requires_grad=True)
    grad = torch.randn(rows, features[1], generator=generator)
    inputs = (x, weight, bias) if has_bias else (x, weight)
    out = linear(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 200, 2048 + 512 + 130])
@pytest.mark.parametrize("has_bias", [True, False])
def test_onednn_gives_what_torch_gives(
    rows: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order(monkeypatch, "torch")
    expected = grads(rows, has_bias=has_bias)
    order(monkeypatch, "onednn")
    found = grads(rows, has_bias=has_bias)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(rows, 384) ** 0.5)
    assert (rows >= 64) == any(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_onednn
def test_strided_inputs_and_an_expanded_gradient_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    order(monkeypatch, "onednn")
    x = torch.randn(128, 2, 384)[:, 1].requires_grad_()
    weight = torch.randn(400, 384, 2)[:, :, 0].requires_grad_()
    found = torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    expected = torch.autograd.grad(F.linear(x, weight).sum(), (x, weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@needs_onednn
def test_rows_of_a_padded_batch_are_multiplied_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a padded model would be slower for another reason than its padding."""
    order(monkeypatch, "onednn")
    x = torch.randn(50, 4, 384).transpose(0, 1).requires_grad_()
    weight, bias = torch.randn(400, 384, requires_grad=True), torch.randn(400, requires_grad=True)
    grad = torch.randn(4, 50, 400)
    batch, rows = linear(x, weight, bias), linear(x.flatten(0, 1), weight, bias)
    assert torch.equal(batch.flatten(0, 1), rows)
    assert not torch.equal(batch, F.linear(x, weight, bias))
    found = torch.autograd.grad(batch, (x, weight, bias), grad)
    expected = torch.autograd.grad(rows, (x, weight, bias), grad.flatten(0, 1))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert linear(torch.randn(0, 5, 384), weight).shape == (0, 5, 400)


@needs_onednn
def test_a_frozen_weight_gets_no_gradient_and_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    order(monkeypatch, "onednn")
    x = torch.randn(128, 384, requires_grad=True)
    weight = torch.randn(384, 384)
    assert is_onednn_chosen()  # its probe would be counted
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(linear(x, weight).sum(), x)
    assert counter.get_total_flops() == 2 * 2 * 128 * 384 * 384


@pytest.mark.parametrize("rows", [1, 64, 127, 128, 5000])
def test_rows_go_in_few_sizes_and_none_is_lost(rows: int) -> None:
    *bulk, rest = module._pieces(rows, 768 * 768)
    assert sum(bulk) + rest == rows
    assert rest < module.LEAST_ROWS
    assert set(bulk) <= {64, 128, 256, 512, 1024, 2048}


@needs_onednn
def test_ragged_compiled_code_does_not_ask_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    order(monkeypatch, "onednn")
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    x, weight = torch.randn(128, 384), torch.randn(384, 384)
    torch.testing.assert_close(compiled(x, weight), linear(x, weight), rtol=0, atol=0)


def test_autocast_other_dtypes_and_small_products_take_torchs_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*inputs: object) -> None:
        raise AssertionError("the detour was taken")

    monkeypatch.setattr(module, "_linear", refuse)
    x, weight = torch.randn(128, 384), torch.randn(384, 384)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x[:8], weight).shape == (8, 384)
    assert linear(x[:, :16], weight[:, :16]).shape == (128, 384)


@pytest.mark.parametrize(
    ("vendor", "failure", "expected"),
    [
        ("AuthenticAMD", None, True),
        ("GenuineIntel", None, False),
        ("", None, False),
        ("AuthenticAMD", "the probe is off", False),
    ],
)
def test_the_make_of_the_cpu_decides_and_the_log_says_why(
    vendor: str,
    failure: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "_vendor", lambda: vendor)
    monkeypatch.setattr(module, "_onednn_failure", lambda: failure)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert is_onednn_chosen() is expected
        assert is_onednn_chosen() is expected
    (record,) = caplog.records
    assert (failure or "MKL") in record.getMessage()


def test_an_order_that_cannot_be_carried_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    order(monkeypatch, "mkl")
    with pytest.raises(ValueError, match="ANYCONTRAST_LINEAR must be one of"):
        is_onednn_chosen()
    order(monkeypatch, "onednn")
    monkeypatch.setattr(module, "_onednn_failure", lambda: "no oneDNN")
    with pytest.raises(ValueError, match="onednn cannot run here"):
        is_onednn_chosen()


def test_a_wrong_product_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_product", lambda a, b, bias: torch.full((1,), torch.nan))
    failure = module._onednn_failure()
    assert failure is not None
    assert "the probe" in failure or "oneDNN" in failure or "offers" in failure
