"""Stopping a run on request, such that the same command goes on from there.

    SIGTERM    schedulers, and machines that are taken away
    SIGINT     Ctrl-C
    SIGHUP     a terminal that was closed; ignored behind nohup, and then still is
    SIGUSR1    SLURM's --signal=USR1@300, in recipes that leave SIGTERM alone

Of several processes one may be asked alone, as where a machine is taken away. All must
stop after the same step, since each step needs them all. JAX's runtime catches SIGTERM
and agrees on a moment; the moments are counted by how often `Stop.is_set` was called,
which is the same in all processes as they all do the same.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

REQUEUE = 75  # exit status: run the same command again; when stopped, it is saved

# Left to whoever ignores or handles them already: nohup, other launchers. And heard any
# number of times: a terminal that is closed, and its shell, may both send one.
_IF_NOBODY_ELSE_DOES = (signal.SIGHUP, signal.SIGUSR1)

_calls = itertools.count()  # of `Stop.is_set`, over all runs of this process


class Interrupted(Exception):
    """The run was asked to stop in the middle of something."""


class Stop:
    """Whether the run was asked to stop; the same answer in all of its processes.

    Args:
      looked: called by each `is_set`: who looks has just done something.
    """

    def __init__(self, looked: Callable[[], None] = lambda: None):
        self._here, self._looked = threading.Event(), looked
        self._agreed = False

    def request(self) -> None:
        """Asks this process alone to stop; of several, the runtime asks all."""
        self._here.set()

    def asked_here(self) -> bool:
        """Says whether to stop now, for waits of this process that others do not share.

        Never if there are several processes: they must stop after the same step.
        """
        return self._here.is_set()

    def is_set(self) -> bool:
        """Says whether to stop now. Of several processes all must call it as often."""
        self._looked()
        if jax.process_count() == 1:
            return self._here.is_set()
        if not self._agreed:
            self._agreed = multihost_utils.reached_preemption_sync_point(next(_calls))
        return self._agreed


@contextlib.contextmanager
def stop_requests(looked: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """Turns the first SIGTERM or Ctrl-C into a request; a second acts as usual.

    Every SIGHUP and SIGUSR1 is a request, where it would else have ended the process.
    Of several processes all SIGTERMs are requests: JAX's runtime hears them from the
    moment at which they met, also while nobody asks.

    Args:
      looked: see `Stop`.
    """
    stop = Stop(looked)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # handlers can be set in the main thread only (notebooks)
        return
    several = jax.process_count() > 1

    def handle(number, _frame):
        if number not in _IF_NOBODY_ELSE_DOES:
            signal.signal(number, previous[number])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's own handler tells the others
        else:
            stop.request()

    numbers = [signal.SIGINT] if several else [signal.SIGTERM, signal.SIGINT]
    numbers += [
        number for number in _IF_NOBODY_ELSE_DOES
        if signal.getsignal(number) == signal.SIG_DFL
    ]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
