"""Log set-up and progress: bars on a terminal, plain lines otherwise.

Messages are sentences about events; numbers go to `metrics.jsonl`. Handlers are set once, by the
command line or a recipe, never on import.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with (done, total); total may grow. A lower `done` than before begins another phase."""

_PLAIN_INTERVAL_S = 5.0
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
    """Yield a callback that shows how far a long stage is.

    Args:
        description: what is being done, e.g. `sharding`.
        unit: what is counted, plural, e.g. `studies`.
    """
    if not sys.stderr.isatty():
        yield _PlainProgress(description, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn(unit), Remaining(), console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None)
        last_done = 0

        def show(done: int, total: int) -> None:
            nonlocal last_done
            if done < last_done:
                bar.reset(task)
            last_done = done
            bar.update(task, completed=done, total=total)

        yield show


class _PlainProgress:
    """A line every few seconds and one at the end of each phase."""

    def __init__(self, description: str, unit: str) -> None:
        self.description, self.unit = description, unit
        self._start_s = self._last_s = time.monotonic()
        self._last_done = 0

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done < self._last_done:
            self._start_s = now_s
        self._last_done = done
        if done < total and now_s - self._last_s < _PLAIN_INTERVAL_S:
            return
        self._last_s = now_s
        rate = done / max(now_s - self._start_s, 1e-9)
        left = f", about {(total - done) / rate:.0f} s left" if 0 < done < total else ""
        logger.info(
            "%s: %d of %d %s, %.1f a second%s",
            self.description,
            done,
            total,
            self.unit,
            rate,
            left,
        )
