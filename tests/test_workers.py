"""Worker processes start from anywhere, are bounded, and never outlive their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from crossmae_jax.data import pipeline, sources, workers
from crossmae_jax.data.activity import Activity
from tests.image_files import config, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sources.FolderSource(write_folder(tmp_path_factory.mktemp("images"), 21))


def _first_batch(folder):
    with pipeline.train_batches(
        folder, config(), seed=3, start_step=0, num_steps=1
    ) as batches:
        return next(batches)


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


def test_killed_worker_is_an_error_not_a_hang(folder):
    with pipeline.train_batches(
        folder, config(workers=1), seed=0, start_step=0, num_steps=10**9
    ) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="exit code -9"):
            for _ in batches:
                pass


SCRIPT = """
import multiprocessing, sys, time
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
"""


def _start_script(folder, directory, arguments, how):
    (directory / "loader_script.py").write_text(SCRIPT)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.Popen(
        [sys.executable, *arguments, folder.directory, how], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=directory,
        env=os.environ | {"PYTHONPATH": root},
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


def test_workers_die_with_a_killed_parent(folder, tmp_path):
    process, total, pids = _start_script(folder, tmp_path, ["loader_script.py"], "stay")
    assert total == str(_first_batch(folder)["image"].sum())
    assert len(pids) == 2 and all(_alive(pid) for pid in pids)
    process.kill()
    process.communicate(timeout=20)
    deadline = time.monotonic() + 15
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)


def test_workers_start_under_python_m_and_leave_nothing(folder, tmp_path):
    process, total, pids = _start_script(
        folder, tmp_path, ["-m", "loader_script"], "leave"
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert total == str(_first_batch(folder)["image"].sum())
    assert "leaked" not in errors and "Traceback" not in errors, errors
    assert not any(_alive(pid) for pid in pids)


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
