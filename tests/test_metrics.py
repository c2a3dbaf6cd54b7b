"""Metrics are complete, valid and once a step, in both kinds of files."""

import json
import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from crossmae_jax.runs import metrics


def read_lines(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / metrics.FILE).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_events(workdir, tag):
    events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_metrics_reach_both_files_at_once(tmp_path):
    writer = metrics.MetricWriter(tmp_path / "run")
    writer.write(50, {"train/loss": jnp.float32(0.5), "train/lr": np.float64(1e-300)})
    writer.write(100, {"train/loss": jnp.bfloat16(0.25), "eval/n": np.int64(2**40)})
    # Not closed: what is written must survive a kill.
    assert read_lines(tmp_path / "run") == [
        {"step": 50, "train/loss": 0.5, "train/lr": 1e-300},
        {"step": 100, "train/loss": 0.25, "eval/n": 2**40},
    ]
    assert read_events(tmp_path / "run", "train/loss") == [(50, 0.5), (100, 0.25)]
    writer.close()


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, {"a": float("nan"), "b": np.float32("inf"), "c": jnp.float32(1)})
    writer.close()
    assert read_lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]
    assert math.isnan(read_events(tmp_path, "a")[0][1])
    assert read_events(tmp_path, "b") == [(1, math.inf)]


@pytest.mark.parametrize("value", [np.ones(2), "high", None, 1j])
def test_only_single_numbers_are_metrics(tmp_path, value):
    writer = metrics.MetricWriter(tmp_path)
    with pytest.raises(ValueError, match="'train/loss'.*expected one real number"):
        writer.write(1, {"train/loss": value})
    with pytest.raises(ValueError, match="named 'step'"):
        writer.write(1, {"step": 1})
    writer.close()
    assert read_lines(tmp_path) == []


def test_resumed_curve_has_each_step_once(tmp_path):
    killed = metrics.MetricWriter(tmp_path)
    for step in (10, 20, 30, 40):
        killed.write(step, {"train/loss": step})
    with open(tmp_path / metrics.FILE, "a") as file:
        file.write('{"step": 50, "train/lo')  # cut short by the kill
    resumed = metrics.MetricWriter(tmp_path, resume_step=20)
    for step in (30, 40, 50):
        resumed.write(step, {"train/loss": step + 0.5})
    resumed.close()
    curve = [(10, 10), (20, 20), (30, 30.5), (40, 40.5), (50, 50.5)]
    lines = read_lines(tmp_path)
    assert [(line["step"], line["train/loss"]) for line in lines] == curve
    assert read_events(tmp_path, "train/loss") == curve


def test_fresh_start_puts_the_earlier_curve_aside(tmp_path):
    killed = metrics.MetricWriter(tmp_path)
    killed.write(10, {"train/loss": 1.0})
    time.sleep(1.1)  # TensorBoard orders event files by the seconds in their names
    fresh = metrics.MetricWriter(tmp_path)
    fresh.write(10, {"train/loss": 2.0})
    fresh.close()
    assert read_lines(tmp_path) == [{"step": 10, "train/loss": 2.0}]
    assert '"train/loss": 1.0' in (tmp_path / metrics.EARLIER_FILE).read_text()
    assert read_events(tmp_path, "train/loss") == [(10, 2.0)]


@pytest.mark.parametrize("line", [
    b"[2]", b"\xff\xfe\x00", b'{"loss": 1}', b'{"step": "2"}', b"[" * 100_000,
    b'{"step": 2, "train/loss": "low"}', b'{"step": 2, "train/loss": {}}',
], ids=lambda line: line[:30].decode(errors="replace"))
def test_damaged_line_in_the_middle_is_an_error(tmp_path, line):
    path = tmp_path / metrics.FILE
    text = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(text)
    with pytest.raises(ValueError, match="line 2 is not an object with a") as refused:
        metrics.MetricWriter(tmp_path, resume_step=3)
    message = str(refused.value)
    assert message.startswith(str(path)) and "move the file away" in message
    assert len(message) < 300 + len(str(path))
    assert path.read_bytes() == text
    path.write_bytes(text[: -len(b'\n{"step": 3}\n')])  # cut short by a kill
    metrics.MetricWriter(tmp_path, resume_step=1).close()
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("left, state", [
    (None, "is gone"), ("", "is empty"), ('{"step": 4, "a": 1}\n', "ends at step 4"),
])
def test_a_curve_that_lacks_steps_is_mentioned_when_the_run_goes_on(
    tmp_path, left, state, capsys
):
    path = tmp_path / metrics.FILE
    if left is not None:
        path.write_text(left)
    writer = metrics.MetricWriter(tmp_path, resume_step=8)
    writer.write(9, {"a": 2})
    writer.close()
    assert capsys.readouterr().out == (
        f"{path} {state}, though the run goes on from step 8: the curve has nothing of "
        "the steps between.\n"
    )
    assert path.read_text() == (left or "") + '{"step": 9, "a": 2}\n'
    metrics.MetricWriter(tmp_path, resume_step=9).close()
    metrics.MetricWriter(tmp_path / "new").close()
    assert capsys.readouterr().out == ""


def test_the_newest_values_of_training_are_known_to_a_launch_that_makes_no_step(
    tmp_path
):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, {"train/loss": 0.5, "train/old": 1.0})
    writer.write(2, {"train/loss": float("nan"), "train/bad_images": 3})
    writer.write(2, {"eval/knn/top1": 0.5})
    writer.write(3, {"train/loss": 0.125})
    writer.close()
    assert writer.latest == {}
    again = metrics.MetricWriter(tmp_path, resume_step=2)
    again.close()
    latest = dict(again.latest)
    assert math.isnan(latest.pop("train/loss"))
    assert latest == {"train/old": 1.0, "train/bad_images": 3}


def test_tensorboard_files_need_no_tensorflow(tmp_path):
    code = f"""
        import sys
        sys.modules["tensorflow"] = None  # as if it were not installed
        from crossmae_jax.runs import metrics
        writer = metrics.MetricWriter({str(tmp_path)!r})
        writer.write(3, {{"train/loss": 0.5}})
        writer.close()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True,
        cwd=Path(__file__).parents[1],
    )
    assert read_events(tmp_path, "train/loss") == [(3, 0.5)]
