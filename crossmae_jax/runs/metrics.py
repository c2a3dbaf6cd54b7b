"""The metrics of a run: `metrics.jsonl`, an object with its step in each line.

    {"step": 50, "train/loss": 0.71, "train/lr": 0.0003}

Every line is on disk as soon as it is written. A resumed run first drops what the
killed one wrote after its last checkpoint, so a curve has each step once. JSON knows
neither NaN nor infinity: both are `null` here, themselves in TensorBoard, for which
`events` writes the same. Only process 0 writes.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from crossmae_jax import paths
from crossmae_jax.paths import AnyPath

FILE = "metrics.jsonl"
EARLIER_FILE = "metrics.earlier.jsonl"
Curves = dict[str, dict[int, int | float]]  # by metric, its values by step


def rows(path: AnyPath) -> list[dict[str, Any]]:
    """Returns the lines of a file; one that is not written to its end is left out.

    Raises:
      ValueError: for a line that is not an object with a step and numbers.
    """
    objects = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and number == len(lines) and not line.endswith(b"\n"):
            break  # still being written, or cut short by a kill
        if row is None:
            shown = line[:60].decode(errors="backslashreplace")
            raise ValueError(
                f"{path}, line {number} is not an object with a step: {shown!r}; "
                'expected lines such as {"step": 50, "train/loss": 0.9}. Correct or '
                "remove the line, or move the file away."
            )
        objects.append(row)
    return objects


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line; None if it is none of ours."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not _is_step(row.get("step")):
        return None
    # Whole numbers of JSON may be larger than any that we compute with.
    numbers = all(
        isinstance(x, (float, type(None)))
        or isinstance(x, int) and abs(x) <= sys.float_info.max for x in row.values()
    )
    return row if numbers else None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def curves(path: AnyPath) -> Curves:
    """Returns the values of each metric by step.

    What was logged twice, before and after a restart, counts as logged last. `null`,
    which JSON has for what is not finite, is NaN.

    Raises:
      ValueError: for a line that is not an object with a step.
    """
    by_metric: Curves = {}
    for row in rows(path):
        for name, value in row.items():
            if name != "step":
                value = float("nan") if value is None else value
                by_metric.setdefault(name, {})[row["step"]] = value
    return by_metric


class MetricWriter:
    """Writes metrics to `metrics.jsonl` and to TensorBoard event files.

    Example:
      writer = MetricWriter(workdir, resume_step=step)
      writer.write(step, {"train/loss": 0.7, "train/data_wait": 0.02})
      writer.close()

    Args:
      resume_step: the step of the checkpoint that the run goes on from; lines of later
        steps and evaluations of this one are dropped. None: a fresh start; an earlier
        `metrics.jsonl` (of a run that never came to its first checkpoint) becomes
        `metrics.earlier.jsonl`. Of a curve that ends before this step, a line says so.

    Attributes:
      latest: of training, the newest value of each metric so far. Those of evaluations
        are measured again at the end.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int | None = None):
        import jax  # here, not above: readers of metrics do without it

        self._active = jax.process_index() == 0
        self.latest: dict[str, int | float] = {}
        if not self._active:
            return
        from crossmae_jax.runs import events  # likewise, it takes half a second

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / FILE
        if resume_step is not None:
            for row in _keep_until(path, resume_step):
                self.latest |= _of_training(row)
        elif path.exists():
            path.replace(workdir / EARLIER_FILE)
        self._file, self._path = open(path, "a"), path
        first_step = 0 if resume_step is None else resume_step + 1
        self._events = events.Events(workdir, first_step=first_step)

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
        with paths.named(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self._events.write(int(step), values)

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            with paths.named(self._path):
                self._file.close()
            self._events.close()


def _number(name: str, value: Any) -> int | float:
    number = np.asarray(value)
    real = number.dtype.kind in "biuf" or number.dtype == ml_dtypes.bfloat16
    if number.shape != () or not real:
        raise ValueError(
            f"Metric {name!r} has shape {number.shape} and dtype {number.dtype}; "
            "expected one real number."
        )
    return int(number) if number.dtype.kind in "biu" else float(number)


def _of_training(row: Mapping[str, Any]) -> dict[str, int | float]:
    return {
        name: math.nan if value is None else value for name, value in row.items()
        if name.startswith("train/")
    }


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops what will be written again, and a last line that a kill cut short.

    That is all of the later steps, and the evaluations of this one.

    Returns:
      The rows that stay.
    """
    kept, there = [], path.exists()
    for row in rows(path) if there else ():
        evaluated = any("eval/" in name for name in row)
        if row["step"] < step or row["step"] == step and not evaluated:
            kept.append(row)
    last = max((row["step"] for row in kept), default=None)
    if last != step:
        from crossmae_jax.distributed import parallel

        state = f"ends at step {last}" if kept else "is empty" if there else "is gone"
        parallel.say(
            f"{path} {state}, though the run goes on from step {step}: the curve has "
            "nothing of the steps between."
        )
    paths.write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
