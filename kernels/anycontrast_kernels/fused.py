"""Whether our Triton kernels or plain PyTorch do a memory-bound operation: decided and logged once.

On a CUDA device the kernel is asked for its reasons against running here, then probed against the
plain definition on a small case; the first that speaks against it makes PyTorch do the work, with
a warning. `ANYCONTRAST_KERNELS` orders `torch` or `triton`; an order that cannot be carried out is
an error. On a CPU PyTorch is the intended path, and `triton` can be ordered where Triton's
interpreter is on.
"""

import importlib.metadata
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "ANYCONTRAST_KERNELS"
MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
MAX_PATCH_VOXELS = 16384
"""A patch lives in the registers of one program; 24 x 24 x 24 voxels fit."""

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest allowed |difference| to the plain definition, values of unit variance."""

_decided: dict[tuple[object, ...], bool] = {}


def use_triton(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    patch_vox: tuple[int, ...],
    probe: Callable[[], float],
) -> bool:
    """Decide between the Triton kernel and plain PyTorch; the answer of a situation is kept.

    Args:
        operation: name of the operation, for the log.
        device: of the tensors.
        dtype: of what is written.
        patch_vox: sides of a patch, or its voxels alone.
        probe: run the kernel on a small case of this dtype and patch and return the largest
            difference to the plain definition.

    Raises:
        ValueError: the environment variable orders what does not exist or cannot run here.
    """
    order = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if device.type == "cpu" and order is None:
        return False
    key = (operation, device, dtype, patch_vox, order)
    if key not in _decided:
        _decided[key] = _decide(operation, device, dtype, patch_vox, order, probe)
    return _decided[key]


def _decide(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    patch_vox: tuple[int, ...],
    order: str | None,
    probe: Callable[[], float],
) -> bool:
    if order not in (None, "torch", "triton"):
        raise ValueError(
            f"{operation}: {ENVIRONMENT_VARIABLE} must be 'torch' or 'triton', got {order!r}"
        )
    place = f"{device}, {dtype}, patch {'x'.join(map(str, patch_vox))}, torch {torch.__version__}"
    if order == "torch":
        reason: str | None = f"ordered by {ENVIRONMENT_VARIABLE}"
    else:
        reason = _refusal(device, dtype, patch_vox) or _probe_failure(dtype, probe)
    if reason is None:
        version = importlib.metadata.version("triton")
        logger.info("%s runs as one Triton kernel (%s, triton %s)", operation, place, version)
        return True
    if order == "triton":
        raise ValueError(
            f"{operation}: {ENVIRONMENT_VARIABLE}='triton' cannot run here ({reason}); set it to "
            "'torch' or leave it unset"
        )
    level = logging.INFO if device.type == "cpu" else logging.WARNING
    logger.log(level, "%s runs in plain PyTorch (%s), slower: %s", operation, place, reason)
    return False


def _refusal(device: torch.device, dtype: torch.dtype, patch_vox: tuple[int, ...]) -> str | None:
    """Return why the kernels cannot run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"needs triton 3.6 or newer, this is {version}"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted):
        return f"needs a CUDA device, this is {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "needs compute capability 8.0 or newer"
    if dtype not in PROBE_TOLERANCE and dtype != torch.int16:
        return f"is not made for {dtype}"
    size = 1
    for side in patch_vox:
        size *= side
    if size > MAX_PATCH_VOXELS:
        return f"a patch may have {MAX_PATCH_VOXELS} voxels, this one has {size}"
    return None


def _probe_failure(dtype: torch.dtype, probe: Callable[[], float]) -> str | None:
    try:
        with torch.inference_mode(False), torch.no_grad():
            error = probe()
    except Exception as failure:
        # Compilers and drivers raise what they like; every failure means the plain path.
        first_line = str(failure).partition("\n")[0]
        return f"the probe failed with {type(failure).__name__}: {first_line}"
    tolerance = PROBE_TOLERANCE.get(dtype, 0.0)
    # Written so that NaN fails too.
    if not error <= tolerance:
        return f"the probe is off by {error:.3g}, allowed {tolerance:.3g}"
    return None
