"""Where the bytes of a store come from: one small protocol, and a local folder behind it.

A store names its files and byte ranges; a source hands over the bytes or says in one line why not.
`LocalSource` is here, object stores and web servers are in `remote.py`, the bounded cache in front
of them in `cache.py`. What may be opened at all is decided by `parse_location` before anything is:
an allow-list of schemes, plain http for this machine only, and no name that leaves the store.
"""

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from anycontrast_datasets.store.slots import recycled_bytes
from anycontrast_datasets.study import ShardError

SCHEMES = ("file", "s3", "gs", "https", "http", "memory")
UNREACHABLE = "store_unreachable"
"""Code of a ShardError that blames the way to the bytes, not the bytes."""
_ADVICE_BYTES = 2**17
"""Asked for at a time: of a longer range the kernel fetches its read-ahead only, often this."""
_PROBE_BYTES = 2**21
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}(/[A-Za-z0-9_.-]{1,128}){0,15}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_LOST_SLASH = re.compile(r"(file|s3|gs|https?|memory):/[^/]")


@dataclass(frozen=True)
class Location:
    """An address that passed the allow-list."""

    scheme: str
    """One of `SCHEMES`, or empty for a plain path."""
    base: str
    """Folder of the store without a slash at the end. May hold a password: never show it."""
    query: str
    """Of a signed web address, put behind every file's name. Secret: never show it."""
    shown: str
    """What messages and logs may say."""

    @property
    def is_local(self) -> bool:
        """Whether the store lies in a folder of this machine."""
        return self.scheme in ("", "file")


class ByteSource(Protocol):
    """Files of one store by name. Every method may be called from many threads."""

    @property
    def shown(self) -> str:
        """The place as messages may name it, without any secret."""

    @property
    def is_local(self) -> bool:
        """Whether a second request costs next to nothing, and asking again changes nothing."""

    @property
    def tries(self) -> int:
        """How often bytes that proved wrong are worth asking for in all."""

    def read(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        unit: tuple[int, int] | None = None,
        again: bool = False,
    ) -> memoryview:
        """Return exactly the bytes `start` .. `stop` of a file.

        Args:
            name: File of the store.
            start: First byte.
            stop: Past the last byte.
            unit: Range around it that a cache should keep as one piece.
            again: What came before was wrong; take it from the origin.

        Raises:
            ShardError: If the bytes cannot be had whole.
        """

    def read_all(self, name: str, max_bytes: int) -> bytes:
        """Return a whole file of at most `max_bytes`; FileNotFoundError if it is not there."""

    def size(self, name: str) -> int:
        """Return a file's size in bytes; FileNotFoundError if it is not there."""

    def close(self) -> None:
        """Release what is held open."""


def parse_location(location: Path | str) -> Location:
    """Check an address and take it apart; opens nothing.

    Raises:
        ShardError: If the scheme is not one of `SCHEMES`, the address is plain http to another
            machine, or it is no folder of one store.
    """
    text = str(location)
    match = _SCHEME.match(text)
    if match is None:
        return Location("", text, "", text)
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise ShardError(
            f"opening shards: scheme {scheme + ':'!r} is not one of {', '.join(SCHEMES)}; use one "
            "of them, or a folder (write ./ before a folder's name that holds a colon)"
        )
    if _LOST_SLASH.match(text):
        raise ShardError(
            f"opening shards: a {scheme} address begins with {scheme}://, this one has lost a "
            "slash; hand it on as text, not as a path"
        )
    parts = urlsplit(text)
    shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    if parts.fragment or "::" in parts.path or (parts.query and scheme not in ("http", "https")):
        raise ShardError(
            f"opening shards: the address {shown} must be that of one folder, without # or :: "
            "parts, and with a ? part only for https; give the folder's own address"
        )
    if scheme == "http" and not _is_loopback(parts.hostname or ""):
        raise ShardError(
            f"opening shards: {shown} is plain http, which anyone on the way can change; use "
            "https (http is for this machine only)"
        )
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ShardError(f"opening shards: {shown} names another machine; mount its folder")
        return Location(scheme, unquote(parts.path), "", unquote(parts.path))
    if scheme in ("s3", "gs") and ("@" in parts.netloc or not parts.netloc):
        raise ShardError(
            f"opening shards: {shown} must be {scheme}://bucket/folder; keys belong into the "
            "environment or the credentials file, not into the address"
        )
    base = f"{scheme}://{parts.netloc}{parts.path}".rstrip("/")
    return Location(scheme, base, parts.query, shown)


def check_name(name: str) -> str:
    """Return a file name of a store, or refuse one that could lead out of it.

    Raises:
        ShardError: If it is absolute, has `..` or anything but `A-Z a-z 0-9 _ . - /`.
    """
    if not _NAME.fullmatch(name) or any(part.strip(".") == "" for part in name.split("/")):
        raise ShardError(
            f"reading shards: {name[:80]!r} is no file name of a store (letters, digits, _ . - "
            "and no way out of the folder); the tables beside the shards are damaged or hostile"
        )
    return name


class LocalSource:
    """A folder of this machine, read with `pread`.

    A file is opened for each read (5 us), so no position and no descriptor is shared, and a fork
    or a pickle of it needs no care.
    """

    is_local = True
    tries = 1

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def shown(self) -> str:
        """The folder."""
        return str(self.root)

    def read(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        unit: tuple[int, int] | None = None,
        again: bool = False,
    ) -> memoryview:
        """See `ByteSource.read`; `unit` and `again` make no difference here."""
        path = self.root / check_name(name)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"cannot open {path} ({error.strerror})") from error
        try:
            return _pread(handle, start, stop)
        except OSError as error:
            raise ShardError(f"cannot read {path} ({error.strerror})") from error
        finally:
            os.close(handle)

    def announce(self, name: str, start: int, stop: int) -> None:
        """Ask the kernel to fetch a range from the disk while something else is being done."""
        try:
            handle = os.open(self.root / check_name(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # The read itself will say what is wrong.
        try:
            if _is_cached(handle, start, stop):
                return
            for first in range(start, stop, _ADVICE_BYTES):
                size = min(_ADVICE_BYTES, stop - first)
                os.posix_fadvise(handle, first, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # As above.
        finally:
            os.close(handle)

    def read_all(self, name: str, max_bytes: int) -> bytes:
        """See `ByteSource.read_all`."""
        path = self.root / check_name(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        if path.stat().st_size > max_bytes:
            raise too_large(f"{path}", path.stat().st_size, max_bytes)
        return path.read_bytes()

    def size(self, name: str) -> int:
        """See `ByteSource.size`."""
        path = self.root / check_name(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        return path.stat().st_size

    def close(self) -> None:
        """Nothing is held open."""


def too_large(shown: str, num_bytes: int, max_bytes: int) -> ShardError:
    """Return the error for a table that is larger than any real one."""
    return ShardError(
        f"opening shards: {shown} has {num_bytes} bytes, more than the {max_bytes} that such a "
        "file may have; it is damaged or not ours"
    )


def _pread(handle: int, start: int, stop: int) -> memoryview:
    """Read a byte range whole; a file that ends inside it is an error."""
    content = recycled_bytes(stop - start).data
    done = 0
    while done < len(content):
        got = os.preadv(handle, [content[done:]], start + done)
        if got == 0:
            raise ShardError(
                f"needs bytes {start} to {stop}, the shard ends at {start + done}; it was cut "
                "after it was written"
            )
        done += got
    return content


def _is_cached(handle: int, start: int, stop: int) -> bool:
    """Say whether a range lies in the file cache, going by a byte in every 2 MiB and the last."""
    byte = bytearray(1)
    try:
        for at in (*range(start, stop, _PROBE_BYTES), stop - 1):
            os.preadv(handle, [byte], at, os.RWF_NOWAIT)
    except OSError:  # Not there yet, or a file system that cannot say.
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
