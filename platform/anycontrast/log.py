"""Log set-up and progress: bars on a terminal, plain lines otherwise.

Messages are sentences about events; numbers go to `metrics.jsonl`. Handlers are set once, by the
command line or a recipe, never on import.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with (done, total); total may grow. A lower `done` than before begins another phase."""

_PLAIN_INTERVAL_S = 5.0
_RATE_WINDOW_S = 60.0
# Libraries that announce every action at INFO.
_CHATTY = ("ray", "DeepSpeed", "fsspec", "aiobotocore", "botocore", "matplotlib", "PIL", "urllib3")


class _RankFilter(logging.Filter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self.rank
        return True


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is now: while a bar is shown, that prints lines above it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignore the stream the base class remembers."""


def setup_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Log to stderr: rank 0 at `level`, other ranks from WARNING on, each line with its rank."""
    handler = _CurrentStderr()
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s [rank %(rank)d] %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _CurrentStderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level if rank == 0 else logging.WARNING)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def progress(description: str, unit: str) -> Iterator[OnProgress]:
    """Yield a callback that shows how far a long stage is, how fast, and how long it still takes.

    Args:
        description: what is being done, e.g. `sharding`.
        unit: what is counted, plural, e.g. `studies`.
    """
    if not sys.stderr.isatty():
        yield _PlainProgress(description, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    texts = (TextColumn(unit), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, *texts, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, speed="")
        rate, last_done = _Rate(), 0

        def show(done: int, total: int) -> None:
            nonlocal last_done
            if done < last_done:
                bar.reset(task)
            last_done = done
            bar.update(task, completed=done, total=total, speed=_speed(rate(done), done, total))

        yield show


class _Rate:
    """Items a second over the last minute: what was there already does not count for long."""

    def __init__(self) -> None:
        self._seen = deque([(time.monotonic(), 0)])

    def __call__(self, done: int) -> float:
        now_s = time.monotonic()
        if done < self._seen[-1][1]:
            self._seen = deque([(now_s, done)])
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - _RATE_WINDOW_S:
            self._seen.popleft()
        first_s, first = self._seen[0]
        return (done - first) / max(now_s - first_s, 1e-9)


def _speed(rate: float, done: int, total: int) -> str:
    left_s = (total - done) / rate if rate > 0 else 0.0
    return f"{rate:.1f} a second" + (f", about {left_s:.0f} s left" if left_s > 0 else "")


class _PlainProgress:
    """A line every few seconds and one at the end of each phase."""

    def __init__(self, description: str, unit: str) -> None:
        self.description, self.unit = description, unit
        self._rate, self._last_s = _Rate(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now_s, rate = time.monotonic(), self._rate(done)
        if done < total and now_s - self._last_s < _PLAIN_INTERVAL_S:
            return
        self._last_s = now_s
        logger.info(
            "%s: %d of %d %s, %s",
            self.description,
            done,
            total,
            self.unit,
            _speed(rate, done, total),
        )
