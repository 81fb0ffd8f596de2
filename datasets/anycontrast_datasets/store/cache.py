"""A bounded cache of a remote store on a node's own disk, shared by all processes of the node.

One entry is the byte range of one study of one shard, named by the shard's sha256, so data sets
never mix and a changed shard is never served from here. One process downloads an entry while the
others wait for it (a file lock); entries get their name when they are whole; the least recently
used go first when the limit is reached. Nothing is deleted but files of our own pattern in a folder
that carries our mark. A disk that fills up costs speed and never data: one warning, then reads go
past the cache. Readers check every byte they get; an entry that proves wrong is fetched again.

Gives up: a limit that holds to the byte while a process is killed (its part is counted again when
the next one opens the cache), and sharing one folder between nodes.
"""

import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from anycontrast_datasets.store.byte_source import ByteSource
from anycontrast_datasets.store.slots import recycled_bytes
from anycontrast_datasets.study import ShardError

logger = logging.getLogger(__name__)

FOLDER = "anycontrast-shards-v1"
MARK = "this-folder-is-a-cache-of-anycontrast"
_USAGE = "usage"
_ENTRY = re.compile(r"[0-9a-f]{40}-[0-9a-f]{1,13}-[0-9a-f]{1,13}\.bytes")
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{40}-([0-9a-f]{1,13})-([0-9a-f]{1,13})-\d{1,10}-\d{1,20}")
_NUM_LOCKS = 256
_KEPT_AFTER_EVICTION = 0.9
_ABANDONED_S = 3600.0
"""What a killed process was writing is removed once nobody can still be writing it."""
_PAUSE_S = 60.0
"""Without the disk after it was full."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where a node keeps what it fetched from a remote store."""

    folder: str | None = None
    """Folder on a disk of the node; None fetches every study anew."""
    max_bytes: int = 50 * 2**30
    """Limit of all entries together; at least one study must fit."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"cache.max_bytes must be >= 1, got {self.max_bytes}")
        if self.folder is not None and not self.folder.strip():
            raise ValueError("cache.folder must name a folder or be null, got an empty name")


class CachedSource:
    """A source whose byte ranges are kept on disk.

    Args:
        source: The origin.
        config: Where and how much; `folder` must be set.
        hashes: sha256 of every file whose ranges may be kept; others are read through.
        largest_bytes: Largest range that will be asked for as a unit.

    Raises:
        ShardError: If the folder cannot be used, is not a cache of ours, or the limit is below
            `largest_bytes`.
    """

    def __init__(
        self,
        source: ByteSource,
        config: CacheConfig,
        hashes: Mapping[str, str],
        largest_bytes: int,
    ) -> None:
        assert config.folder is not None
        if config.max_bytes < largest_bytes:
            raise ShardError(
                f"cache.max_bytes={config.max_bytes} is below the {largest_bytes} bytes of the "
                "largest study; raise it to hold at least the studies of a few steps, or set "
                "cache.folder=null"
            )
        self._source = source
        self._hashes = dict(hashes)
        self._max_bytes = config.max_bytes
        self._root = Path(config.folder).expanduser() / FOLDER
        self._paused_until = 0.0
        self._has_warned = False
        self._open_folder()

    is_local = False

    @property
    def shown(self) -> str:
        """The origin."""
        return self._source.shown

    @property
    def tries(self) -> int:
        """One more than the origin deserves: the first answer may be a damaged entry."""
        return self._source.tries + 1

    def read(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        unit: tuple[int, int] | None = None,
        again: bool = False,
    ) -> memoryview:
        """See `ByteSource.read`; from the disk if it is there, else fetched as a whole `unit`."""
        first, end = unit or (start, stop)
        assert first <= start <= stop <= end, (unit, start, stop)
        if name not in self._hashes or time.monotonic() < self._paused_until:
            return self._source.read(name, start, stop, again=again)
        path = self._path(name, first, end)
        found = None if again else _read_entry(path, start - first, stop - first, end - first)
        if found is not None:
            return found
        try:
            with self._locked(f"lock-{crc32(path.name.encode()) % _NUM_LOCKS:03d}"):
                if again:
                    self._drop(path, end - first)
                else:
                    found = _read_entry(path, start - first, stop - first, end - first)
                    if found is not None:
                        return found
                content = self._source.read(name, first, end, again=again)
                self._keep(path, content)
        except OSError as error:
            self._pause(error)
            return self._source.read(name, start, stop, again=again)
        return content[start - first : stop - first]

    def read_all(self, name: str, max_bytes: int) -> bytes:
        """See `ByteSource.read_all`; never kept."""
        return self._source.read_all(name, max_bytes)

    def size(self, name: str) -> int:
        """See `ByteSource.size`."""
        return self._source.size(name)

    def close(self) -> None:
        """Close the origin; what is on disk stays for the next run."""
        self._source.close()

    def _path(self, name: str, start: int, stop: int) -> Path:
        digest = self._hashes[name][:40]
        return self._root / digest[:2] / f"{digest}-{start:x}-{stop:x}.bytes"

    def _open_folder(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            if not (self._root / MARK).exists():
                if any(self._root.iterdir()) and not (self._root / MARK).exists():
                    raise ShardError(
                        f"cache.folder: {self._root} holds files but not the mark of a cache of "
                        "ours, so nothing in it may be deleted; choose another folder"
                    )
                (self._root / MARK).touch()
            with self._locked(_USAGE) as handle:
                _write_usage(handle, self._scan()[0])
        except OSError as error:
            raise ShardError(
                f"cache.folder: cannot use {self._root} ({error.strerror or error}); choose a "
                "folder that this user can write, or set cache.folder=null"
            ) from error

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        handle = os.open(self._root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            # Said aloud, for a process forked meanwhile holds the same lock by its copy.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _keep(self, path: Path, content: memoryview) -> None:
        """Make room, then write the entry; on failure nothing of it stays and nothing is lost."""
        temporary = self._root / f".tmp-{path.stem}-{os.getpid()}-{time.monotonic_ns()}"
        try:
            with self._locked(_USAGE) as handle:
                used = _read_usage(handle) + len(content)
                if used > self._max_bytes:
                    used = self._evict(len(content)) + len(content)
                temporary.touch()
                _write_usage(handle, used)
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            self._drop(temporary, len(content))
            self._pause(error)

    def _drop(self, path: Path, num_bytes: int) -> None:
        with self._locked(_USAGE) as handle:
            if path.exists():
                path.unlink()
                _write_usage(handle, max(_read_usage(handle) - num_bytes, 0))

    def _evict(self, wanted_bytes: int) -> int:
        """Delete the least recently used until there is room; return the bytes that are left."""
        used, entries = self._scan()
        goal = min(_KEPT_AFTER_EVICTION * self._max_bytes, self._max_bytes - wanted_bytes)
        num_evicted = 0
        for _, num_bytes, path in sorted(entries):
            if used <= goal:
                break
            path.unlink(missing_ok=True)
            used -= num_bytes
            num_evicted += 1
        logger.info("cache %s: evicted %d entries, %d bytes left", self._root, num_evicted, used)
        return used

    def _scan(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """List the entries as (last use in ns, bytes, path); remove what killed processes left.

        The sum also counts what is being written, at the size it will have.
        """
        entries, num_pending = [], 0
        for folder in sorted(self._root.iterdir()):
            if match := _TEMPORARY.fullmatch(folder.name):
                num_pending += 0 if _is_abandoned(folder) else int(match[2], 16) - int(match[1], 16)
            if len(folder.name) != 2 or folder.is_symlink() or not folder.is_dir():
                continue
            for path in folder.iterdir():
                if _ENTRY.fullmatch(path.name):
                    try:
                        status = path.lstat()
                    except FileNotFoundError:
                        continue
                    entries.append((status.st_mtime_ns, status.st_size, path))
        return num_pending + sum(num_bytes for _, num_bytes, _ in entries), entries

    def _pause(self, error: OSError) -> None:
        self._paused_until = time.monotonic() + _PAUSE_S
        if self._has_warned:
            return
        self._has_warned = True
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error
        logger.warning(
            "cache %s: %s; reading past the cache, slower but nothing is lost; free some space or "
            "lower cache.max_bytes",
            self._root,
            reason,
        )


def _read_entry(path: Path, start: int, stop: int, num_bytes: int) -> memoryview | None:
    """Return a part of an entry and mark it as used; None if there is none of the right size."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(handle).st_size != num_bytes:
            return None
        os.utime(handle)
        content = recycled_bytes(stop - start).data
        if os.preadv(handle, [content], start) != len(content):
            return None
        return content
    except OSError:
        return None
    finally:
        os.close(handle)


def _is_abandoned(path: Path) -> bool:
    """Remove what a killed process was writing long ago; say whether it was removed."""
    try:
        if time.time() - path.lstat().st_mtime <= _ABANDONED_S:
            return False
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return True


def _read_usage(handle: int) -> int:
    text = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdigit() else 0


def _write_usage(handle: int, num_bytes: int) -> None:
    os.pwrite(handle, f"{num_bytes:<31}\n".encode(), 0)
