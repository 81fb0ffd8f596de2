"""The back ends of attention, in order of preference."""

from functools import partial

from anycontrast_kernels import backends_loop, backends_torch
from anycontrast_kernels.dispatch import Backend, Situation


def _on_cuda(situation: Situation) -> bool:
    return situation.device.type == "cuda"


def _on_cpu(situation: Situation) -> bool:
    return situation.device.type == "cpu"


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
    Backend("loop", backends_loop.forward, backends_loop.backward, lambda situation: None, _on_cpu),
)
