"""Metrics are complete, valid and once a step; speed is that of training alone."""

import fcntl
import io
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from crossmae_jax.runs import logged, metrics


def read_lines(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / logged.FILE).read_text()
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
    with open(tmp_path / logged.FILE, "a") as file:
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
    assert '"train/loss": 1.0' in (tmp_path / metrics.EARLIER_METRICS).read_text()
    assert read_events(tmp_path, "train/loss") == [(10, 2.0)]


def test_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / logged.FILE
    text = '{"step": 1}\n[2]\n{"step": 3}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"line 2 is not an object with a step: '\[2"):
        metrics.MetricWriter(tmp_path, resume_step=3)
    assert path.read_text() == text


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


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def pass_time(self, seconds):
        self.now += seconds


def test_log_file_gets_few_readable_lines():
    clock, file = Clock(), io.StringIO()
    progress = metrics.Progress(400, first_step=0, file=file, clock=clock)
    for step in range(1, 301):
        progress.update(step)
        if step % 100 == 1:
            progress.update(
                step, loss=1 / step, images_per_second=2310.4, data_wait=0.034
            )
        clock.pass_time(0.125)
    progress.note("k-NN top-1 0.93")
    progress.close()
    text = file.getvalue()
    assert "\r" not in text
    assert text.splitlines() == [
        "  0%  step 1/400",
        " 20%  step 81/400  loss 1.0000  2310 images/s  data wait 3%  left 00:39",
        " 40%  step 161/400  loss 0.0099  2310 images/s  data wait 3%  left 00:29",
        " 60%  step 241/400  loss 0.0050  2310 images/s  data wait 3%  left 00:19",
        "k-NN top-1 0.93",
        " 75%  step 300/400  loss 0.0050  2310 images/s  data wait 3%  left 00:12",
    ]


def test_resumed_run_estimates_from_its_own_steps():
    clock, file = Clock(), io.StringIO()
    progress = metrics.Progress(1000, first_step=900, file=file, clock=clock)
    progress.update(901)
    clock.pass_time(20)
    progress.update(911)
    assert file.getvalue().splitlines()[-1] == " 91%  step 911/1000  left 02:58"


def _read_to_the_end(descriptor):
    """Yields what a closed terminal was sent; it may arrive in pieces."""
    try:
        while piece := os.read(descriptor, 100_000):
            yield piece.decode()
    except OSError:  # Linux reports the end of a terminal as an error
        return


def test_terminal_gets_one_bar():
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(child, "w") as terminal:
        progress = metrics.Progress(4, file=terminal)
        for step in range(1, 5):
            progress.update(step, loss=0.5, images_per_second=100.0, data_wait=0.5)
        progress.note("a note")
        progress.close()
    shown = "".join(_read_to_the_end(parent))
    os.close(parent)
    assert "4/4  loss 0.5000  100 images/s  data wait 50%  left 00:00" in shown
    assert "100%|" in shown and "\r" in shown
    assert "a note\r\n" in shown
    assert shown.count("\n") == 2  # the note's, and the one after the bar
