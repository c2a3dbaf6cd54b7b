"""Stopping a run on request, such that the same command goes on from there."""

import contextlib
import signal
import threading
from collections.abc import Iterator

REQUEUE = 75  # exit status when stopped: saved, run the same command again


class Interrupted(Exception):
    """The run was asked to stop in the middle of something."""


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turns the first SIGTERM or Ctrl-C into an event; a second acts as usual."""
    requested = threading.Event()

    def handle(number, _frame):
        requested.set()
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():
        yield requested  # handlers can be set in the main thread only (notebooks)
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield requested
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
