"""What is running: versions, where `anycontrast` was imported from, and its commit."""

import logging
import platform
import subprocess
from pathlib import Path

import torch

import anycontrast
from anycontrast.training.process_group import world_size

logger = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Return versions and commit, for checkpoints and the first log line."""
    return {
        "anycontrast": anycontrast.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def announce(what: str, *, where: torch.device, zero_stage: int, precision: str) -> None:
    """Log the first line of a run; the attention kernel announces itself when it is chosen."""
    found = versions()
    logger.info(
        "%s with anycontrast %s (commit %s) from %s, torch %s: %d process(es) on %s, ZeRO-%d, %s",
        what,
        found["anycontrast"],
        found["commit"],
        _package_folder(),
        found["torch"],
        world_size(),
        where.type,
        zero_stage,
        precision,
    )


def _package_folder() -> Path:
    return Path(anycontrast.__file__).resolve().parent


def _commit() -> str:
    """The commit of the working copy the package lies in, or `unknown`."""
    command = ["git", "-C", str(_package_folder()), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
