"""anycontrast: pretrain 3D MRI transformers on studies with any subset of contrasts.

Importing this package loads no training stack: no torch, Ray, DeepSpeed, Triton or webdataset.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pathlib import Path

    from anycontrast.release.load import Pretrained

__all__ = ["__version__", "load_pretrained"]


def load_pretrained(path: "str | Path") -> "Pretrained":
    """Load the encoder of a release, every byte verified.

    Args:
        path: a release folder, or the URL of one (pulled into the local cache first).

    Returns:
        The encoder (float32, CPU, eval mode) with its config; `.encode(studies)` gives features.

    Raises:
        ReleaseNotFoundError: nothing there.
        ReleaseError: damaged, or its tensors do not fit its config.
    """
    from anycontrast.release.load import load_pretrained as load

    return load(path)
