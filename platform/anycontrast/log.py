"""Log set-up and progress: bars on a terminal, plain lines otherwise.

Messages are sentences about events; numbers go to `metrics.jsonl`. Handlers are set once, by the
command line or a recipe, never on import.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with (done, total); total may grow."""

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


def setup_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Log to stderr: rank 0 at `level`, other ranks from WARNING on, each line with its rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s [rank %(rank)d] %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if getattr(h, "is_anycontrast", False)]:
        root.removeHandler(old)
    handler.is_anycontrast = True  # type: ignore[attr-defined]
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
    start_s = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TextColumn(unit), Remaining(), console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last_s = [start_s]

    def plain(done: int, total: int) -> None:
        now_s = time.monotonic()
        if done < total and now_s - last_s[0] < _PLAIN_INTERVAL_S:
            return
        last_s[0] = now_s
        rate = done / max(now_s - start_s, 1e-9)
        left_s = (total - done) / rate if rate > 0 else float("inf")
        logger.info(
            "%s: %d of %d %s, %.1f a second, %.0f s left",
            description,
            done,
            total,
            unit,
            rate,
            left_s,
        )

    yield plain
