"""Save and restore the generator states of a process: Python, NumPy, torch and its GPU.

Order, masks and augmentation never use them (they are functions of the seed); they are kept so
that anything else that draws a number goes on where it stopped.
"""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write_rng(path: Path) -> None:
    """Write the states as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    path.write_text(json.dumps(states), encoding="utf-8")


def read_rng(path: Path) -> None:
    """Restore what `write_rng` wrote."""
    states = json.loads(path.read_text(encoding="utf-8"))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(states["torch"]))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
