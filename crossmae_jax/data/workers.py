"""Worker processes: how many, how they start, and that they end with their parent.

Grain maps the numbers 0, 1, 2, ... in worker processes and returns the results in
order. What Grain leaves to its user is done here:

- Without `absl.app` its flags are unparsed, and reading them raises.
- Its workers outlive a parent that is killed. Ours wait for the parent's end in a
  thread, on the pipe that multiprocessing keeps for this; the kernel closes it however
  the parent dies.
- Pixels travel through shared memory. Where too little is mounted (containers often
  have 64 MiB) a worker would die with SIGBUS; here it is counted first.
- A worker that may start no threads (limits of `ulimit` or of a container) cannot send
  what it has, not even its error: it tries for ever, and its parent waits for ever.
  Ours tries to start some first, says in `activity` that it cannot, and ends.
- The end of a worker that is killed, by a crash or for want of memory, is a
  RuntimeError, as a worker itself may raise one. Ours say in `activity` when they
  raise; an error that none raised is a death, and `batches` starts others instead.
- At the end of its input Grain keeps hold of the last results and their shared memory.
  Ours has no end: the reader closes the iterator when it has what it wants.
"""

import faulthandler
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags

from crossmae_jax import errors
from crossmae_jax.data.activity import Activity

_SHARED_MEMORY = "/dev/shm"
# Chunks of a worker that exist at once: being made, in its queue, in Grain's reading
# thread, and being joined by the parent.
_CHUNKS_ALIVE = 4
_ENDLESS = 1 << 62
_START_PAYS_OFF = 2000  # images; for fewer, threads are done before a process starts
_THREADS_OF_GRAIN = 4  # in a worker, and in the parent for each of them
_PRINT_STACKS = signal.SIGUSR2

_boards: weakref.WeakSet[Activity] = weakref.WeakSet()  # of all loaders there are

ADVICE = (
    "There is a limit on their number (ulimit -u, or the pids limit of a container: "
    "docker run --pids-limit) or on memory (ulimit -v). Raise it, lower data.workers, "
    "or set it to 0 (threads)."
)


class CannotStart(errors.UserError, RuntimeError):
    """The system starts no further processes or threads, which the loader needs."""


class WorkerDied(errors.UserError, RuntimeError):
    """Who loads images dies again and again at the same ones, or has no memory."""


def start(
    load: Callable[[int], Any],
    *,
    num_chunks: int,
    num_images: int,
    chunk_bytes: int,
    num_workers: int,
    activity: Activity,
    first: int = 0,
) -> tuple[int, Iterator[Any]]:
    """Starts mapping `load` over 0, 1, 2, ..., or from another number on.

    Args:
      load: picklable; runs in the workers, also for numbers that will not be read.
      num_chunks: how many will be read.
      num_images: in these chunks together.
      chunk_bytes: size of a chunk in shared memory.
      num_workers: data.workers; -1 chooses, 0 means threads of this process.
      activity: where worker processes say that they have begun.

    Returns:
      The number of processes (0: threads), and an endless iterator with close().

    Raises:
      ValueError: if there is too little shared memory for so many processes.
      CannotStart: if this process may not start the threads that it takes.
    """
    num_workers = _chosen(
        num_workers, num_chunks=num_chunks, num_images=num_images,
        per_worker=_CHUNKS_ALIVE * chunk_bytes,
    )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # In a worker, the second thread reads from disk while the first decodes.
    threads = 2 if num_workers else max(2, available_cpus())
    _try_threads(num_workers * _THREADS_OF_GRAIN or threads + 1)
    dataset = (
        grain.MapDataset.range(first, _ENDLESS)
        .map(functools.partial(_loaded, load, activity))
        .to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
    )
    if num_workers:
        activity.share()
        _boards.add(activity)
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=1
            ),
            worker_init_fn=functools.partial(_begin, activity),
        )
    return num_workers, iter(dataset)


def _chosen(
    num_workers: int, *, num_chunks: int, num_images: int, per_worker: int
) -> int:
    """Returns how many processes read, of which each takes so many bytes."""
    if num_workers < -1:
        raise ValueError(
            f"data.workers={num_workers}; expected -1 (chosen from the CPU count), 0 "
            "(threads) or a number of processes."
        )
    room = num_chunks * per_worker
    if os.path.isdir(_SHARED_MEMORY):
        room = shutil.disk_usage(_SHARED_MEMORY).free
    if num_workers == -1:
        wanted = max(1, available_cpus() - 1) if num_images >= _START_PAYS_OFF else 0
        num_workers = min(wanted, room // per_worker)
    num_workers = min(num_workers, num_chunks)
    if num_workers * per_worker > room:
        raise ValueError(
            f"data.workers={num_workers} needs {num_workers * per_worker >> 20} MiB of "
            f"shared memory, {_SHARED_MEMORY} has {room >> 20} MiB free. Lower "
            "data.workers, set it to 0 (threads), or mount more (docker run "
            "--shm-size=2g)."
        )
    return num_workers


def available_cpus() -> int:
    """Counts the CPUs this process may use, its container's quota included."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    if os.path.exists("/sys/fs/cgroup/cpu.max"):
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


def ended(activity: Activity) -> list[int]:
    """Returns the workers that have ended, which none does by itself."""
    alive = {process.pid for process in multiprocessing.active_children()}
    return sorted(activity.processes() - alive - {os.getpid()})


def kill(activity: Activity) -> None:
    """Ends the worker processes, whatever they do."""
    own = activity.processes()
    for process in multiprocessing.active_children():
        if process.pid in own:
            process.kill()


def print_stacks() -> None:
    """Asks all worker processes to print on stderr what their threads do."""
    known = set().union(*(activity.processes() for activity in _boards))
    for process in multiprocessing.active_children():
        if process.pid in known:
            os.kill(process.pid, _PRINT_STACKS)


def _loaded(load: Callable[[int], Any], activity: Activity, number: int) -> Any:
    try:
        return load(number)
    except BaseException:
        activity.raising()
        raise
    finally:
        activity.end()


def _try_threads(number: int) -> None:
    """Raises CannotStart unless so many threads can run at the same time."""
    done, threads = threading.Event(), []
    try:
        for _ in range(number):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as error:
        raise CannotStart(
            f"Of {number} threads for loading images {len(threads)} could be started "
            f"({error}). {ADVICE}"
        ) from error
    finally:
        done.set()
        for thread in threads:
            thread.join()


def _begin(activity: Activity, index: int, count: int) -> None:
    """Runs first in every worker."""
    # What asks a run to stop (distributed/preemption.py) may reach the whole group of
    # processes; the parent decides what it means, and needs its workers until it has.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.__stderr__:
        faulthandler.register(_PRINT_STACKS, sys.__stderr__)
    else:
        signal.signal(_PRINT_STACKS, signal.SIG_IGN)
    activity.enter(index)
    try:
        threading.Thread(
            target=_end_with_parent, args=(activity,), daemon=True
        ).start()
        _try_threads(_THREADS_OF_GRAIN)
    except RuntimeError:
        activity.fail()
        os._exit(1)


def _end_with_parent(activity: Activity) -> None:
    multiprocessing.parent_process().join()
    activity.remove()  # a parent that was killed could not
    os._exit(1)
