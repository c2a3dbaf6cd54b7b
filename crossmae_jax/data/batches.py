"""Batches that are made ahead of their use, and what happens while there are none.

One thread joins what the workers make (`workers`) to batches, and the program takes
them. A worker that dies is replaced, and the chunk that it was at is made again: a
chunk is a function of its number, so no batch changes.

The program waits where batches are not ready, and a wait may have no end: a disk over
the network that does not answer. So every wait looks each second whether the run shall
stop, and says from time to time which image is being read, and for how long.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging

from crossmae_jax import errors
from crossmae_jax.data import workers
from crossmae_jax.data.activity import Activity
from crossmae_jax.data.bad_images import Bad, BadImages

Batch = dict[str, np.ndarray]

_AHEAD = 2
_LOOK = 1.0  # seconds, after which a wait looks around
_SPEAK = 30.0  # seconds, after which a wait is said for the first time
_PATIENCE = 5.0  # seconds for workers to finish what they do when nobody wants it
_LIMITS = (errno.EAGAIN, errno.ENOMEM)  # of processes and memory
_SHOWN = 3
_DEATHS = 3  # of workers at the same chunk, then it is no accident
_CAUSES = (
    "Exit code -9 is often the kernel's when memory runs out (dmesg): lower "
    "data.workers. -7 is shared memory that is full (/dev/shm), or a disk that went "
    "away. -11 is a crash: move the image away."
)

_left_behind: list[Callable[[], bool]] = []  # say whether threads still read


class StoppedWaiting(Exception):
    """The program was asked to stop while it waited for a batch."""


class Batches(Iterator[Batch]):
    """Batches that are made ahead of their use, a bounded number of them.

    Attributes:
      wait_seconds: how long next() had to wait, in total.
      num_workers: worker processes; 0 means threads of this process.

    Args:
      loader: makes chunks of batches, in the workers; see `pipeline`.
      stop: says whether to stop waiting; asked each second of a wait. next() raises
        StoppedWaiting then, and nothing is closed yet.
    """

    def __init__(
        self,
        loader: Any,
        num_batches: int,
        num_workers: int,
        bad_images: BadImages,
        *,
        num_classes: int | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self.wait_seconds = 0.0
        self._loader, self._num_classes, self._stop = loader, num_classes, stop
        self._bad_images = bad_images
        start = functools.partial(
            workers.start,
            loader,
            num_chunks=num_batches * loader.chunks_per_batch,
            num_images=num_batches * loader.local.size,
            chunk_bytes=loader.chunk_bytes,
            activity=loader.activity,
        )
        self.num_workers, chunks = start(num_workers=num_workers)
        self._remaining = num_batches
        self._joiner = _Joiner(
            loader, chunks, functools.partial(start, num_workers=self.num_workers),
            self.num_workers,
        )
        # One thread, so that batches are joined in order.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "crossmae-batches")
        self._ahead: collections.deque = collections.deque()
        self._close = weakref.finalize(
            self, _shut, self._pool, self._joiner, loader.activity, self.num_workers
        )
        for _ in range(_AHEAD):
            self._request()

    @property
    def num_bad(self) -> int:
        """Samples so far whose image was replaced; in training, over all launches."""
        return self._bad_images.count

    def __next__(self) -> Batch:
        if not self._ahead:
            self.close()
            raise StopIteration
        start = time.perf_counter()
        try:
            batch, bad = self._awaited(self._ahead.popleft())
            self.wait_seconds += time.perf_counter() - start
            self._bad_images.add(len(batch["sample"]), bad)
            if self._num_classes is not None:
                self._loader.check_labels(batch, self._num_classes)
        except StoppedWaiting:
            raise  # closing takes its time, and there is something to be saved first
        except BaseException:
            self.close()
            raise
        self._request()
        return batch

    def close(self) -> None:
        """Stops threads and worker processes; a second call does nothing."""
        self._ahead.clear()
        self._close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _request(self) -> None:
        if self._remaining > 0:
            self._remaining -= 1
            self._ahead.append(self._pool.submit(self._joiner))

    def _awaited(self, future: concurrent.futures.Future) -> tuple[Batch, list[Bad]]:
        begin, speak = time.monotonic(), _SPEAK
        while not concurrent.futures.wait([future], timeout=_LOOK).done:
            waited = time.monotonic() - begin
            if self._stop is not None and self._stop():
                raise StoppedWaiting(f"No batch for {waited:.0f} s. {self._doing()}")
            if self._loader.activity.failed():
                break
            if waited >= speak:
                logging.warning("No batch for %.0f s. %s", waited, self._doing())
                speak *= 2
        if self._loader.activity.failed():
            raise workers.CannotStart(
                "A worker process could not start the threads that it needs. "
                + workers.ADVICE
            )
        return future.result()

    def _doing(self) -> str:
        """Says what the workers do, the longest reading first."""
        activity, source = self._loader.activity, self._loader.source
        parts = [
            f"{f'process {process}' if self.num_workers else 'a thread'} reads "
            f"{source.name(index)}, for {seconds:.0f} s"
            for process, index, seconds in activity.readings()
        ]
        if len(parts) > _SHOWN:
            parts[_SHOWN:] = [f"{len(parts) - _SHOWN} more read"]
        if self.num_workers:
            begun = len(activity.processes())
            if begun < self.num_workers:
                parts.append(
                    f"{self.num_workers - begun} of {self.num_workers} worker "
                    "processes have not begun"
                )
            parts += [f"process {pid} has ended" for pid in workers.ended(activity)]
        return f"{'; '.join(parts) or 'No image is being read'}."


def any_left_behind() -> bool:
    """Says whether threads still read that could not be ended.

    Python waits for all threads before it ends; they may never end.
    """
    return any(still_read() for still_read in _left_behind)


def _shut(
    pool: concurrent.futures.Executor, joiner: "_Joiner", activity: Activity,
    num_workers: int,
) -> None:
    joiner.stop.set()
    pool.shutdown(wait=False, cancel_futures=True)

    def still_read() -> bool:
        # One thread joins what others read; these may be held up longer than it is.
        reading = num_workers == 0 and bool(activity.readings())
        return reading or not joiner.idle.is_set()

    _left_behind.append(still_read)  # first: a second Ctrl-C may cut the waits short
    ended = _comes_true(joiner.idle.is_set)
    if not ended and num_workers:
        workers.kill(activity)
        ended = _comes_true(joiner.idle.is_set)
    if ended:
        pool.shutdown(wait=True)
        joiner.close()  # from here on nobody reads ahead
        ended = _comes_true(lambda: not still_read())
    if ended:
        _left_behind.remove(still_read)
    else:  # no thread can be ended from outside
        logging.warning("Threads that read images do not end; they are left.")
    activity.remove()


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Says whether a condition holds within the time that workers get."""
    end = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@dataclasses.dataclass
class _Joiner:
    """Joins the next chunks to a batch; runs in the thread of `Batches`.

    Attributes:
      start: starts workers, which make chunks from a number on.
    """

    loader: Any
    chunks: Any
    start: Callable[..., tuple[int, Any]]
    num_workers: int
    num_made: int = 0
    num_deaths: int = 0  # since the last chunk
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    idle: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __post_init__(self):
        self.idle.set()

    def __call__(self) -> tuple[Batch, list[Bad]]:
        self.idle.clear()
        try:
            return self._joined()
        except OSError as error:
            if error.errno not in _LIMITS:
                raise
            raise workers.CannotStart(
                f"A worker process could not be started ({error}). {workers.ADVICE}"
            ) from error
        except MemoryError as error:
            raise workers.WorkerDied(
                "Memory ran out where images are loaded. Lower data.workers or "
                "data.max_pixels, or raise the limit (ulimit -v)."
            ) from error
        finally:
            self.idle.set()

    def _joined(self) -> tuple[Batch, list[Bad]]:
        batch = self.loader.empty(self.loader.local.size)
        bad: list[Bad] = []
        for part in range(self.loader.chunks_per_batch):
            if self.stop.is_set():
                raise concurrent.futures.CancelledError
            begin, end = self.loader.bounds(part)
            chunk = self._next()
            for name, array in batch.items():
                array[begin:end] = chunk["arrays"][name]
            bad.extend(chunk["bad"].images)
        return batch, bad

    def _next(self) -> dict[str, Any]:
        """Returns the next chunk, whoever dies meanwhile."""
        while True:
            try:
                chunk = next(self.chunks)
            except RuntimeError as error:
                threads = self.num_workers == 0
                if threads or self.loader.activity.raised() or self.stop.is_set():
                    raise  # no worker died, or `_shut` killed them
                self._replace(error)
            else:
                self.num_made, self.num_deaths = self.num_made + 1, 0
                return chunk

    def _replace(self, error: RuntimeError) -> None:
        """Starts all workers anew, from the chunk that is to be made next.

        Raises:
          WorkerDied: if that was of no use before.
        """
        activity, source = self.loader.activity, self.loader.source
        died = workers.ended(activity)
        read = [
            source.name(reading.index) for reading in activity.readings()
            if reading.process in died
        ]
        who = f"Process {', '.join(map(str, died))}" if died else "A new process"
        what = f", reading {', '.join(read)}" if read else ", reading nothing"
        said = f"{who} of the loader died{what}. {error}"
        self.num_deaths += 1
        if self.num_deaths == _DEATHS:
            raise workers.WorkerDied(
                f"{said} It is time {_DEATHS} in a row at the same images. {_CAUSES}"
            ) from error
        logging.warning(
            "%s All are started anew, and no batch changes. %s", said, _CAUSES
        )
        self.close()
        with errors.setting_up():  # shared memory may be less than it was
            _, self.chunks = self.start(first=self.num_made)

    def close(self) -> None:
        """Ends the workers."""
        # Grain's iterators complain when the interpreter ends before they are dropped.
        chunks, self.chunks = self.chunks, None
        if chunks is not None:
            # Grain's assertion, of processes that never began.
            with contextlib.suppress(AssertionError):
                chunks.close()


@dataclasses.dataclass(frozen=True)
class Replaced:
    """The bad images of a chunk; no tree, so that they travel as one object."""

    images: list[Bad]
