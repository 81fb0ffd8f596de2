"""What is running: versions, where `anycontrast` was imported from, its commit and its code."""

import hashlib
import importlib.util
import logging
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import anycontrast
from anycontrast.training.process_group import world_size

logger = logging.getLogger(__name__)

_PACKAGES = ("anycontrast", "anycontrast_datasets", "anycontrast_kernels")
COMMIT_NAME = "COMMIT"
"""File beside the code that names its commit where there is no git: images write it."""


@dataclass(frozen=True)
class Provenance:
    """Which code runs in a process."""

    version: str
    commit: str
    """Of the working copy, `+changes` behind it where files differ from it; `unknown` without."""
    code: str
    """Digest of every Python file of the three packages, 12 hex digits."""
    folder: str
    """Where `anycontrast` was imported from."""
    torch: str
    python: str

    def __str__(self) -> str:
        return (
            f"anycontrast {self.version} (commit {self.commit}, code {self.code}) from "
            f"{self.folder}, torch {self.torch}, Python {self.python}"
        )

    def differs_from(self, other: "Provenance") -> bool:
        """Whether the two would compute something else; the folder may differ."""

        def decisive(one: Provenance) -> tuple[str, ...]:
            return (one.version, one.code, one.torch, one.python)

        return decisive(self) != decisive(other)


@cache
def provenance() -> Provenance:
    """Return what this process runs; asked once, so it is what was there at the start."""
    return Provenance(
        version=anycontrast.__version__,
        commit=_commit(_package_folder()),
        code=code_digest([_folder_of(package) for package in _PACKAGES]),
        folder=str(_package_folder()),
        torch=str(torch.__version__),
        python=platform.python_version(),
    )


def versions() -> dict[str, str]:
    """Return versions and commit, for checkpoints."""
    found = provenance()
    return {
        "anycontrast": found.version,
        "commit": found.commit,
        "code": found.code,
        "torch": found.torch,
        "python": found.python,
    }


def announce(what: str, *, where: torch.device, zero_stage: int, precision: str) -> None:
    """Log the first line of a run; the attention kernel announces itself when it is chosen."""
    logger.info(
        "%s with %s: %d process(es) on %s, ZeRO-%d, %s",
        what,
        provenance(),
        world_size(),
        where.type,
        zero_stage,
        precision,
    )


def code_digest(folders: list[Path]) -> str:
    """Return 12 hex digits over the names and bytes of every Python file below the folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def _package_folder() -> Path:
    return Path(anycontrast.__file__).resolve().parent


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} comes with anycontrast"
    return Path(spec.origin).resolve().parent


def _commit(folder: Path) -> str:
    """The commit that an image wrote down, or of the working copy the package lies in."""
    written = folder / COMMIT_NAME
    if written.is_file():
        return written.read_text(encoding="utf-8").strip() or "unknown"
    # A virtual environment inside a working copy is not part of it.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    changed = _git(folder, "status", "--porcelain", "--", ".")
    return f"{commit}+changes" if changed else commit


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
