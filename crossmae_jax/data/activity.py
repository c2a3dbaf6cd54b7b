"""What the workers of a loader do at the moment, for when no batch comes of them.

All processes of a loader map one small file. Each of their threads has a slot in it:
the process, the image that it reads, and since when. Writing costs a microsecond an
image, and whoever waits can name the image that holds it up.
"""

import functools
import itertools
import mmap
import os
import struct
import tempfile
import threading
import time
from typing import NamedTuple

_SLOT = struct.Struct("<qqd")  # process, state, seconds of the clock
_SLOTS = 1024
_THREADS = 4  # slots of a worker process: two threads read, one starts them
_IDLE, _FAILED, _RAISED = 0, -1, -2  # states; others are an image's number, from 1 on

_worker: int | None = None  # which worker this process is; None of one with threads
_threads = threading.local()
_numbers = itertools.count()


class Reading(NamedTuple):
    """An image that is being read, and decoded."""

    process: int
    index: int
    seconds: float


class Activity:
    """A board of what is read; it is pickled as the path of its file.

    Threads of one process need no file. Where none can be written (a full disk) each
    process sees its own threads alone.
    """

    def __init__(self):
        self._path: str | None = None

    def share(self) -> None:
        """Makes the file, before this is pickled or anything is read.

        Called again, where nobody writes any more, it forgets all.
        """
        if self._path is not None:
            self._board[:] = bytes(len(self._board))
            return
        try:
            # Written and not only made longer: a map of a hole in a full disk crashes.
            with tempfile.NamedTemporaryFile(prefix="crossmae_", delete=False) as file:
                file.write(bytes(_SLOTS * _SLOT.size))
            self._path = file.name
        except OSError:
            pass

    def enter(self, worker: int) -> None:
        """Says that this process is a worker, the one of that number."""
        global _worker
        _worker = worker
        self.end()

    def begin(self, index: int) -> None:
        """Says that this thread reads an image now."""
        self._write(index + 1)

    def end(self) -> None:
        """Says that this thread reads nothing."""
        self._write(_IDLE)

    def fail(self) -> None:
        """Says that this worker cannot start the threads that it needs."""
        self._write(_FAILED)

    def raising(self) -> None:
        """Says that this worker raises an error, which the parent will get.

        In a slot of its own: its threads may read on.
        """
        if _worker is not None:
            self._put(_worker * (_THREADS + 1) + _THREADS, _RAISED)

    def processes(self) -> set[int]:
        """Returns the processes that ever read, or were ready to."""
        return {process for process, *_ in self._slots()}

    def raised(self) -> bool:
        """Says whether a worker raised an error."""
        return any(state == _RAISED for _, state, _ in self._slots())

    def failed(self) -> bool:
        """Says whether a worker could not start its threads."""
        return any(state == _FAILED for _, state, _ in self._slots())

    def readings(self) -> list[Reading]:
        """Returns what is being read, the longest first."""
        now = time.monotonic()
        readings = [
            Reading(process, state - 1, now - since)
            for process, state, since in self._slots() if state > 0
        ]
        return sorted(readings, key=lambda reading: -reading.seconds)

    def remove(self) -> None:
        """Removes the file; who has it mapped goes on writing."""
        if self._path is not None:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass

    def __getstate__(self) -> dict[str, str | None]:
        return {"_path": self._path}

    @functools.cached_property
    def _board(self) -> mmap.mmap | bytearray:
        if self._path is not None:
            try:
                with open(self._path, "r+b") as file:
                    return mmap.mmap(file.fileno(), 0)
            except OSError:
                pass
        return bytearray(_SLOTS * _SLOT.size)

    def _write(self, state: int) -> None:
        number = getattr(_threads, "number", None)
        if number is None:
            number = _threads.number = next(_numbers)
        if _worker is not None:
            number = _worker * (_THREADS + 1) + number % _THREADS
        self._put(number, state)

    def _put(self, number: int, state: int) -> None:
        at = number % _SLOTS * _SLOT.size
        _SLOT.pack_into(self._board, at, os.getpid(), state, time.monotonic())

    def _slots(self) -> list[tuple[int, int, float]]:
        return [slot for slot in _SLOT.iter_unpack(self._board[:]) if slot[0]]
