"""Pull a release from a folder or a URL into a local cache; nothing unverified becomes visible.

The cache is addressed by content: the folder's name ends with the manifest's digest, so a second
pull of the same release downloads its manifest only, and two releases never mix. Gives up: resuming
a broken download; the next pull starts that release over.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
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
_CONNECT_TIMEOUT_S = 30
_READ_TIMEOUT_S = 60
# What a killed pull leaves behind is removed once nobody can still be writing it.
_ABANDONED_S = 24 * 3600


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
            return Path(self.cache).expanduser()
        if named := os.environ.get("ANYCONTRAST_CACHE"):
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "anycontrast"


def pull(source: str, config: PullConfig | None = None) -> Path:
    """Fetch a release, verify every byte, and return its folder in the cache.

    Args:
        source: a release folder, or the URL of one (`https://`, `s3://`, `gs://`, `file://`).
        config: where the cache lies and how large a release may be.

    Raises:
        ReleaseNotFoundError: nothing there, or nobody answers.
        ReleaseError: not a release, damaged, too large, or an unsupported scheme.
    """
    config = config or PullConfig()
    base = _base_url(source)
    shown = _without_password(source)
    data = _read_manifest(base, shown)
    manifest = parse_manifest(data, shown)
    total_bytes = sum(entry["size"] for entry in manifest["files"].values())
    if total_bytes > config.max_bytes:
        raise ReleaseError(
            f"release {shown}: {total_bytes} bytes, more than pull.max_bytes={config.max_bytes}; "
            "raise it if that is expected"
        )
    digest = hashlib.sha256(data).hexdigest()
    target = config.cache_dir / f"{_safe(str(manifest.get('name', 'release')))}-{digest[:16]}"
    if target.is_dir():
        if _is_intact(target):
            logger.info("reused %s: pulled before and intact", target)
            return target
        logger.warning("the cached copy in %s is damaged and is fetched again", target)
    _prepare_cache(config.cache_dir, total_bytes)
    return _download(base, data, manifest, target, shown)


def _base_url(source: str) -> str:
    if "://" not in source:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise ReleaseNotFoundError(f"pull: no folder {source}; check the path")
        if not (folder / MANIFEST).is_file():
            verify_release(folder)  # Raises, and knows what to suggest.
        return f"file://{folder.resolve()}"  # Not as_uri(): fsspec takes %20 literally.
    scheme = source.split("://")[0]
    if scheme not in SCHEMES:
        raise ReleaseError(
            f"pull: scheme {scheme!r} is not one of {', '.join(SCHEMES)}; use one of them or a "
            "local folder"
        )
    if "?" in source or "#" in source:
        raise ReleaseError(
            "pull: the URL must be that of the release's folder, without ? or # parts, since "
            "several files are read below it"
        )
    return source.rstrip("/")


def _without_password(source: str) -> str:
    return re.sub(r"(?<=://)[^/@]*@", "", source)


def _open(base: str, name: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if base.startswith(("http://", "https://")):
        import aiohttp

        # The library's own limit is on the whole transfer, which cuts large weights off.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S
        )
        options["client_kwargs"] = {"timeout": timeout}
    # Not fsspec.open(): that takes `::` in an address for a chain of file systems of any scheme.
    return fsspec.filesystem(base.split("://")[0], **options).open(f"{base}/{name}", "rb")


def _read_manifest(base: str, shown: str) -> bytes:
    try:
        with _open(base, MANIFEST) as stream:
            data: bytes = stream.read(_MANIFEST_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise ReleaseNotFoundError(
            f"no release at {shown}: it has no {MANIFEST}; check the address"
        ) from None
    except ImportError as error:
        raise ReleaseError(
            f"pull: {shown.split('://')[0]}:// needs another library ({error}); "
            "`pip install 'anycontrast[s3]'` or `'anycontrast[gcs]'`"
        ) from error
    except Exception as error:
        # Each kind of storage has errors of its own, with no common base.
        raise ReleaseNotFoundError(
            f"pull: nothing to read at {shown}/{MANIFEST} ({_brief(error)}); check the address, "
            "the network and your access"
        ) from error
    if len(data) > _MANIFEST_LIMIT_BYTES:
        raise ReleaseError(
            f"release {shown}: {MANIFEST} is larger than {_MANIFEST_LIMIT_BYTES} bytes; this is "
            "not a release"
        )
    return data


def _brief(error: Exception) -> str:
    text = " ".join(_without_password(str(error)).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _is_intact(folder: Path) -> bool:
    try:
        verify_release(folder)
    except ReleaseError as error:
        logger.warning("%s", error)
        return False
    return True


def _prepare_cache(cache: Path, wanted_bytes: int) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    for path in cache.glob(".*-*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > _ABANDONED_S:
            logger.info("removing %s, left by a pull that did not finish", path)
            shutil.rmtree(path, ignore_errors=True)
    free_bytes = shutil.disk_usage(cache).free
    if free_bytes < wanted_bytes:
        raise ReleaseError(
            f"pull: the release has {wanted_bytes} bytes, {free_bytes} are free in {cache}; free "
            "some, or set pull.cache to another folder"
        )


def _download(
    base: str, manifest_bytes: bytes, manifest: dict[str, Any], target: Path, shown: str
) -> Path:
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, entry in manifest["files"].items():
            _fetch(base, name, temporary / name, entry["size"], shown)
            check_file(temporary / name, entry, shown)
        (temporary / MANIFEST).write_bytes(manifest_bytes)
        temporary.chmod(0o755)
        _place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("pulled %s into %s", shown, target)
    return target


def _place(temporary: Path, target: Path) -> None:
    """Rename into the cache, unless another process pulled the same bytes meanwhile."""
    if target.is_dir():
        if _is_intact(target):
            return
        shutil.rmtree(target)
    try:
        temporary.rename(target)
    except OSError:
        verify_release(target)


def _fetch(base: str, name: str, path: Path, size: int, shown: str) -> None:
    """Copy one file, never more than its announced size and one byte."""
    try:
        with _open(base, name) as stream, path.open("wb") as out:
            left = size + 1
            while left > 0 and (chunk := stream.read(min(_CHUNK_BYTES, left))):
                out.write(chunk)
                left -= len(chunk)
            out.flush()
            os.fsync(out.fileno())
    except FileNotFoundError:
        raise ReleaseError(
            f"release {shown}: {name} is listed but not there; ask who published it"
        ) from None
    except Exception as error:
        raise ReleaseError(
            f"pull: reading {name} of {shown} failed ({_brief(error)}); nothing was kept, pull "
            "again"
        ) from error


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:64] or "release"
