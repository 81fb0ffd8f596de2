"""Stopping on request: SIGTERM, or whoever runs the training asks for it.

Cluster schedulers send SIGTERM and wait a little before they kill; the loop then ends its step and
saves.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signal(stop_requested: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
    """Yield a question: was SIGTERM received, or does the caller want to stop?

    Python delivers signals to the main thread only; elsewhere the caller has to ask.

    Args:
        stop_requested: The caller's own answer, besides the signal.
    """
    received = threading.Event()

    def stopping() -> bool:
        return received.is_set() or (stop_requested is not None and stop_requested())

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
