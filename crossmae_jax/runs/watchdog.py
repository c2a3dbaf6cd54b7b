"""Ends a run that does nothing any more, and says what it was doing.

A disk that does not answer, a save that never returns, a host that the others wait for:
a run can stand still for days without a word. So a thread counts the time since the
last sign of life. Signs of life are

    a step that was made
    a batch of images that came, and each batch of an evaluation
    the begin and the end of a phase: start, compile, data, step, save, evaluate, end

After `config.watchdog_minutes` without one this process prints the stacks of all its
threads and of its loader's workers, then one line that names the phase, writes the same
to `stacks.process_0.txt` (process 1: `stacks.process_1.txt`, ...) and ends with status
75, as a run that was asked to stop does: the same command goes on from the newest
checkpoint. `hung.json` counts how often in a row that happened without a new
checkpoint; the third time the status is 1, which restarts nothing.

Code that holds Python's lock while it waits stops this thread, too. A timer of
`faulthandler`, which needs no lock, prints the stacks then, and ends the process with
status 1 after twice the time.
"""

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

import jax

from crossmae_jax import errors, paths, ranges
from crossmae_jax.checkpoints import steps
from crossmae_jax.data import workers
from crossmae_jax.distributed import preemption
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import lock, records

FILE = "hung.json"
STACKS = "stacks.process_{}.txt"
_TIMES = 3  # in a row without a new checkpoint, then nothing is restarted
_PATIENCE = 15.0  # seconds for what is said and written: nor may that hang
# Seconds in which the others find out the same. The end of process 0 would end them,
# and so may that of any other one, with the status of an error.
_TOGETHER = 10.0

Item = TypeVar("Item")


class Watchdog:
    """Counts the time since the last sign of life; see `watching`.

    Attributes:
      phase: what the run does at the moment.
      first: the step that the launch goes on from, None before that is known.
      step: the last one that was made, None before the first of this launch.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.first: int | None = None
        self.step: int | None = None
        self._last = time.monotonic()

    def alive(self) -> None:
        """Is a sign of life."""
        self._last = time.monotonic()

    def silent(self) -> float:
        """Returns the seconds since the last sign of life."""
        return time.monotonic() - self._last

    def enter(self, phase: str) -> None:
        """Says what the run does from now on."""
        self.phase = phase
        self.alive()

    def started(self, first: int) -> None:
        """Says that the next step is the first of the launch, which compiles it."""
        self.first = first
        self.enter("compile")

    def stepped(self, step: int) -> None:
        """Says that a step was made, and that the next ones are."""
        self.step = step
        self.enter("step")

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Says what the run does inside, and that it then does what it did before."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def awaiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields items; while one is waited for the phase is "data"."""
        items = iter(items)
        while True:
            with self.during("data"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


class _Alarm:
    """Ends the process when a watchdog was silent for too long; runs in a thread."""

    def __init__(self, watch: Watchdog, directory: AnyPath, minutes: float):
        self._watch, self._directory, self._minutes = watch, directory, minutes
        self._index, self._count = jax.process_index(), jax.process_count()
        self._noted = {"times": 0, "step": 0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stream: TextIO = sys.__stderr__ or open(os.devnull, "w")

    def start(self) -> None:
        self._set_timer()
        self._thread.start()
        self._noted |= records.recalled(
            self._directory / FILE, then="hangs are counted anew", usable=_usable
        ) or {}

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        limit = 60 * self._minutes
        while not self._over.wait(min(10.0, limit / 10)):
            self._set_timer()
            if self._watch.silent() >= limit:
                self._end()

    def _set_timer(self) -> None:
        faulthandler.dump_traceback_later(
            max(1.0, 120 * self._minutes), exit=True, file=self._stream
        )

    def _end(self) -> None:
        silent, phase = self._watch.silent(), self._watch.phase
        newest = [self._watch.first]  # unless the disk still answers
        _for_a_while(lambda: newest.extend(self._saved()))
        if newest[-1] not in (None, self._noted["step"]):  # a newer checkpoint
            self._noted = {"times": 0, "step": newest[-1]}
        times = self._noted["times"] + 1
        status = preemption.REQUEUE if times < _TIMES else 1
        text = self._text(silent, phase, times)
        _for_a_while(lambda: self._say(text))
        _for_a_while(lambda: self._write(text, phase, times))
        if self._count > 1:
            together = min(_TOGETHER, 30 * self._minutes)
            time.sleep(together if self._index else 2 * together)
        os._exit(status)

    def _saved(self) -> list[int]:
        return steps.committed(self._directory / "checkpoints")

    def _text(self, silent: float, phase: str, times: int) -> str:
        watch = self._watch
        made = "" if watch.step is None else f", after step {watch.step}"
        then = "The same command goes on from the newest checkpoint."
        if times >= _TIMES:
            then = (
                f"It is time {times} in a row without a new checkpoint, so the status "
                "is 1: find the reason in the stacks before you start it again."
            )
        return (
            f"error: host {self._index}/{self._count} gave no sign of life for "
            f"{silent:.0f} s in the phase {phase!r}{made}. Stacks of all threads are "
            f"above, and in {self._directory / STACKS.format(self._index)} if that "
            f"can be written. {then} If it takes so long and nothing is wrong, raise "
            f"config.watchdog_minutes={self._minutes:g}; 0 is never."
        )

    def _say(self, text: str) -> None:
        faulthandler.dump_traceback(self._stream, all_threads=True)
        workers.print_stacks()
        print(f"\n{text}", file=self._stream, flush=True)

    def _write(self, text: str, phase: str, times: int) -> None:
        if not (self._directory / lock.FILE).exists():
            return  # nobody knows yet whose directory it is
        if self._index == 0:
            noted = {"times": times, "step": self._noted["step"], "phase": phase}
            paths.write_whole(self._directory / FILE, json.dumps(noted) + "\n")
        with tempfile.TemporaryFile("w+") as file:
            file.write(f"{text}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        paths.write_whole(self._directory / STACKS.format(self._index), stacks)


@contextlib.contextmanager
def watching(directory: AnyPath, *, minutes: float) -> Iterator[Watchdog]:
    """Ends this process if there is no sign of life inside for so long; 0: never.

    Args:
      directory: the workdir; written into only while the run holds it.

    Raises:
      SetupError: if `minutes` is negative.
    """
    with errors.setting_up():
        ranges.check("watchdog_minutes", minutes, least=0)
    watch = Watchdog()
    if not minutes:
        yield watch
        return
    alarm = _Alarm(watch, directory, minutes)
    try:
        alarm.start()
        yield watch
    finally:
        alarm.stop()


def _for_a_while(function: Any) -> None:
    """Calls a function, and waits for its end no longer than patience lasts."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(_PATIENCE)


def _usable(noted: dict[str, Any]) -> bool:
    """Says whether these are hangs that were noted."""
    return all(isinstance(noted.get(name), int) for name in ("times", "step"))
