"""Targets in cells of several sizes, each under a name of its own, such as "hog_4"."""

import math
from collections.abc import Sequence

from crossmae_jax import ranges
from crossmae_jax.tokens import grid_size


def named(
    title: str, cells: Sequence[int], *, image_size: tuple[int, int]
) -> dict[str, int]:
    """Returns the sides of the cells in pixels, by name.

    Raises:
      ValueError: if there is none, or one twice, or the image is no whole number of
        them.
    """
    if not cells or len(set(cells)) < len(cells):
        raise ValueError(
            f"target.cells={cells} must be different sides in pixels, such as "
            "(4, 8, 16, 32)."
        )
    for cell in cells:
        ranges.check("target.cells", cell, least=1)
        grid_size(image_size, cell)
    return {f"{title}_{cell}": cell for cell in cells}


def shown(cells: dict[str, int], *, patch_size: int) -> str:
    """Returns the name of those that are looked at: nearest in size to a patch.

    Of two that are as near, the smaller ones.
    """
    return min(cells, key=lambda name: (
        abs(math.log(cells[name] / patch_size)), cells[name]
    ))


def caption(cells: dict[str, int], name: str) -> str:
    """Returns which cells are shown, and what others are predicted."""
    others = ", ".join(str(side) for other, side in cells.items() if other != name)
    said = f"Shown: cells of {cells[name]} pixels"
    return f"{said}; not shown: cells of {others}." if others else f"{said}."
