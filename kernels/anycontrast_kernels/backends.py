"""The back ends of attention, in order of preference.

Each is a module of its own that loads what it needs when it first runs.
"""

from functools import partial

from anycontrast_kernels import (
    backends_flash2,
    backends_flex,
    backends_loop,
    backends_torch,
    backends_triton,
)
from anycontrast_kernels.dispatch import Backend, Situation


def _on_cuda(situation: Situation) -> bool:
    return situation.device.type == "cuda"


def _on_cpu(situation: Situation) -> bool:
    return situation.device.type == "cpu"


def _nowhere(situation: Situation) -> bool:
    return False


BACKENDS = (
    Backend(
        "fa4",
        partial(backends_torch.forward, implementation="FA4"),
        partial(backends_torch.backward, implementation="FA4"),
        partial(backends_torch.flash_refusal, "FA4"),
        _on_cuda,
    ),
    Backend(
        "fa3",
        partial(backends_torch.forward, implementation="FA3"),
        partial(backends_torch.backward, implementation="FA3"),
        partial(backends_torch.flash_refusal, "FA3"),
        _on_cuda,
    ),
    Backend(
        "torch", backends_torch.forward, backends_torch.backward, backends_torch.refusal, _on_cuda
    ),
    Backend(
        "fa2", backends_flash2.forward, backends_flash2.backward, backends_flash2.refusal, _on_cuda
    ),
    Backend(
        "triton",
        backends_triton.forward,
        backends_triton.backward,
        backends_triton.refusal,
        _on_cuda,
    ),
    Backend("flex", backends_flex.forward, backends_flex.backward, backends_flex.refusal, _nowhere),
    Backend("loop", backends_loop.forward, backends_loop.backward, lambda situation: None, _on_cpu),
)
