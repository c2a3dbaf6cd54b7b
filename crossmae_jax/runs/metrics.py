"""What a run writes about itself: metrics to files, and a progress bar.

    workdir/metrics.jsonl    {"step": 50, "train/loss": 0.71, ...}, one object a line
    workdir/tensorboard/     the same for TensorBoard

Every line is on disk as soon as it is written. A resumed run first drops what the
killed one wrote after its last checkpoint, so a curve has each step once. JSON knows
neither NaN nor infinity: both are `null` in metrics.jsonl, themselves in TensorBoard.

Only process 0 writes and shows anything.
"""

import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

from crossmae_jax.runs import logged, workdir

EARLIER_METRICS = "metrics.earlier.jsonl"


def _number(name: str, value: Any) -> int | float:
    number = np.asarray(value)
    real = number.dtype.kind in "biuf" or number.dtype == jax.numpy.bfloat16
    if number.shape != () or not real:
        raise ValueError(
            f"Metric {name!r} has shape {number.shape} and dtype {number.dtype}; "
            "expected one real number."
        )
    return int(number) if number.dtype.kind in "biu" else float(number)


def _keep_until(path: Path, step: int) -> None:
    """Drops what will be written again, and a last line that a kill cut short.

    That is all of the later steps, and the evaluations of this one.
    """
    kept = []
    for row in logged.rows(path):
        evaluated = any("eval/" in name for name in row)
        if row["step"] < step or row["step"] == step and not evaluated:
            kept.append(json.dumps(row) + "\n")
    workdir.write_whole(path, "".join(kept))


class MetricWriter:
    """Writes metrics to `metrics.jsonl` and to TensorBoard event files.

    Example:
      writer = MetricWriter(workdir, resume_step=step)
      writer.write(step, {"train/loss": 0.7, "train/data_wait": 0.02})
      writer.close()

    Args:
      resume_step: the step of the checkpoint that the run goes on from; lines of later
        steps and evaluations of this one are dropped. None: a fresh start; an earlier
        `metrics.jsonl` (of a run
        that never came to its first checkpoint) becomes `metrics.earlier.jsonl`.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int | None = None):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / logged.FILE
        if path.exists():
            if resume_step is None:
                path.replace(workdir / EARLIER_METRICS)
            else:
                _keep_until(path, resume_step)
        self._file = open(path, "a")
        self._events = event_file_writer.EventFileWriter(str(workdir / "tensorboard"))
        # Makes TensorBoard forget this step and later ones of earlier event files.
        first = 0 if resume_step is None else resume_step + 1
        self._events.add_event(event_pb2.Event(
            wall_time=time.time(), step=first,
            session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
        ))
        self._events.flush()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line of metrics, names such as `train/loss`.

        Raises:
          ValueError: if a value is not one real number, or is named `step`.
        """
        if not self._active:
            return
        if "step" in metrics:
            raise ValueError("A metric cannot be named 'step'; it is the step's name.")
        values = {name: _number(name, value) for name, value in metrics.items()}
        line = {"step": int(step)} | {
            name: value if math.isfinite(value) else None
            for name, value in values.items()
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        summary = summary_pb2.Summary(value=[
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ])
        self._events.add_event(
            event_pb2.Event(wall_time=time.time(), step=int(step), summary=summary)
        )
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._file.close()
            self._events.close()


class Progress:
    """One bar over all steps; in a log file a plain line every few seconds instead.

    Example:
      progress = Progress(total_steps, first_step=step)
      progress.update(step, loss=0.71, images_per_second=2310, data_wait=0.02)
      progress.note("k-NN top-1 0.93")
      progress.close()
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        file: io.TextIOBase | None = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._file = sys.stderr if file is None else file
        self._active = jax.process_index() == 0
        self._total, self._step = total_steps, first_step
        self._every, self._clock = every_seconds, clock
        self._begin: tuple[int, float] | None = None  # after the first, compiling step
        self._values: dict[str, str] = {}
        self._shown: tuple[int, float] | None = None
        self._bar = None
        if self._active and self._file.isatty():
            self._bar = tqdm(
                total=total_steps, initial=first_step, file=self._file, miniters=1,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{desc}",
            )

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        images_per_second: float | None = None,
        data_wait: float | None = None,
    ) -> None:
        """Moves to a step; a value that is not given is shown as it was."""
        if not self._active:
            return
        self._step, now = step, self._clock()
        if self._begin is None:
            self._begin = (step, now)
        if loss is not None:
            self._values["loss"] = f"  loss {loss:.4f}"
        if images_per_second is not None:
            self._values["speed"] = f"  {images_per_second:.0f} images/s"
        if data_wait is not None:
            self._values["wait"] = f"  data wait {data_wait:.0%}"
        done, seconds = step - self._begin[0], now - self._begin[1]
        if done > 0:
            left = seconds / done * (self._total - step)
            self._values["left"] = f"  left {tqdm.format_interval(left)}"
        if self._bar is not None:
            self._bar.set_description_str(self._text(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shown is None or now - self._shown[1] >= self._every:
            self._show_line(now)

    def _text(self) -> str:
        order = ("loss", "speed", "wait", "left")
        return "".join(self._values.get(name, "") for name in order)

    def _show_line(self, now: float) -> None:
        share = f"{self._step / max(self._total, 1):4.0%}"
        print(f"{share}  step {self._step}/{self._total}{self._text()}",
              file=self._file, flush=True)
        self._shown = (self._step, now)

    def note(self, text: str) -> None:
        """Prints a line of text without breaking the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Shows where the run stands, a last time."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
        elif self._shown is not None and self._shown[0] != self._step:
            self._show_line(self._clock())
