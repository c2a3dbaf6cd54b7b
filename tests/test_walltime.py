"""Where wall time goes, by a clock that is told what time it is."""

import json

import pytest

from crossmae_jax.runs import walltime


class Clock:
    def __init__(self, now):
        self.now, self.waited = now, 0.0

    def __call__(self):
        return self.now


def launch(directory, clock, **changes):
    options = dict(
        begun=clock.now, resuming=False, clock=clock, waited=lambda: clock.waited
    ) | changes
    return walltime.WallTime(directory, **options)


def seconds(directory):
    return json.loads((directory / "time.json").read_text())["seconds"]


def test_every_second_belongs_to_one_kind(tmp_path):
    clock = Clock(1000.0)
    wall_time = launch(tmp_path, clock)
    clock.now += 7
    wall_time.until_now("start")
    clock.now, clock.waited = clock.now + 20, 1.0
    wall_time.until_now("compile")
    clock.now, clock.waited = clock.now + 50, 11.0
    with wall_time.spent("save"):
        clock.now += 3
    clock.now += 9
    with wall_time.spent("evaluate"):
        clock.now += 4
    clock.now, clock.waited = clock.now + 8, 13.0
    wall_time.until_now("steps")
    wall_time.write()
    assert seconds(tmp_path) == {
        "steps": 40 + 9 + 6, "data": 1 + 10 + 2, "compile": 19, "evaluate": 4,
        "refresh": 0, "save": 3, "start": 7, "restart": 0,
    }
    assert sum(seconds(tmp_path).values()) == clock.now - 1000
    assert wall_time.shares()["steps"] == pytest.approx(55 / 101)
    assert str(wall_time) == (
        "goodput 54% of 101 s: steps 54%, data 13%, compile 19%, evaluate 4%, save 3%,"
        " start 7%"
    )


def test_what_a_launch_lost_is_the_restart(tmp_path):
    clock = Clock(0.0)
    first = launch(tmp_path, clock)
    clock.now = 10.0
    first.until_now("steps")
    first.saved()
    clock.now = 18.0  # steps that no checkpoint holds
    first.until_now("steps")
    first.write()
    clock.now = 25.0  # then nothing
    again = launch(tmp_path, clock, resuming=True)
    clock.now = 30.0
    again.until_now("start")
    again.write()
    found = seconds(tmp_path)
    assert (found["steps"], found["restart"], found["start"]) == (10, 8 + 7, 5)
    # And once more, with nothing new to lose.
    third = launch(tmp_path, clock, resuming=True)
    third.write()
    assert seconds(tmp_path) == found


def test_a_finished_run_that_is_looked_at_later_has_no_restart(tmp_path):
    clock = Clock(0.0)
    first = launch(tmp_path, clock)
    clock.now = 10.0
    first.until_now("steps")
    first.write(finished=True)
    clock.now = 1e6
    again = launch(tmp_path, clock, resuming=True)
    assert again.shares()["steps"] == 1


def test_a_fresh_start_counts_from_nothing(tmp_path):
    clock = Clock(0.0)
    first = launch(tmp_path, clock)
    clock.now = 10.0
    first.until_now("steps")
    first.write()
    again = launch(tmp_path, clock)
    again.write()
    assert sum(seconds(tmp_path).values()) == 0


@pytest.mark.parametrize("damage", [
    b"", b"{}", b'{"seconds": {"ste', b"[]", b"\xff\xfe", b'{"a":' * 100_000,
    b'{"seconds": 3, "saved_steps": 0, "until": 1, "finished": false}',
    b'{"seconds": {"steps": "9"}, "saved_steps": 0, "until": 1, "finished": false}',
    b'{"seconds": {"naps": 9}, "saved_steps": 0, "until": 1, "finished": false}',
    b'{"seconds": {"steps": 9}, "saved_steps": NaN, "until": 1, "finished": false}',
    b'{"seconds": {"steps": 9}, "saved_steps": 0, "until": 1, "finished": null}',
], ids=lambda damage: damage[:30].decode(errors="replace"))
def test_sums_that_cannot_be_read_begin_anew_and_say_so(tmp_path, damage, capsys):
    (tmp_path / "time.json").write_bytes(damage)
    clock = Clock(100.0)
    again = launch(tmp_path, clock, resuming=True)
    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path / 'time.json'} is damaged (")
    assert line.endswith("; where the time goes is added up anew.\n")
    assert len(line.splitlines()) == 1 and len(line) < 300
    clock.now += 4
    again.until_now("steps")
    again.write()
    assert seconds(tmp_path) == dict.fromkeys(walltime.KINDS, 0.0) | {"steps": 4}


def test_more_waiting_than_time_is_no_negative_training(tmp_path):
    clock = Clock(0.0)
    wall_time = launch(tmp_path, clock)
    clock.now, clock.waited = 2, 5.0
    wall_time.until_now("steps")
    wall_time.write()
    assert (seconds(tmp_path)["steps"], seconds(tmp_path)["data"]) == (0, 2)
