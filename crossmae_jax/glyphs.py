"""Oriented gradients as pictures: in each cell a line for each orientation.

A line runs through the middle of its cell along the edge that its gradients come from,
which is perpendicular to them, and is as bright as its value; where lines cross, the
brightest is seen. Bin i of n counts gradients (u, v), u to the right and v downwards,
whose angle a = atan2(u, v) is between i and i + 1 times pi / n, modulo pi
(`targets.hog`). Its line has the angle of the bin's middle, so that it may be off by
half a bin:

    a = (i + 1/2) pi / n,   along (cos a, -sin a), the second number downwards
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float


@functools.lru_cache
def lines(bins: int, side: int) -> Float[np.ndarray, "bins dots"]:
    """Returns a picture in 0..1 of each orientation, of `side` x `side` dots, flat."""
    angles = (np.arange(bins) + 0.5) * np.pi / bins
    right, down = (x[:, None, None] for x in (np.cos(angles), -np.sin(angles)))
    y, x = np.indices((side, side)) - (side - 1) / 2
    along, across = abs(x * right + y * down), abs(x * down - y * right)
    width = max(1.0, side / 16)
    drawn = np.clip(width / 2 + 0.5 - across, 0, 1) * np.clip(side / 2 - along, 0, 1)
    return drawn.reshape(bins, side * side).astype(np.float32)


def drawn(
    values: Float[Any, "*places t"], *, bins: int, side: int
) -> Float[Any, "*places dots"]:
    """Returns a picture in 0..1 of each cell, grey, `side` x `side` dots, flat.

    Of several channels the mean of their values is drawn. Values below 0, which a
    prediction may have, are no line.

    Args:
      values: of NumPy or JAX: the bins of the channels, channels slowest.
    """
    of_channels = values.reshape(*values.shape[:-1], -1, bins)
    bright = of_channels.mean(-2).clip(0, 1)
    drawings = lines(bins, side).reshape(*(1,) * (values.ndim - 1), bins, -1)
    return (bright[..., None] * drawings).max(-2)
