"""Reads what a run has logged: `metrics.jsonl`, an object with its step in each line.

    {"step": 50, "train/loss": 0.71, "train/lr": 0.0003}
"""

import json
from typing import Any

from crossmae_jax.paths import AnyPath

FILE = "metrics.jsonl"
Curves = dict[str, dict[int, int | float]]  # by metric, its values by step


def rows(path: AnyPath) -> list[dict[str, Any]]:
    """Returns the lines of a file; one that is not written to its end is left out.

    Raises:
      ValueError: for a line that is not an object with a step.
    """
    found = []
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"]
            found.append(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # still being written, or cut short by a kill
            raise ValueError(
                f"{path}, line {number} is not an object with a step: {line[:60]!r}; "
                'expected lines such as {"step": 50, "train/loss": 0.9}. Correct or '
                "remove the line, or move the file away."
            ) from error
    return found


def curves(path: AnyPath) -> Curves:
    """Returns the values of each metric by step.

    What was logged twice, before and after a restart, counts as logged last. `null`,
    which JSON has for what is not finite, is NaN.

    Raises:
      ValueError: for a line that is not an object with a step.
    """
    found: Curves = {}
    for row in rows(path):
        for name, value in row.items():
            if name != "step":
                value = float("nan") if value is None else value
                found.setdefault(name, {})[row["step"]] = value
    return found
