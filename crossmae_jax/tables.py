"""Tables of text, written as Markdown or HTML, and how the numbers in them are written.

A table is made once, of cells; `markdown` and `report.html.table` write it.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Table(NamedTuple):
    """Cells of text; the first column has names, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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
