"""One job per run folder: a lock file that says who holds it and shows that it lives."""

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from anycontrast.training.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

_BEAT_S = 10.0
_SILENT_S = 60.0


class RunLock:
    """Hold `<folder>/run.lock` inside the block; rank 0 takes it for the whole job.

    A thread touches the file every ten seconds. A lock is taken over when its process is gone (same
    host) or when it has not been touched for a minute (another host, whose processes cannot be
    seen; a restart on another node waits that long). Of several jobs that find the same abandoned
    lock, one takes it over.

    Raises:
        CheckpointError: another job holds the folder.
    """

    def __init__(self, folder: Path, *, silent_s: float = _SILENT_S) -> None:
        self.path = folder / "run.lock"
        self._silent_s = silent_s
        self._facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_ticks(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._done = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create():
            holder = self._holder()
            if not self._is_abandoned(holder):
                holder = self._holder()
                raise CheckpointError(
                    f"run folder {self.path.parent} is in use by process {holder.get('pid')} on "
                    f"{holder.get('host')} since {holder.get('since')}; wait for it to end or "
                    "choose another name"
                )
            logger.warning(
                "taking over %s: process %s on %s is gone",
                self.path,
                holder.get("pid"),
                holder.get("host"),
            )
            if not (self._take_over(holder) or self._create()):
                raise CheckpointError(
                    f"another job took {self.path} at the same moment; wait for it to end or "
                    "choose another name"
                )
        self._beat = threading.Thread(target=self._touch, name="run-lock", daemon=True)
        self._beat.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._beat is not None:
            self._beat.join()
        if self._holder() == self._facts:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Link a finished file into place: the lock is never seen half written."""
        draft = self._draft()
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            logger.info("%s: no hard links here (%s), writing the lock itself", self.path, error)
            return self._create_in_place()
        finally:
            draft.unlink()
        return True

    def _create_in_place(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                json.dump(self._facts, file)
        except FileExistsError:
            return False
        return True

    def _take_over(self, abandoned: dict[str, Any]) -> bool:
        """Replace the abandoned lock, unless it is another's by now; one job at a time may."""
        claim = self.path.with_name("run.lock.claim")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            raise CheckpointError(
                f"another job is taking over {self.path} at the same moment; if there is none, "
                f"remove {claim}"
            ) from None
        try:
            if not self.path.exists() or self._holder() != abandoned:
                return False
            self._draft().replace(self.path)
        finally:
            claim.unlink()
        return True

    def _draft(self) -> Path:
        draft = self.path.with_name(f"run.lock.{socket.gethostname()}-{os.getpid()}")
        draft.write_text(json.dumps(self._facts), encoding="utf-8")
        return draft

    def _touch(self) -> None:
        while not self._done.wait(_BEAT_S):
            self.path.touch(exist_ok=True)

    def _holder(self) -> dict[str, Any]:
        try:
            holder: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return holder

    def _is_abandoned(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == socket.gethostname():
            started = _start_ticks(int(holder.get("pid", 0)))
            return started is None or started != holder.get("started")
        first = self._touched()
        if first is None:
            return True
        logger.warning("%s is held on another host; watching whether it lives", self.path)
        until = time.monotonic() + self._silent_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self._silent_s / 10))
            if self._touched() != first:
                return not self.path.exists()
        return True

    def _touched(self) -> int | None:
        return self.path.stat().st_mtime_ns if self.path.exists() else None


def _start_ticks(pid: int) -> str | None:
    """When the process started, so that a reused pid is not taken for the holder; None if gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
