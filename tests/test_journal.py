"""The log of a launch, by a clock that is told what time it is."""

import json

import jax.numpy as jnp
import pytest

from crossmae_jax.runs import journal


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Loader:
    wait_seconds = 0.0
    num_bad = 0

    def __iter__(self):
        return iter(())


def begun(directory, clock, loader, **changes):
    options = dict(
        total=100, first_step=0, resumed=False, begun=clock.now, images_per_step=64,
        steps_per_epoch=10.0, max_skipped_in_a_row=3, clock=clock,
    ) | changes
    book = journal.Journal(directory, **options)
    book.reading(loader)
    return book


def rows(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def metrics_of(loss, *, total=0, in_a_row=0):
    return {
        "loss": jnp.float32(loss), "lr": jnp.float32(0.5),
        "grad_norm": jnp.float32(loss), "skipped_steps": jnp.int32(total),
        "skipped_in_a_row": jnp.int32(in_a_row),
    }


def test_speed_is_that_of_steps_and_waiting_alone(tmp_path):
    clock, loader = Clock(), Loader()
    with begun(tmp_path, clock, loader) as book:
        clock.now, loader.wait_seconds = clock.now + 70, 9.0
        book.stepped(1, metrics_of(0.9), log=False)  # compiles
        clock.now, loader.wait_seconds = clock.now + 8, 11.5
        with book.spent("evaluate"):
            clock.now += 1000
        clock.now += 2
        with book.spent("save"):
            clock.now += 50
        loader.num_bad = 3
        book.stepped(21, metrics_of(0.75), log=True)
        clock.now += 4
        book.stepped(22, metrics_of(0.5), log=True)
        line = book.finish()
    first, second = rows(tmp_path)
    # 20 steps in 10 seconds, of which 2.5 waiting; then one in 4.
    assert first["train/images_per_second"] == 128.0
    assert (first["train/step_seconds"], first["train/data_wait"]) == (0.5, 0.25)
    assert (first["train/loss"], first["train/lr"]) == (0.75, 0.5)
    assert (first["train/epoch"], first["train/bad_images"]) == (2.1, 3)
    assert second["train/images_per_second"] == 16.0
    assert second["train/step_seconds"] == 4.0 and second["train/data_wait"] == 0.0
    seconds = json.loads((tmp_path / "time.json").read_text())["seconds"]
    assert seconds["compile"] == 61 and seconds["data"] == 11.5
    assert seconds["evaluate"] == 1000 and seconds["save"] == 50
    assert seconds["steps"] == 7.5 + 4 and sum(seconds.values()) == clock.now - 100
    assert first["train/goodput"] == pytest.approx(7.5 / 1130)
    assert line.startswith("goodput 1% of 1134 s")
    assert book.latest == {k: v for k, v in second.items() if k != "step"}


def test_what_ends_in_an_error_is_booked_too(tmp_path):
    clock = Clock()
    with begun(tmp_path, clock, Loader()) as book:
        with pytest.raises(KeyError), book.spent("evaluate"):
            clock.now += 5
            raise KeyError
        book.finish()
    seconds = json.loads((tmp_path / "time.json").read_text())["seconds"]
    assert seconds["evaluate"] == 5


NAN = float("nan")


def test_a_skipped_step_is_told_and_logged_as_null_and_the_run_goes_on(
    tmp_path, capsys
):
    with begun(tmp_path, Clock(), Loader()) as book:
        book.stepped(1, metrics_of(0.5), log=True)
        book.stepped(2, metrics_of(NAN, total=1, in_a_row=1), log=True)
        book.stepped(3, metrics_of(0.25, total=1), log=True)
    first, second, third = rows(tmp_path)
    assert second["train/loss"] is second["train/grad_norm"] is None
    assert (first["train/skipped_steps"], third["train/skipped_steps"]) == (0, 1)
    said = [x for x in capsys.readouterr().err.splitlines() if "skipped" in x]
    assert said == [
        "step 2 was skipped and changed no weight: loss nan, length of the gradient "
        "nan; skipped so far: 1"
    ]


def test_of_many_skipped_steps_every_tenth_is_told(tmp_path, capsys):
    with begun(tmp_path, Clock(), Loader()) as book:
        for step in range(1, 35):
            values = metrics_of(NAN, total=step, in_a_row=step % 2 + 1)
            book.stepped(step, values, log=step == 34)
    said = [x for x in capsys.readouterr().err.splitlines() if "was skipped" in x]
    steps = [int(line.split()[1]) for line in said]
    assert steps == [*range(1, 11), 20, 30]


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path):
    with begun(tmp_path, Clock(), Loader()) as book:
        book.stepped(1, metrics_of(NAN, total=4, in_a_row=1), log=False)
        book.stepped(2, metrics_of(NAN, total=5, in_a_row=2), log=True)
        message = "Not finite 3 times in a row: loss inf, length of the gradient inf"
        with pytest.raises(journal.NotFinite, match=message):
            book.stepped(3, metrics_of(float("inf"), total=6, in_a_row=3), log=True)
    assert [row["step"] for row in rows(tmp_path)] == [2]


def test_a_step_is_looked_at_some_steps_later_where_nothing_is_logged(tmp_path):
    with begun(tmp_path, Clock(), Loader()) as book:
        book.stepped(1, metrics_of(0.5), log=True)
        for step in range(2, 8):
            values = metrics_of(NAN, total=step - 1, in_a_row=step - 1)
            book.stepped(step, values, log=False)
        with pytest.raises(journal.NotFinite, match="Not finite 3 times in a row"):
            book.stepped(8, metrics_of(NAN, total=7, in_a_row=7), log=False)


def test_evaluations_are_written_and_shown(tmp_path, capsys):
    with begun(tmp_path, Clock(), Loader()) as book:
        book.evaluated(4, {"eval/knn/top1": 0.25})
        book.evaluated(5, {})
    assert rows(tmp_path) == [{"step": 4, "eval/knn/top1": 0.25}]
    assert book.latest == {"eval/knn/top1": 0.25}
    assert "step 4  eval/knn/top1 0.25" in capsys.readouterr().err
