"""The numbers of a finished run, `results.json`.

    {"train/loss": 0.19, "eval/knn/top1": 0.91, "random_init/knn/top1": 0.80, ...}

The baselines stand nowhere else: they are of no step, so metrics.jsonl has none.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from crossmae_jax import paths, tables
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import records
from crossmae_jax.tables import Table

FILE = "results.json"
# Evaluators whose numbers stand beside those of the baselines, and their columns.
COMPARED = {"knn": "k-NN top-1", "linear": "linear top-1"}
_TITLES = {
    "eval": "pre-trained", "random_init": "random initialisation",
    "pixels": "raw pixels",
}


def write(directory: Path, metrics: Mapping[str, int | float]) -> None:
    """Writes what was measured; a number that is not finite becomes `null`."""
    finite = {
        name: value if math.isfinite(value) else None for name, value in metrics.items()
    }
    text = json.dumps(finite, indent=2, allow_nan=False) + "\n"
    paths.write_whole(directory / FILE, text)


def read(directory: AnyPath) -> dict[str, int | float]:
    """Returns the numbers of a run that are finite; {} if it is not at its end.

    Likewise of a file that is damaged, and says so.
    """
    metrics = records.recalled(
        directory / FILE, then="its numbers are left out",
        usable=lambda numbers: all(
            value is None or records.is_number(value) for value in numbers.values()
        ),
    )
    return {k: value for k, value in (metrics or {}).items() if value is not None}


def compared(metrics: Mapping[str, int | float]) -> Table | None:
    """Lays out features beside the baselines, those that were trained first.

    Returns:
      None if no features were evaluated; "-" where a number is missing.
    """
    rows = []
    for prefix, title in _TITLES.items():
        names = [f"{prefix}/{name}/top1" for name in COMPARED]
        if any(name in metrics for name in names):
            rows.append((title, *(
                tables.percent(metrics[name]) if name in metrics else "-"
                for name in names
            )))
    return Table(("features", *COMPARED.values()), tuple(rows)) if rows else None
