"""What a finished run found: `results.json`, and how it is told.

    {"train/loss": 0.19, "eval/knn/top1": 0.91, "random_init/knn/top1": 0.80, ...}

The baselines stand nowhere else: they are of no step, so metrics.jsonl has none.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from crossmae_jax.runs import workdir

FILE = "results.json"
# Evaluators whose numbers stand beside those of the baselines.
COMPARED = ("knn", "linear")
_TITLES = {
    "eval": "pre-trained", "random_init": "random initialisation",
    "pixels": "raw pixels",
}


def write(directory: Path, found: Mapping[str, int | float]) -> None:
    """Writes what was found at the end; a number that is not finite becomes `null`."""
    finite = {
        name: value if math.isfinite(value) else None for name, value in found.items()
    }
    text = json.dumps(finite, indent=2, allow_nan=False) + "\n"
    workdir.write_whole(directory / FILE, text)


def table(found: Mapping[str, int | float]) -> str:
    """Lays out what was found, the trained features first; "" if nothing compares."""
    rows = {}
    for prefix, title in _TITLES.items():
        row = {
            f"{name}/top1": found[f"{prefix}/{name}/top1"]
            for name in COMPARED if f"{prefix}/{name}/top1" in found
        }
        if row:
            rows[title] = row
    return markdown(rows) if rows else ""


def markdown(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Lays out accuracies as text that is a Markdown table, too.

    Args:
      rows: from the name of the features to the metrics "knn/top1" and "linear/top1",
        either of which may be missing.
    """
    columns = {"knn/top1": "k-NN top-1", "linear/top1": "linear top-1"}
    cells = [["features", *columns.values()]]
    for name, metrics in rows.items():
        shares = [
            f"{100 * metrics[key]:.1f} %" if key in metrics else "-" for key in columns
        ]
        cells.append([name, *shares])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        ) + " |"
        for row in cells
    ]
    rule = "|" + "|".join(
        "-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)
    ) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def counted(seen: int, available: int) -> str:
    """Returns how many of how many, as "50 000/50 000"."""
    return f"{seen:,}/{available:,}".replace(",", " ")
