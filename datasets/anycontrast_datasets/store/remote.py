"""Bytes of a store behind `s3://`, `gs://` or `https://`: ranged requests, retried, kept in bounds.

Every request has a time limit; what may pass by itself (5xx, resets, stalls, short bodies) is tried
again at most five times within a minute, with exponential back-off and jitter; 401, 403 and 404
fail at once. A web server may redirect within itself only, and its answer is not read beyond the
bytes that were asked for. No error shows a password or the query of a signed address.

The file system object (fsspec's, with its own thread) is made on first use in each process, so a
source may be forked and pickled.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from anycontrast_datasets.store.byte_source import UNREACHABLE, Location, check_name, too_large
from anycontrast_datasets.study import ShardError

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_EXTRAS = {"s3": "s3", "gs": "gcs"}
_PASSING_STATUS = frozenset({408, 425, 429})
_NOT_PASSING = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}
)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long a source keeps asking."""

    tries: int = 5
    """Requests for one range, the first included."""
    first_wait_s: float = 0.2
    """Wait before the second try; doubles with each, times a random 0.5 .. 1.5."""
    request_s: float = 30.0
    """Limit of one request."""
    total_s: float = 60.0
    """Limit of all tries of one range, waits included."""


class RemoteSource:
    """A folder of an object store or web server.

    Args:
        location: Address that passed `parse_location`.
        policy: When to give up.
    """

    is_local = False

    def __init__(self, location: Location, policy: RetryPolicy | None = None) -> None:
        self._location = location
        self._policy = policy or RetryPolicy()
        self._system: Any = None
        self._owner = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_location": self._location, "_policy": self._policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_location"], state["_policy"])  # type: ignore[misc]

    @property
    def shown(self) -> str:
        """The address without secrets."""
        return self._location.shown

    @property
    def tries(self) -> int:
        """See `ByteSource.tries`."""
        return self._policy.tries

    def read(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        unit: tuple[int, int] | None = None,
        again: bool = False,
    ) -> memoryview:
        """See `ByteSource.read`; one request.

        Raises:
            ShardError: Of code `store_unreachable` after the last try.
        """

        def ask(limit_s: float) -> memoryview:
            content = self._get(name, start, stop, limit_s)
            if len(content) != stop - start:
                raise ShortAnswer(f"got {len(content)} of {stop - start} bytes")
            return memoryview(content)

        try:
            return self._retried(f"bytes {start} to {stop} of {name}", ask)
        except FileNotFoundError:
            raise ShardError(
                f"{name} is missing from {self.shown}; copy it there again", code=UNREACHABLE
            ) from None

    def read_all(self, name: str, max_bytes: int) -> bytes:
        """See `ByteSource.read_all`."""

        def ask(limit_s: float) -> bytes:
            return self._get(name, 0, max_bytes + 1, limit_s)

        content = self._retried(name, ask)
        if len(content) > max_bytes:
            raise too_large(f"{self.shown}/{name}", len(content), max_bytes)
        return content

    def size(self, name: str) -> int:
        """See `ByteSource.size`."""

        def ask(limit_s: float) -> int:
            found = self._call("info", self._path(name), limit_s)["size"]
            if found is None:
                raise ShardError(f"{self.shown} does not tell the size of {name}", code=UNREACHABLE)
            return int(found)

        return self._retried(f"the size of {name}", ask)

    def close(self) -> None:
        """Forget the file system; the next read makes another."""
        self._system = None

    def _path(self, name: str) -> str:
        query = f"?{self._location.query}" if self._location.query else ""
        return f"{self._location.base}/{check_name(name)}{query}"

    def _get(self, name: str, start: int, stop: int, limit_s: float) -> bytes:
        content: bytes = self._call("cat_file", self._path(name), limit_s, start=start, end=stop)
        return content

    def _call(self, method: str, path: str, limit_s: float, **options: int) -> Any:
        system = self._file_system()
        if system.async_impl:
            return getattr(system, method)(path, timeout=limit_s, **options)
        return getattr(system, method)(path, **options)

    def _file_system(self) -> Any:
        # Two threads may each make one, and that of the last is kept: a lock of ours could be held
        # for ever in a process forked meanwhile.
        system = self._system
        if system is None or self._owner != os.getpid():
            system = _make_file_system(self._location, self._policy)
            self._system, self._owner = system, os.getpid()
        return system

    def _retried(self, what: str, ask: Callable[[float], _Result]) -> _Result:
        policy, started = self._policy, time.monotonic()
        for attempt in range(1, policy.tries + 1):
            left_s = policy.total_s - (time.monotonic() - started)
            try:
                return ask(max(min(policy.request_s, left_s), 0.001))
            except (FileNotFoundError, ShardError):
                raise
            except Exception as error:
                # Each kind of storage has errors of its own, with no common base.
                brief, passing = self._brief(error), _is_passing(error)
            wait_s = policy.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            spent_s = time.monotonic() - started
            if not passing or attempt == policy.tries or spent_s + wait_s >= policy.total_s:
                raise ShardError(
                    f"reading {what} from {self.shown} failed ({brief}) after {attempt} tries in "
                    f"{spent_s:.1f} s; {_remedy(passing)}",
                    code=UNREACHABLE,
                ) from None
            logger.warning("%s: %s: %s; trying again", self.shown, what, brief)
            time.sleep(wait_s)
        raise AssertionError("the loop returns or raises")

    def _brief(self, error: Exception) -> str:
        text = " ".join(str(error).split())
        for secret in self._secrets():
            text = text.replace(secret, "...")
        text = re.sub(r"(?<=://)[^/@\s]*@", "", text)
        text = re.sub(r"(?<=[\w/])\?[^\s'\")]*", "", text)
        return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__

    def _secrets(self) -> list[str]:
        from urllib.parse import unquote, urlsplit

        parts = urlsplit(self._location.base)
        found = [self._location.query, parts.password or "", parts.netloc.rpartition("@")[0]]
        return [form for secret in found if secret for form in (secret, unquote(secret))]


class ShortAnswer(OSError):
    """A server sent fewer bytes than were asked for."""


def _make_file_system(location: Location, policy: RetryPolicy) -> Any:
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    if location.scheme in ("http", "https"):
        options["get_client"] = _web_client
        options["encoded"] = "%" in location.base + location.query
    if location.scheme == "s3":
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": policy.request_s,
            "read_timeout": policy.request_s,
        }
    try:
        system = fsspec.filesystem(location.scheme, **options)
    except ImportError as error:
        extra = _EXTRAS.get(location.scheme, "")
        raise ShardError(
            f"opening shards: {location.scheme}:// needs another library ({error}); "
            f"`pip install 'anycontrast[{extra}]'`"
        ) from error
    if location.scheme == "s3":
        system.retries = 1  # Ours are the only retries, so that their number and time hold.
    return system


async def _web_client(**options: Any) -> Any:
    """Make an aiohttp session that stays on its server and reads no more than was asked for."""
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    trace.on_request_end.append(_check_answer)
    return aiohttp.ClientSession(trace_configs=[trace], **options)


async def _check_redirect(session: Any, context: Any, parameters: Any) -> None:
    from urllib.parse import urljoin, urlsplit

    response = parameters.response
    target = response.headers.get("Location") or response.headers.get("URI") or ""
    here = urlsplit(str(parameters.url))
    there = urlsplit(urljoin(str(parameters.url), target))
    if (here.scheme, here.hostname, here.port) != (there.scheme, there.hostname, there.port):
        raise ShardError(
            f"reading shards: {here.hostname} sends us on to {there.scheme}://{there.hostname}, "
            "and only redirects within one server are followed; open the other address yourself "
            "if you trust it",
            code=UNREACHABLE,
        )


async def _check_answer(session: Any, context: Any, parameters: Any) -> None:
    """Refuse a body larger than the range that was asked for before it is read."""
    response = parameters.response
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", parameters.headers.get("Range", ""))
    if asked is None or response.status not in (200, 206):
        return
    most = int(asked[2]) - int(asked[1]) + 1
    length = response.headers.get("Content-Length", "")
    if response.status == 206 and length.isdigit() and int(length) <= most:
        return
    if response.status == 200 and length.isdigit() and int(length) <= most and asked[1] == "0":
        return
    raise ShardError(
        f"reading shards: the server of {response.url.path} answered a request for {most} bytes "
        f"with status {response.status} and {length or 'an unknown number of'} bytes; it must "
        "serve byte ranges (most web servers do, `python -m http.server` does not)",
        code=UNREACHABLE,
    )


def _is_passing(error: BaseException) -> bool:
    """Say whether the same request may go well in a moment."""
    if isinstance(error, (PermissionError, ImportError, TypeError, AttributeError)):
        return False
    if type(error).__name__ in _NOT_PASSING:
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in _PASSING_STATUS


def _status(error: BaseException) -> int | None:
    """Find the HTTP status in an error of aiohttp, botocore or gcsfs, or in its cause."""
    response = getattr(error, "response", None)
    found = getattr(error, "status", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif type(error).__module__.startswith("gcsfs"):
        found = getattr(error, "code", None)  # Elsewhere a code may be a parser's own.
    if isinstance(found, int):
        return found
    return _status(error.__cause__) if error.__cause__ is not None else None


def _remedy(passing: bool) -> str:
    if passing:
        return "check the network and the server, then run again"
    return "check the address and your access"
