"""A run that stands still ends, says in which phase it does, and goes on when started.

With times of seconds, where a real run waits for half an hour.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crossmae_jax import train
from crossmae_jax.data import sources
from crossmae_jax.distributed import preemption
from crossmae_jax.distributed.preemption import REQUEUE
from crossmae_jax.runs import watchdog
from tests import processes, tiny

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # of `ended`
)


def start(where, digits_dir, workdir, **changes):
    """Returns status and output of a run that hangs somewhere, see `hanging`."""
    run = subprocess.run(
        [sys.executable, "-m", *arguments(where, digits_dir, workdir, **changes)],
        cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    return run.returncode, run.stdout


def arguments(where, digits_dir, workdir, **changes):
    changes = dict(log_every_steps=1, watchdog_minutes=0.25) | changes
    return ["tests.hanging", where, digits_dir, str(workdir), repr(changes)]


def test_a_run_that_hangs_is_ended_and_started_again_but_not_for_ever(
    digits_dir, tmp_path
):
    sources.make_source(tiny.config(digits_dir).data, "train")  # made once
    status, said = start("start", digits_dir, tmp_path, watchdog_minutes=0.05)
    assert status == REQUEUE and "s in the phase 'start'. Stacks" in said, said
    assert "_for_ever" in said and "in plan" in said
    noted = (tmp_path / "stacks.process_0.txt").read_text()
    assert noted.startswith("error: host 0/1 gave no sign of life for ")
    assert "_for_ever" in noted and "in plan" in noted

    # A worker hangs; its stack is there, too.
    status, said = start("data", digits_dir, tmp_path, data__workers=1)
    assert status == REQUEUE, said
    assert "s in the phase 'data', after step 3. Stacks" in said, said
    assert re.search(r"hanging\.py\", line \d+ in __getitem__", said)
    assert json.loads((tmp_path / "hung.json").read_text()) == {
        "times": 2, "step": 0, "phase": "data"
    }

    # What is being written is no checkpoint yet; the next save waits for it.
    status, said = start("save", digits_dir, tmp_path)
    assert status == 1, said
    assert "in the phase 'save', after step 12" in said
    assert "It is time 3 in a row without a new checkpoint, so the status is 1" in said


def test_threads_that_hang_do_not_keep_a_run_from_ending(digits_dir, tmp_path):
    given = arguments("data", digits_dir, tmp_path / "run", watchdog_minutes=0.0)
    with processes.started([given], tmp_path / "logs") as group:
        group.wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 3,')
        group.processes[0].send_signal(signal.SIGTERM)
        assert group.wait(60) == [REQUEUE], group.all_said()
        assert "Threads that read images do not end; they are left." in group.said(0)
        assert "stopped: step 3 is saved" in group.said(0)


def test_of_two_processes_both_say_who_waits_and_for_what(digits_dir, tmp_path):
    given = [
        arguments(where, digits_dir, tmp_path / "run", watchdog_minutes=0.3)
        for where in ("", "data")
    ]
    with processes.started(given, tmp_path / "logs") as group:
        assert group.wait() == [REQUEUE, REQUEUE], group.all_said()
        for i, phase in enumerate(("step", "data")):
            line = rf"host {i}/2 gave no sign of life for \d+ s in the phase '{phase}'"
            assert re.search(line, group.said(i)), group.all_said()
            assert "_for_ever" in group.said(i) or i == 0
            stacks = tmp_path / "run" / f"stacks.process_{i}.txt"
            assert re.search(line, stacks.read_text())
    assert json.loads((tmp_path / "run" / "hung.json").read_text())["times"] == 1


def test_python_s_lock_held_for_ever_is_found_too(tmp_path):
    program = f"""
import ctypes, pathlib
from crossmae_jax.runs import watchdog
with watchdog.watching(pathlib.Path({str(tmp_path)!r}), minutes=0.02):
    ctypes.PyDLL(None).sleep(60)  # a call that does not let go of the lock
"""
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1 and time.monotonic() - begin < 50
    assert ended.stderr.startswith("Timeout (0:00:02"), ended.stderr
    assert 'File "<string>", line 5 in <module>' in ended.stderr
    assert not list(tmp_path.iterdir())  # which nobody holds


@pytest.fixture
def ended(monkeypatch):
    """With which statuses this process would have been ended."""
    statuses = []

    def leave(status):
        statuses.append(status)
        raise SystemExit  # of the thread

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    return statuses


def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_signs_of_life_keep_a_run_alive(tmp_path, ended):
    with watchdog.watching(tmp_path, minutes=1 / 60) as watch:
        with preemption.stop_requests(watch.alive) as stop:
            for _ in range(15):  # as a long evaluation does, batch by batch
                time.sleep(0.1)
                stop.is_set()
        assert not ended
        _until(lambda: ended)
    assert ended == [REQUEUE]
    number = threading.active_count()
    with watchdog.watching(tmp_path, minutes=0.0):
        assert threading.active_count() == number  # nobody watches


def test_a_newer_checkpoint_is_progress(tmp_path, ended):
    (tmp_path / "run.lock").touch()

    def hang(first):
        number = len(ended)
        with watchdog.watching(tmp_path, minutes=0.001) as watch:
            if first is not None:
                watch.started(first)
            _until(lambda: len(ended) > number)
        noted = json.loads((tmp_path / "hung.json").read_text())
        return ended[-1], noted["times"], noted["step"], noted["phase"]

    assert hang(0) == (REQUEUE, 1, 0, "compile")
    assert hang(None) == (REQUEUE, 2, 0, "start")
    assert hang(300) == (REQUEUE, 1, 300, "compile")
    assert hang(300) == (REQUEUE, 2, 300, "compile")
    assert hang(300)[:2] == (1, 3)
    assert hang(None)[:2] == (1, 4)
    assert hang(400)[:2] == (REQUEUE, 1)
    (tmp_path / "hung.json").write_text("{}")  # damaged: counted anew
    assert hang(400)[:2] == (REQUEUE, 1)
    assert hang(400)[:2] == (REQUEUE, 2)
    (tmp_path / "checkpoints" / "450").mkdir(parents=True)  # of this launch
    assert hang(400) == (REQUEUE, 1, 450, "compile")
    assert hang(None) == (REQUEUE, 2, 450, "start")


def test_the_phase_is_that_of_what_is_waited_for():
    watch, seen = watchdog.Watchdog(), []

    def batches():
        for number in range(2):
            seen.append(watch.phase)
            yield number

    assert watch.phase == "start"
    watch.started(7)
    for number in watch.awaiting(batches()):
        seen.append(watch.phase)
        watch.stepped(8 + number)
        with watch.during("evaluate"), watch.during("save"):
            seen.append(watch.phase)
        seen.append(watch.phase)
    first, then = ["data", "compile", "save", "step"], ["data", "step", "save", "step"]
    assert seen == first + then and watch.step == 9


def test_a_run_tells_what_it_does_and_each_batch_of_an_evaluation(
    digits_dir, tmp_path, monkeypatch
):
    told = []

    class Told(watchdog.Watchdog):
        def alive(self):
            told.append(self.phase)

    @contextlib.contextmanager
    def watching(directory, *, minutes):
        assert directory == tmp_path and minutes == 30.0
        yield Told()

    monkeypatch.setattr(watchdog, "watching", watching)
    rank = dict(rank=dict(every_epochs=0.5, max_images=200))  # in three batches
    train.run(tiny.config(digits_dir, rank), tmp_path)
    groups = [(phase, len(list(each))) for phase, each in itertools.groupby(told)]
    phases = [phase for phase, _ in groups]
    assert phases[:5] == ["start", "compile", "data", "compile", "step"]
    assert phases[5:10] == ["data", "step"] * 2 + ["data"]
    assert phases[-1] == "end" and phases.count("data") == 15 + 1
    assert phases.count("save") >= 3
    evaluated = [number for phase, number in groups if phase == "evaluate"]
    assert len(evaluated) == 2 and all(number >= 1 + 3 for number in evaluated)


def test_a_time_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="watchdog_minutes=-1.0 must be 0 or more"):
        with watchdog.watching(tmp_path, minutes=-1.0):
            pass
