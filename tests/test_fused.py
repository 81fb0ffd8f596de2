import logging
from collections.abc import Callable

import pytest
import torch

from anycontrast_kernels import fused

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LOGGER = "anycontrast_kernels.fused"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_decided", {})
    monkeypatch.delenv(fused.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a device be decided upon that is not there; the probe is what would touch it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def decide(
    device: torch.device = GPU,
    *,
    error: float = 0.0,
    dtype: torch.dtype = torch.float32,
    patch: tuple[int, ...] = (8, 8, 8),
    probe: Callable[[], float] | None = None,
) -> bool:
    return fused.use_triton("op", device, dtype, patch, probe or (lambda: error))


def test_a_cpu_runs_pytorch_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, LOGGER):
        assert not decide(CPU)
    assert not caplog.records


@pytest.mark.usefixtures("gpu")
def test_a_kernel_that_agrees_runs_and_is_probed_once(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    calls: list[int] = []

    def probe() -> float:
        calls.append(1)
        return 1e-6

    with caplog.at_level(logging.INFO, LOGGER):
        assert all(decide(probe=probe) for _ in range(3))
    assert len(calls) == 1
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "one Triton kernel" in record.getMessage()


def broken() -> float:
    raise RuntimeError("no such instruction\nand much more")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"error": 0.3}, "off by 0.3"),
        ({"error": float("nan")}, "off by nan"),
        ({"probe": broken}, "RuntimeError: no such instruction"),
        ({"dtype": torch.float64}, "not made for torch.float64"),
        ({"patch": (32, 32, 32)}, "this one has 32768"),
    ],
)
def test_a_slower_path_is_a_warning_with_its_reason(
    arguments: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.INFO, LOGGER):
        assert not decide(**arguments)  # type: ignore[arg-type]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and reason in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.usefixtures("gpu")
def test_an_old_chip_and_a_missing_triton_are_reasons(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not decide(patch=(4,))
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not decide(patch=(5,))
    old, missing = (record.getMessage() for record in caplog.records)
    assert ("capability 8.0" in old or "triton" in old) and "triton is not installed" in missing


@pytest.mark.usefixtures("gpu")
def test_an_order_is_followed_or_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fused.ENVIRONMENT_VARIABLE, "torch")
    assert not decide()
    monkeypatch.setenv(fused.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="ANYCONTRAST_KERNELS must be 'torch' or 'triton'"):
        decide()
    monkeypatch.setenv(fused.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"cannot run here \(.*\); set it to 'torch'"):
        decide(CPU)
    with pytest.raises(ValueError, match="off by 1"):
        decide(error=1.0)
