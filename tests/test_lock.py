"""Two runs never share a workdir, and what a killed one left is no hindrance."""

import json
import signal
import subprocess
import sys
import time

import pytest

from crossmae_jax import errors, train
from crossmae_jax.runs import lock
from tests import tiny

_HOLD = """
import pathlib, sys, time
from crossmae_jax.runs import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("holding", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the directory `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "run")], text=True,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.communicate()


def as_if_elsewhere(file, **changes):
    """Makes a lock one of another host."""
    holder = json.loads(file.read_text()) | {"host": "other", "namespace": None}
    file.write_text(json.dumps(holder | changes))


def test_a_second_run_is_refused_and_touches_nothing(holder, tmp_path, digits_dir):
    run = tmp_path / "run"
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "config.json").write_text(tiny.config(digits_dir).to_json())
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(errors.SetupError) as refused:
        train.run(tiny.config(digits_dir), run)
    assert f"process {holder.pid}, since 2" in str(refused.value)
    assert "--workdir" in str(refused.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_of_two_that_take_over_at_once_one_is_refused(holder, tmp_path, monkeypatch):
    """The other one writes its own lock after this one has judged the stale one."""
    run, lives = tmp_path / "run", lock._lives
    living = json.loads((run / lock.FILE).read_text())
    stale = living | {"process": 2**22 + 1, "started": "long ago"}
    (run / lock.FILE).write_text(json.dumps(stale))

    def judged(file, found, *others):
        alive = lives(file, found, *others)
        if found == stale:
            assert not alive
            file.write_text(json.dumps(living))
        return alive

    monkeypatch.setattr(lock, "_lives", judged)
    with pytest.raises(errors.SetupError, match=f"process {holder.pid}, since 2"):
        with lock.held(run):
            pass
    assert json.loads((run / lock.FILE).read_text()) == living
    assert [path.name for path in run.iterdir()] == [lock.FILE]


def test_what_a_killed_run_left_is_taken_over_at_once(holder, tmp_path, capsys):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    begun = time.monotonic()
    with lock.held(tmp_path / "run"):
        assert time.monotonic() - begun < 5
        out = capsys.readouterr().out
        assert f"process {holder.pid}, since" in out and "taking over" in out
    assert not (tmp_path / "run" / lock.FILE).exists()


def test_the_number_of_a_process_may_be_anothers_by_now(holder, tmp_path, capsys):
    file = tmp_path / "run" / lock.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"born": "1"}))
    with lock.held(tmp_path / "run"):
        assert "taking over" in capsys.readouterr().out


def test_another_host_holds_it_as_long_as_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "EVERY_SECONDS", 0.2)
    original = lock._this_process
    monkeypatch.setattr(lock, "_this_process", lambda: original() | {"host": "other"})
    with lock.held(tmp_path):
        monkeypatch.setattr(lock, "_this_process", original)
        with pytest.raises(errors.SetupError, match="host other, process"):
            with lock.held(tmp_path):
                pass


def test_another_host_that_does_not_write_any_more_is_dead(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.5)
    with lock.held(tmp_path):
        text = (tmp_path / lock.FILE).read_text()
    (tmp_path / lock.FILE).write_text(text)
    as_if_elsewhere(tmp_path / lock.FILE)
    with lock.held(tmp_path):
        out = capsys.readouterr().out
        assert "watching up to 0.5 s" in out and "taking over" in out


@pytest.mark.parametrize("text", [
    b'{"host": "th', b"", b"[]", b"{}", b"\xff\xfe\x00", b"[" * 100_000,
], ids=lambda text: text[:12].decode(errors="replace"))
def test_a_lock_that_was_never_finished_is_none(tmp_path, text):
    (tmp_path / lock.FILE).write_bytes(text)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["process"]


def test_a_run_that_was_taken_for_dead_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "EVERY_SECONDS", 0.1)
    with lock.held(tmp_path):
        as_if_elsewhere(tmp_path / lock.FILE)
        end, out = time.monotonic() + 20, ""
        while "WARNING" not in out and time.monotonic() < end:
            time.sleep(0.05)
            out += capsys.readouterr().out
        assert "is now of host other" in out
    assert (tmp_path / lock.FILE).exists(), "it is the other's"


def test_a_directory_that_was_made_for_nothing_is_gone(tmp_path):
    with lock.held(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()
