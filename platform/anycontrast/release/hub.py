"""Pull a release from a folder or a URL into a local cache; nothing unverified becomes visible.

The cache is addressed by content: the folder's name ends with the manifest's digest, so a second
pull of the same release downloads its manifest only, and two releases never mix.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anycontrast.release.errors import ReleaseError, ReleaseNotFoundError
from anycontrast.release.files import MANIFEST, check_file, parse_manifest, verify_release

__all__ = ["PullConfig", "ReleaseError", "ReleaseNotFoundError", "pull", "verify_release"]

logger = logging.getLogger(__name__)

SCHEMES = ("file", "http", "https", "s3", "gs")
_MANIFEST_LIMIT_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """Where pulled releases go."""

    cache: str | None = None
    """Folder of the cache; None: $ANYCONTRAST_CACHE, else `anycontrast` in the user's cache."""
    max_bytes: int = 16 * 2**30
    """Largest release accepted, all files together."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"pull.max_bytes must be >= 1, got {self.max_bytes}")

    @property
    def cache_dir(self) -> Path:
        """The cache folder with the default filled in."""
        if self.cache is not None:
            return Path(self.cache)
        if named := os.environ.get("ANYCONTRAST_CACHE"):
            return Path(named)
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "anycontrast"


def pull(source: str, config: PullConfig | None = None) -> Path:
    """Fetch a release, verify every byte, and return its folder in the cache.

    Args:
        source: a release folder, or the URL of one (`https://`, `s3://`, `gs://`, `file://`).
        config: where the cache lies and how large a release may be.

    Raises:
        ReleaseNotFoundError: nothing there.
        ReleaseError: not a release, damaged, too large, or an unsupported scheme.
    """
    config = config or PullConfig()
    base = _base_url(source)
    data = _read_small(base, MANIFEST)
    manifest = parse_manifest(data, source)
    total_bytes = sum(entry["size"] for entry in manifest["files"].values())
    if total_bytes > config.max_bytes:
        raise ReleaseError(
            f"release {source}: {total_bytes} bytes, more than pull.max_bytes={config.max_bytes}; "
            "raise it if that is expected"
        )
    digest = hashlib.sha256(data).hexdigest()
    target = config.cache_dir / f"{_safe(str(manifest.get('name', 'release')))}-{digest[:16]}"
    if target.is_dir():
        try:
            verify_release(target)
            logger.info("already pulled and intact: %s", target)
            return target
        except ReleaseError as error:
            logger.warning("the cached copy is damaged and is fetched again: %s", error)
    return _download(base, data, manifest, target, source)


def _base_url(source: str) -> str:
    if "://" not in source:
        folder = Path(source)
        if not folder.is_dir():
            raise ReleaseNotFoundError(f"pull: no folder {source}")
        return folder.resolve().as_uri()
    scheme = source.split("://")[0]
    if scheme not in SCHEMES:
        raise ReleaseError(f"pull: scheme {scheme!r} is not one of {', '.join(SCHEMES)}: {source}")
    return source.rstrip("/")


def _open(base: str, name: str) -> Any:
    import fsspec

    return fsspec.open(f"{base}/{name}", "rb").open()


def _read_small(base: str, name: str) -> bytes:
    try:
        with _open(base, name) as stream:
            data: bytes = stream.read(_MANIFEST_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise ReleaseNotFoundError(f"no release at {base}: it has no {name}") from None
    except (OSError, ImportError, ValueError) as error:
        raise ReleaseError(f"pull: cannot read {base}/{name}: {error}") from error
    if len(data) > _MANIFEST_LIMIT_BYTES:
        raise ReleaseError(f"release {base}: {name} is larger than {_MANIFEST_LIMIT_BYTES} bytes")
    return data


def _download(
    base: str, manifest_bytes: bytes, manifest: dict[str, Any], target: Path, source: str
) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, entry in manifest["files"].items():
            _fetch(base, name, temporary / name, entry["size"], source)
            check_file(temporary / name, entry, source)
        (temporary / MANIFEST).write_bytes(manifest_bytes)
        if target.exists():
            shutil.rmtree(target)
        try:
            temporary.rename(target)
        except OSError:
            # Another process pulled the same release first; its copy is the same bytes.
            verify_release(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("pulled %s into %s", source, target)
    return target


def _fetch(base: str, name: str, path: Path, size: int, source: str) -> None:
    """Copy one file, never more than its announced size."""
    try:
        with _open(base, name) as stream, path.open("wb") as out:
            left = size + 1
            while left > 0 and (chunk := stream.read(min(_CHUNK_BYTES, left))):
                out.write(chunk)
                left -= len(chunk)
    except FileNotFoundError:
        raise ReleaseError(f"release {source}: {name} is listed but not there") from None
    except OSError as error:
        raise ReleaseError(f"pull: reading {name} of {source} failed: {error}") from error


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:64] or "release"
