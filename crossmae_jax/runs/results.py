"""The numbers of a finished run, `results.json`, and how numbers are written.

    {"train/loss": 0.19, "eval/knn/top1": 0.91, "random_init/knn/top1": 0.80, ...}

The baselines stand nowhere else: they are of no step, so metrics.jsonl has none. A
table is made once, of cells of text; `markdown` and `report.html.table` write it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from crossmae_jax import paths
from crossmae_jax.paths import AnyPath

FILE = "results.json"
# Evaluators whose numbers stand beside those of the baselines, and their columns.
COMPARED = {"knn": "k-NN top-1", "linear": "linear top-1"}
_TITLES = {
    "eval": "pre-trained", "random_init": "random initialisation",
    "pixels": "raw pixels",
}


class Table(NamedTuple):
    """Cells of text; the first column has names, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write(directory: Path, metrics: Mapping[str, int | float]) -> None:
    """Writes what was measured; a number that is not finite becomes `null`."""
    finite = {
        name: value if math.isfinite(value) else None for name, value in metrics.items()
    }
    text = json.dumps(finite, indent=2, allow_nan=False) + "\n"
    paths.write_whole(directory / FILE, text)


def read(directory: AnyPath) -> dict[str, int | float]:
    """Returns the numbers of a run that are finite; {} if it is not at its end."""
    path = directory / FILE
    metrics = json.loads(path.read_text()) if path.exists() else {}
    return {name: value for name, value in metrics.items() if value is not None}


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
                percent(metrics[name]) if name in metrics else "-" for name in names
            )))
    return Table(("features", *COMPARED.values()), tuple(rows)) if rows else None


def markdown(table: Table) -> str:
    """Writes a table as Markdown that is aligned as text, too."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = "".join(
        f"{'-' * (width + 1)}{':' if place else '-'}|"
        for place, width in enumerate(widths)
    )
    header, *rows = (_padded(line, widths) for line in lines)
    return "\n".join([header, f"|{rule}", *rows])


def _padded(cells: Iterable[str], widths: Iterable[int]) -> str:
    (name, *numbers), (first, *others) = cells, widths
    padded = [name.ljust(first), *map(str.rjust, numbers, others)]
    return f"| {' | '.join(padded)} |"


def is_share(name: str) -> bool:
    """Says whether a metric is a share, 0..1, that people read in percent."""
    return name.endswith(("top1", "top5"))


def percent(share: int | float) -> str:
    """Returns a share as "98.1 %"."""
    return f"{100 * share:.1f} %"


def short(name: str, value: int | float) -> str:
    """Returns a metric as people read it: a share in percent, else four digits."""
    return percent(value) if is_share(name) else f"{value:.4g}"


def exact(value: int | float) -> str:
    """Returns a metric with six digits, as tables of all metrics have it."""
    return f"{value:.6g}"


def grouped(number: int | float, *, decimals: int = 0) -> str:
    """Returns a number with its thousands apart, "50 000"."""
    return f"{number:,.{decimals}f}".replace(",", " ")


def counted(seen: int, available: int) -> str:
    """Returns how many of how many, as "50 000/50 000"."""
    return f"{grouped(seen)}/{grouped(available)}"
