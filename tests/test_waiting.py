"""No wait for a batch is silent or without end: what holds it up is said, or raised."""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from crossmae_jax.data import batches, listing, pipeline, sources, workers
from tests.image_files import config, encode, pixels, write

PNG = encode(pixels(0, 16, 16))


@pytest.fixture
def spoken(monkeypatch):
    """What is logged while a batch is waited for, with a short patience."""
    lines = []
    monkeypatch.setattr(
        batches.logging, "warning", lambda text, *given: lines.append(text % given)
    )
    for name, seconds in (("_LOOK", 0.05), ("_SPEAK", 0.2), ("_PATIENCE", 0.3)):
        monkeypatch.setattr(batches, name, seconds)
    return lines


class Source:
    """Images of which one, the third, cannot be read as others are."""

    kinds, classes, fingerprint = frozenset(), (), "-"

    def __init__(self, hold):
        self._hold = hold

    def __len__(self):
        return 8

    def name(self, index):
        return f"NAME{index}"

    def __getitem__(self, index):
        if index == 2:
            self._hold()
        return {"name": self.name(index), "image": PNG}


class _Pipe:
    """Opens a pipe that nobody writes to."""

    def __init__(self, path):
        self.path = path

    def __call__(self):
        open(self.path, "rb").close()


def _batches(source, **given):
    data = config(workers=given.pop("workers", 0))
    return pipeline.eval_batches(source, data, batch_size=8, **given)


def test_threads_that_do_not_come_back_are_named_and_left_at_a_stop(spoken):
    held = threading.Event()
    made = _batches(Source(held.wait), stop=lambda: len(spoken) >= 2)
    begin = time.monotonic()
    stopped = pytest.raises(batches.StoppedWaiting, match="a thread reads NAME2, for 0")
    with stopped, made:
        next(made)
    assert time.monotonic() - begin < 10
    first, second, last = spoken
    assert first == "No batch for 0 s. a thread reads NAME2, for 0 s."
    assert "NAME2" in second  # and not at each look
    assert last == "Threads that read images do not end; they are left."
    assert batches.any_left_behind()
    held.set()
    deadline = time.monotonic() + 10
    while batches.any_left_behind():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_threads_that_read_ahead_are_left_behind_as_well(spoken):
    first, ahead = threading.Event(), threading.Event()

    class TwoBatches(Source):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            if index == 10:
                ahead.wait()
            return super().__getitem__(index)

    made = _batches(TwoBatches(first.wait), stop=lambda: bool(spoken))
    with pytest.raises(batches.StoppedWaiting), made:
        next(made)
    first.set()
    assert made._joiner.idle.wait(10)  # the batch that was asked for is there
    assert batches.any_left_behind()
    ahead.set()
    deadline = time.monotonic() + 10
    while batches.any_left_behind():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_bug_ends_a_program_whose_threads_are_left():
    program = """if True:
        import threading
        from crossmae_jax.commands import session
        from crossmae_jax.data import batches

        @session.command()
        def main(argv):
            threading.Thread(target=threading.Event().wait).start()
            batches._left_behind.append(lambda: True)
            raise KeyError("a bug")

        session.end(main, [])
    """
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1 and "KeyError: 'a bug'" in ended.stderr


def test_worker_processes_are_named_and_ended_at_a_stop(spoken, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "_PATIENCE", 3.0)  # Grain looks each second
    os.mkfifo(tmp_path / "pipe")
    stopping = threading.Event()
    made = _batches(Source(_Pipe(tmp_path / "pipe")), workers=1, stop=stopping.is_set)
    asked = threading.Thread(target=_set_once, args=(
        stopping, lambda: any("NAME2" in line for line in spoken)
    ))
    asked.start()
    stopped = pytest.raises(batches.StoppedWaiting, match=r"process \d+ reads NAME2, f")
    with stopped, made:
        next(made)
    asked.join()
    assert any("1 of 1 worker processes have not begun" in line for line in spoken)
    assert not multiprocessing.active_children() and not batches.any_left_behind()


def _set_once(event, condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    event.set()


# A stack larger than the memory that a process may have: the system itself refuses.
_NO_THREADS = """
    threading.stack_size(1 << 40)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 38, -1))
"""
_ONE_THREAD = """
    start = threading.Thread.start
    def limited(thread):
        if threading.active_count() > 1:
            raise RuntimeError("can't start new thread")
        start(thread)
    threading.Thread.start = limited
"""


@pytest.mark.parametrize("limit", [_NO_THREADS, _ONE_THREAD])
def test_a_worker_that_may_start_no_threads_is_an_error(tmp_path, monkeypatch, limit):
    (tmp_path / "sitecustomize.py").write_text(
        "import resource, sys, threading\n"
        f"if '--multiprocessing-fork' in sys.orig_argv:{limit}"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    deadline = time.monotonic() + 60
    made = _batches(
        Source(int), workers=1, stop=lambda: time.monotonic() > deadline
    )
    with made, pytest.raises(workers.CannotStart, match="ulimit -u.*lower data.worke"):
        next(made)
    assert not multiprocessing.active_children()


def test_a_process_that_may_start_no_threads_says_so():
    size = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        with pytest.raises(workers.CannotStart, match="Of 3 threads .* 0 could be st"):
            _batches(Source(int))
    finally:
        threading.stack_size(size)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", [BlockingIOError, OSError])
def test_a_process_that_cannot_be_started_says_so(monkeypatch, kind):
    number = 11 if kind is BlockingIOError else 12  # what fork() and mmap() give

    def fail(_):
        raise kind(number, os.strerror(number))

    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(context.Process, "_Popen", staticmethod(fail))
    with pytest.raises(workers.CannotStart, match="could not be started .*ulimit -v"):
        next(_batches(Source(int), workers=1))
    gc.collect()  # Grain complains of what it did not start


@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_that_runs_out_is_an_error_that_says_so(num_workers):
    with _batches(Source(_fail_for_memory), workers=num_workers) as made:
        with pytest.raises(workers.WorkerDied, match="Memory ran out .*data.workers"):
            next(made)


def test_an_error_of_a_worker_is_not_taken_for_its_death():
    with _batches(Source(_fail), workers=1) as made:
        with pytest.raises(RuntimeError, match="of the source") as raised:
            next(made)
    assert not isinstance(raised.value, workers.WorkerDied)


def test_who_fails_reads_no_more(spoken):
    """Or the end would wait for threads that read nothing, and give them up."""
    class Failing(Source):
        __getitem__ = _fail

    with pipeline.train_batches(
        Failing(int), config(), seed=0, start_step=0, num_steps=9
    ) as made, pytest.raises(RuntimeError, match="of the source"):
        next(made)
    assert not spoken and not batches.any_left_behind()


def _fail(*_):
    raise RuntimeError("of the source")


def _fail_for_memory():
    raise MemoryError


def test_what_is_no_regular_file_is_no_image(tmp_path):
    for name in ("ant/0.png", "bee/0.png", "bee/1.png"):
        write(tmp_path / name, PNG)
    os.mkfifo(tmp_path / "ant" / "1.jpg")
    (tmp_path / "ant" / "2.jpg").symlink_to("1.jpg")
    (tmp_path / "ant" / "3.jpg").symlink_to("/dev/zero")
    (tmp_path / "bee" / "gone.jpg").symlink_to("nowhere")  # a bad image, and noted
    (tmp_path / "bee" / "2.png").symlink_to("1.png")
    place = os.getcwd()
    os.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        try:
            listening.bind("sock")
        finally:
            os.chdir(place)
        source = sources.make_source(config(dir=str(tmp_path)), "train")
    names = [os.path.basename(source.name(i)) for i in range(len(source))]
    assert names == ["0.png", "0.png", "1.png", "2.png", "gone.jpg"]
    assert source.skipped == "4 pipes, sockets or devices (no regular files)"
    data = config(max_bad_share=1.0)
    with pipeline.eval_batches(source, data, batch_size=5) as made:
        assert next(made)["valid"].all() and made.num_bad == 1
    for name in ("ant/0.png", "bee/0.png", "bee/1.png", "bee/2.png", "bee/gone.jpg"):
        (tmp_path / name).unlink()
    instead = "Found instead: 4 pipes, sockets or devices"
    with pytest.raises(ValueError, match=instead):
        listing.check(
            str(tmp_path), listing.listed(str(tmp_path)), max_skipped_share=0.05
        )


def test_waiting_changes_no_batch(spoken):
    slow = list(_batches(Source(lambda: time.sleep(0.5))))
    fast = list(_batches(Source(int)))
    assert spoken and len(slow) == len(fast) == 1
    for name, array in fast[0].items():
        np.testing.assert_array_equal(slow[0][name], array)
