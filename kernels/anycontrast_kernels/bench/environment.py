"""What a benchmark ran on: device, versions, date."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4")


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a table must say so that another can be held against it."""
    found: dict[str, Any] = {
        "device": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": _versions(),
    }
    if device.type == "cuda":
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["cuda"] = torch.version.cuda
    else:
        found["threads"] = torch.get_num_threads()
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
