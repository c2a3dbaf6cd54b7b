"""Worker processes start from anywhere, are bounded, and never outlive their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from crossmae_jax.data import batches, pipeline, sources, workers
from crossmae_jax.data.activity import Activity
from tests.image_files import config, encode, pixels, write_folder

PNG = encode(pixels(0, 16, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sources.FolderSource(write_folder(tmp_path_factory.mktemp("images"), 21))


def _first_batch(folder):
    with pipeline.train_batches(
        folder, config(), seed=3, start_step=0, num_steps=1
    ) as made:
        return next(made)


def test_prefetching_is_bounded_and_close_ends_the_workers(folder):
    data = config(workers=2)
    batches = pipeline.train_batches(
        folder, data, seed=0, start_step=0, num_steps=10**9
    )
    first = next(batches)
    processes = multiprocessing.active_children()
    assert len(processes) == 2 and batches.num_workers == 2
    assert batches.wait_seconds > 0
    time.sleep(0.5)
    assert len(batches._ahead) <= 2
    begin = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - begin < 10
    assert not any(process.is_alive() for process in processes)
    assert list(batches) == []
    np.testing.assert_array_equal(first["sample"], range(8))


def test_forgotten_iterator_ends_its_workers(folder):
    batches = pipeline.train_batches(
        folder, config(workers=1), seed=0, start_step=0, num_steps=100
    )
    next(batches)
    (process,) = multiprocessing.active_children()
    del batches
    process.join(timeout=10)
    assert not process.is_alive()


def test_workers_go_on_when_a_scheduler_signals_the_whole_group(folder):
    with pipeline.train_batches(
        folder, config(workers=1), seed=0, start_step=0, num_steps=12
    ) as batches:
        next(batches)
        (process,) = multiprocessing.active_children()
        for number in (
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
        ):
            os.kill(process.pid, number)
        assert len(list(batches)) == 11


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_die_are_replaced_and_no_batch_changes(folder, monkeypatch):
    said = []
    monkeypatch.setattr(
        batches.logging, "warning", lambda text, *given: said.append(text % given)
    )

    def made(num_workers):
        return pipeline.train_batches(
            folder, config(workers=num_workers), seed=5, start_step=2, num_steps=60
        )

    with made(0) as uninterrupted:
        expected = list(uninterrupted)
    with made(2) as interrupted:
        found = []
        for numbers in ([signal.SIGKILL], [signal.SIGSEGV, signal.SIGBUS]):
            found += [next(interrupted), next(interrupted)]  # both have begun
            victims = multiprocessing.active_children()
            for process, number in zip(victims, numbers):
                os.kill(process.pid, number)
            before = len(said)
            while len(said) == before:  # what was made ahead comes first
                found.append(next(interrupted))
            assert "All are started anew, and no batch changes." in said[before]
            assert any(f"{process.pid}" in said[before] for process in victims)
            codes = [f"exit code -{int(number)}" for number in numbers]
            assert any(code in said[before] for code in codes)
        found += list(interrupted)
        assert len(found) == len(expected) == 60
        for ours, theirs in zip(found, expected, strict=True):
            for name, array in theirs.items():
                np.testing.assert_array_equal(ours[name], array)
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_before_it_begins_is_replaced(folder, monkeypatch):
    said = []
    monkeypatch.setattr(batches.logging, "warning", lambda *given: said.append(given))
    with pipeline.train_batches(
        folder, config(workers=1), seed=3, start_step=0, num_steps=1
    ) as made:
        while not (processes := multiprocessing.active_children()):
            time.sleep(0.001)
        processes[0].kill()
        found = next(made)
    assert len(said) == 1 and "A new process of the loader died" in said[0][1]
    np.testing.assert_array_equal(found["image"], _first_batch(folder)["image"])


class Crashing:
    """Images of which one crashes whoever reads it."""

    kinds, classes, fingerprint = frozenset(), (), "-"

    def __len__(self):
        return 8

    def name(self, index):
        return f"NAME{index}"

    def __getitem__(self, index):
        if index == 5:
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as a crash is
        return {"name": self.name(index), "image": PNG}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_image_that_crashes_its_reader_is_named_and_an_error(monkeypatch):
    monkeypatch.setattr(batches, "_DEATHS", 2)
    with pipeline.eval_batches(
        Crashing(), config(workers=1), batch_size=8
    ) as made, pytest.raises(
        workers.WorkerDied,
        match=r"Process \d+ of the loader died, reading .*NAME5.* exit code -11"
        ".* It is time 2 in a row at the same images. .* move the image away",
    ):
        next(made)
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, os, sys, time
from crossmae_jax.data import pipeline, sources
from tests.image_files import config

if __name__ == "__main__":
    source = sources.FolderSource(sys.argv[1])
    batches = pipeline.train_batches(
        source, config(workers=2), seed=3, start_step=0, num_steps=10**9
    )
    print(next(batches)["image"].sum(), flush=True)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "stay":
        time.sleep(60)
    if sys.argv[2] == "exit":  # at once, after a worker has died
        multiprocessing.active_children()[0].kill()
        for _ in range(30):
            next(batches)
        os._exit(3)
"""

# Notes the names of all shared memory that is made.
NOTING = """
from multiprocessing import shared_memory
make = shared_memory.SharedMemory.__init__
def noted(self, name=None, create=False, size=0):
    make(self, name, create, size)
    if create:
        with open({file!r}, "a") as file:
            print(self.name, file=file)
shared_memory.SharedMemory.__init__ = noted
"""


def _start_script(folder, directory, arguments, how):
    (directory / "loader_script.py").write_text(SCRIPT)
    (directory / "tmp").mkdir()
    (directory / "sitecustomize.py").write_text(
        NOTING.format(file=str(directory / "segments"))
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.Popen(
        [sys.executable, *arguments, folder.directory, how], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=directory,
        env=os.environ | {
            "PYTHONPATH": f"{directory}:{root}", "TMPDIR": str(directory / "tmp"),
        },
    )
    total = process.stdout.readline().strip()
    pids = [int(pid) for pid in process.stdout.readline().split()]
    return process, total, pids


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _remains(directory, pids):
    """Returns what there still is of a script: workers, shared memory, files."""
    segments = set((directory / "segments").read_text().split())
    assert segments
    return (
        [pid for pid in pids if _alive(pid)], segments & set(os.listdir("/dev/shm")),
        os.listdir(directory / "tmp"),
    )


def _check_nothing_remains(directory, pids):
    deadline = time.monotonic() + 15
    while any(remains := _remains(directory, pids)):
        assert time.monotonic() < deadline, remains
        time.sleep(0.1)


def test_workers_die_with_a_killed_parent(folder, tmp_path):
    process, total, pids = _start_script(folder, tmp_path, ["loader_script.py"], "stay")
    assert total == str(_first_batch(folder)["image"].sum())
    assert len(pids) == 2 and all(_remains(tmp_path, pids))
    process.kill()
    process.communicate(timeout=20)
    _check_nothing_remains(tmp_path, pids)


def test_nothing_remains_where_a_worker_died_and_the_parent_ended_at_once(
    folder, tmp_path
):
    process, _, pids = _start_script(folder, tmp_path, ["loader_script.py"], "exit")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3 and "no batch changes" in errors, errors
    _check_nothing_remains(tmp_path, pids)


def test_workers_start_under_python_m_and_leave_nothing(folder, tmp_path):
    process, total, pids = _start_script(
        folder, tmp_path, ["-m", "loader_script"], "leave"
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert total == str(_first_batch(folder)["image"].sum())
    assert "leaked" not in errors and "Traceback" not in errors, errors
    assert not any(_remains(tmp_path, pids))


def test_number_of_workers_is_chosen_from_the_machine(monkeypatch):
    def start(**changes):
        settings = dict(
            num_chunks=10**6, num_images=10**6, chunk_bytes=1 << 20, num_workers=-1
        )
        number, chunks = workers.start(
            abs, activity=Activity(), **(settings | changes)
        )
        chunks.close()
        return number

    monkeypatch.setattr(workers, "available_cpus", lambda: 12)
    assert start() == 11
    assert start(num_images=100) == 0  # threads are faster than starting processes
    assert start(num_chunks=3) == 3
    with pytest.raises(ValueError, match="data.workers=-2; expected -1"):
        start(num_workers=-2)

    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: usage)
    assert start(chunk_bytes=4 << 20) == 4
    with pytest.raises(ValueError, match="data.workers=11 needs 176 MiB.*has 64 MiB"):
        start(chunk_bytes=4 << 20, num_workers=11)
