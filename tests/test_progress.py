"""How far a run is: one bar on a terminal, few lines in a log file."""

import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from crossmae_jax.runs.progress import Progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def pass_time(self, seconds):
        self.now += seconds


def test_log_file_gets_few_readable_lines():
    clock, file = Clock(), io.StringIO()
    progress = Progress(400, first_step=0, file=file, clock=clock)
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
    progress = Progress(1000, first_step=900, file=file, clock=clock)
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
        progress = Progress(4, file=terminal)
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


def test_a_terminal_that_was_closed_stops_nothing():
    for bar in (True, False):
        parent, child = pty.openpty()
        terminal = open(child, "w")
        if not bar:
            terminal.isatty = lambda: False  # as through a program's wrapper
        progress = Progress(4, file=terminal, every_seconds=0.0)
        progress.update(1, loss=0.5)
        os.close(parent)
        progress.update(2, loss=0.5)
        progress.note("a note")
        progress.close()
        with pytest.raises(OSError):  # what was to be shown is in its buffer still
            terminal.close()
