"""A disk that is full, read-only or gone loses nothing, and is said in a line."""

import errno
import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from crossmae_jax import errors, train
from crossmae_jax.checkpoints import checkpointer, space, steps
from crossmae_jax.data.sets import digits
from crossmae_jax.report import run_page
from crossmae_jax.runs import events, journal, metrics, results, walltime
from crossmae_jax.visualize import curves
from tests import full_disk, tiny
from tests.states import (
    abstract,
    assert_same,
    make_state,
    payload,
    reopen,
    saved,
)
from tests.test_ownership import unprivileged

__all__ = ["saved", "unprivileged"]  # fixtures
ROOT = Path(__file__).parent.parent


def _metrics(place):
    writer = metrics.MetricWriter(place)
    writer.write(1, {"train/loss": 1.0})
    return place / metrics.FILE, lambda: writer.write(2, {"train/loss": 2.0})


def _events(place):
    writer = events.Events(place, first_step=0)
    writer.write(1, {"loss": 1.0})
    file, = (place / "tensorboard").iterdir()
    return file, lambda: writer.write(2, {"loss": 2.0})


def _time(place):
    clock = walltime.WallTime(place, begun=0.0, resuming=False, waited=lambda: 0.0)
    clock.write()
    return place / walltime.FILE, clock.write


def _curve(place):
    (place / metrics.FILE).write_text('{"step": 1, "train/loss": 0.5}\n')
    draw = functools.partial(
        curves.loss_curve, place / metrics.FILE, place / "curve.png"
    )
    return draw(), draw


def _results(place):
    write = functools.partial(results.write, place, {"train/loss": 1.0})
    write()
    return place / results.FILE, write


def _page(place):
    (place / metrics.FILE).write_text('{"step": 1, "train/loss": 0.5}\n')
    (place / "config.json").write_text(tiny.config("none").to_json())
    return run_page.write(place), lambda: run_page.write(place)


WRITERS = [_metrics, _events, _time, _curve, _results, _page]


@pytest.mark.parametrize("begun", WRITERS)
def test_what_does_not_fit_is_named_and_what_was_there_is_whole(tmp_path, begun):
    file, write = begun(tmp_path)
    before = file.read_bytes()
    with full_disk.beyond(len(before) // 2), pytest.raises(space.DiskError) as full:
        with space.writing(tmp_path):
            write()
    line, = str(full.value).splitlines()
    assert f"File too large: '{file}'. " in line
    assert f"are free on the disk of {tmp_path}/checkpoints" in line
    assert file.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_line_that_was_cut_by_a_full_disk_is_dropped_by_the_next_launch(tmp_path):
    file, write = _metrics(tmp_path)
    with full_disk.beyond(file.stat().st_size + 10), pytest.raises(OSError):
        write()
    assert not file.read_bytes().endswith(b"\n")
    metrics.MetricWriter(tmp_path, resume_step=1).close()
    assert metrics.rows(file) == [{"step": 1, "train/loss": 1.0}]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_does_not_fit_is_a_line_that_says_what_may_go(saved):
    checkpoints, state = reopen(saved), make_state(3)
    shutil.copytree(saved / "10", saved / "5.damaged")
    with full_disk.beyond(500), pytest.raises(space.DiskError) as full:
        checkpoints.save(30, state, wait=True)
    line, = str(full.value).splitlines()
    assert line.startswith(f"Step 30 could not be saved in {saved}: ")
    assert "File too large" in line and f"are free on the disk of {saved}. " in line
    sizes = [space.num_bytes(saved / name) for name in ("5.damaged", "10")]
    assert sizes[0] > 1000
    assert (
        f": 5.damaged ({space.shown(sizes[0])}), 30.orbax-checkpoint-tmp (" in line
    )
    assert f", 10 ({space.shown(sizes[1])}); python -m crossmae_jax checkpoints" in line
    assert line.endswith(" The same command goes on from step 20.")
    assert checkpoints.steps() == [10, 20]
    # Not step 30: Orbax may still be writing what is left of it.
    checkpoints.save(40, state, wait=True)
    step, restored = checkpoints.restore_latest(abstract(state))
    assert step == 40
    assert_same(restored, state)


def test_what_the_run_goes_on_from_and_what_stays_for_good_may_not_go(saved):
    assert "What may be deleted there: 10 (" in space.cure(saved)
    steps.mark_for_good(saved / "10", 10)
    assert "No checkpoint there may be deleted" in space.cure(saved)
    shutil.copytree(saved / "20", saved / "30")
    assert f"deleted there: 20 ({space.shown(space.num_bytes(saved / '20'))}); " in (
        space.cure(saved)
    )
    payload(saved / "30").unlink()
    assert "No checkpoint there may be deleted" in space.cure(saved)


@pytest.fixture
def dead(monkeypatch, tmp_path):
    """Lets all that is asked of a directory fail, as a mount that is dead does."""
    directory = tmp_path / "mount"

    def kill(number):
        def failing(function):
            def fail(path, *others, **options):
                if str(path).startswith(str(directory)):
                    raise OSError(number, os.strerror(number), str(path))
                return function(path, *others, **options)

            return fail

        for name in ("stat", "lstat", "statvfs", "scandir", "listdir", "mkdir"):
            monkeypatch.setattr(os, name, failing(getattr(os, name)))
        with pytest.raises(OSError, match=os.strerror(number)):
            directory.is_dir()

    directory.mkdir()
    return directory, kill


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.EIO])
def test_a_mount_that_is_dead_is_a_line(dead, number):
    mount, kill = dead
    kill(number)
    failed = OSError(number, os.strerror(number), str(mount / "metrics.jsonl"))
    with pytest.raises(space.DiskError) as gone, space.writing(mount):
        raise failed
    assert str(gone.value) == f"{mount} is gone: {failed}."
    with pytest.raises(space.DiskError) as unsaved:
        with space.saving(mount / "checkpoints", 30):
            raise failed
    line, = str(unsaved.value).splitlines()
    assert line.startswith(
        f"Step 30 could not be saved in {mount}/checkpoints: {failed}. The disk cannot "
        f"be reached ([Errno {number}] "
    )
    assert line.endswith("mount it again.")


@pytest.fixture
def room(monkeypatch, tmp_path):
    """Sets how many bytes the disk says are free."""
    usage = shutil.disk_usage(tmp_path)

    def set_free(num_bytes):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: usage._replace(free=num_bytes)
        )

    return set_free


def test_room_is_looked_for_before_each_save_and_said_once_when_it_gets_short(
    saved, room, capsys
):
    state = {"variables": {"w": jnp.zeros(1000)}, "step": jnp.zeros((), jnp.int32)}
    checkpoints = reopen(saved)
    room(2 * 4004)
    checkpoints.save(30, state)
    assert "WARNING" not in capsys.readouterr().out
    room(2 * 4004 - 1)
    for step in (40, 50):
        checkpoints.save(step, state)
    out = capsys.readouterr().out
    warning = "WARNING: there is no room for two more checkpoints of 4.0 kB. "
    assert out.count(warning) == 1
    room(4003)
    with pytest.raises(space.DiskError) as full:
        checkpoints.save(60, state)
    assert f"Step 60 needs 4.0 kB, so it was not saved in {saved}: 4.0 kB are free" in (
        str(full.value)
    )
    assert "What may be deleted there: 40 (" in str(full.value)
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["40", "50"]


def test_where_nothing_may_be_deleted_that_is_said(tmp_path, room):
    room(10)
    with pytest.raises(space.DiskError) as full:
        space.check(tmp_path / "none" / "checkpoints", step=1, needed=11)
    assert str(full.value).endswith(
        "No checkpoint there may be deleted: make room elsewhere on the disk."
    )


def test_a_directory_that_has_become_read_only_is_named(unprivileged):
    writer = walltime.WallTime(
        unprivileged, begun=0.0, resuming=False, waited=lambda: 0.0
    )
    unprivileged.chmod(0o555)
    with pytest.raises(space.DiskError) as refused, space.writing(unprivileged):
        writer.write()
    assert f"Permission denied: '{unprivileged}/time.json'. " in str(refused.value)


@pytest.mark.parametrize("error", [
    FileNotFoundError(2, "No such file", "/elsewhere"), ConnectionResetError(104, "x"),
    errors.FileError("no images"), ValueError("a bug"),
])
def test_errors_of_other_things_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, space.writing(tmp_path):
        raise error
    assert caught.value is error


def test_a_run_whose_directory_vanishes_ends_with_its_name(
    digits_dir, tmp_path, monkeypatch
):
    stepped, moved = journal.Journal.stepped, tmp_path / "moved"

    def vanish(self, step, *others, **options):
        if step == 3:
            while not (tmp_path / "run" / "checkpoints" / "2").exists():
                time.sleep(0.01)
            (tmp_path / "run").rename(moved)
        stepped(self, step, *others, **options)

    monkeypatch.setattr(journal.Journal, "stepped", vanish)
    config = tiny.config(digits_dir, checkpoint__every_epochs=0.15)
    with pytest.raises(space.DiskError) as gone:
        train.run(config, tmp_path / "run")
    line, = str(gone.value).splitlines()
    assert line.startswith(f"{tmp_path}/run is gone: [Errno 2] No such file or")
    assert os.listdir(tmp_path) == ["moved"]  # nothing was begun in its place
    assert checkpointer.newest_step(moved / "checkpoints") == 2


_CONFIG = """
import os
from tests import tiny

def get_config():
    return tiny.config(
        os.environ["DIGITS"], epochs=0.4, checkpoint__every_epochs=0.2,
        log_every_steps=1, data__workers=0, optim__warmup_epochs=0.1,
    )
"""
_LIMITED = """
import sys
from tests import full_disk
from crossmae_jax.commands import train
full_disk.limit(int(sys.argv[1]))
sys.exit(train.main(sys.argv[2:]))
"""


def test_a_run_on_a_full_disk_ends_in_a_line(digits_dir, tmp_path, monkeypatch):
    """As a program, whose every word is seen."""
    config = tmp_path / "config.py"
    config.write_text(_CONFIG)
    run = tmp_path / "run"
    digits.prepare(digits_dir)
    monkeypatch.setenv("DIGITS", digits_dir)
    full = subprocess.run(
        [
            sys.executable, "-c", _LIMITED, "20000", f"--config={config}",
            f"--workdir={run}",
        ],
        # Of a cache of compiled programs what is written would be cut, too.
        env={**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e6"},
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    assert full.returncode == 1
    assert "Traceback" not in full.stderr, full.stderr
    said = full.stderr.splitlines()
    assert len(said) < 15, full.stderr
    refused = f"error: Step 3 could not be saved in {run}/checkpoints"
    assert said[-1].startswith(refused), full.stderr
    assert "File too large" in said[-1]
    written = metrics.rows(run / metrics.FILE)
    assert [row["step"] for row in written] == list(range(1, len(written) + 1))
    assert not (run / "run.lock").exists()
