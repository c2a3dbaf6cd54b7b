"""Relative position bias: a number per head for each offset between two patches.

Added to the logits of self-attention (Swin, arXiv 2103.14030, section 3.2; BEiT, arXiv
2106.08254; SimMIM, arXiv 2111.09886). On a grid of R x C patches there are
(2R - 1)(2C - 1) offsets, and three rows of the table follow them: from the class token
to a patch, from a patch to the class token, and from the class token to itself.

The row of an offset is that of the query less that of the key, columns fastest:

    row = (y_q - y_k + R - 1)(2C - 1) + (x_q - x_k + C - 1)
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

OF_CLASS_TOKEN = 3  # rows of a table behind those of the offsets


def offsets(grid: tuple[int, int]) -> tuple[int, int]:
    """Returns how many offsets there are along each axis of a grid."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def num_rows(grid: tuple[int, int]) -> int:
    """Returns how many rows the table of a grid has."""
    down, across = offsets(grid)
    return down * across + OF_CLASS_TOKEN


def rows(grid: tuple[int, int]) -> np.ndarray:
    """Returns which row of the table is whose: i64[1 + n, 1 + n], query and key.

    The class token comes first.
    """
    across = offsets(grid)[1]
    y, x = (axis.reshape(-1) for axis in np.indices(grid))
    down = y[:, None] - y[None] + grid[0] - 1
    index = np.empty((1 + y.size, 1 + y.size), np.int64)
    index[1:, 1:] = down * across + x[:, None] - x[None] + grid[1] - 1
    last = num_rows(grid) - 1
    index[0, :], index[:, 0], index[0, 0] = last - 2, last - 1, last
    return index


class RelativeBias(nn.Module):
    """The bias of every query and key, from a table that starts at zero."""

    grid: tuple[int, int]
    num_heads: int

    @nn.compact
    def __call__(
        self, places: Int[Array, "b s"] | None = None
    ) -> Float[Array, "#b {self.num_heads} s s"]:
        """Returns what is added to the logits.

        Args:
          places: of each sample's tokens, as `Tokens.places`; None for the class token
            and all patches in raster order, which have one bias in all samples.
        """
        table = self.param(
            "table", nn.initializers.zeros_init(),
            (num_rows(self.grid), self.num_heads),
        )
        bias = table[rows(self.grid)]
        if places is None:
            return bias.transpose(2, 0, 1)[None]
        # Rows of pairs first: one gather of whole rows, whose gradient adds up few
        # images at a time, then of columns.
        chosen = jnp.take(bias, places + 1, axis=0)  # b q n h
        chosen = jnp.take_along_axis(chosen, (places + 1)[:, None, :, None], axis=2)
        return chosen.transpose(0, 3, 1, 2)


def resize(
    table: np.ndarray, *, grid: tuple[int, int], new_grid: tuple[int, int],
    of_class_token: int = OF_CLASS_TOKEN,
) -> np.ndarray:
    """Resizes a table `[rows, heads]` to another grid, as BEiT and SimMIM do.

    Near offsets matter more than far ones, so the known offsets are put at distances
    that grow geometrically, 1, 1 + q, 1 + q + q^2, ..., with the q for which the
    furthest of them is the furthest of the new grid, and the new ones are read off a
    bicubic spline. The rows of the class token stay.

    Args:
      of_class_token: how many there are of these; none in Swin.

    Raises:
      ValueError: if the table has not the rows of `grid`, or a grid is too small for
        a cubic.
    """
    down, across = offsets(grid)
    expected = down * across + of_class_token
    if len(table) != expected:
        raise ValueError(
            f"A table of {len(table)} rows does not fit a grid of {grid[0]}x{grid[1]}: "
            f"expected {expected}."
        )
    if grid == new_grid:
        return table
    if min(*grid, *new_grid) < 3:
        raise ValueError(
            f"A table of a grid of {grid[0]}x{grid[1]} cannot be resized to "
            f"{new_grid[0]}x{new_grid[1]}: both need 3 patches or more a side."
        )
    import scipy.interpolate  # takes longer than most of what starts with a run

    known = [_distances(*sides) for sides in zip(grid, new_grid, strict=True)]
    wanted = [np.arange(1 - side, side, dtype=np.float64) for side in new_grid]
    of_offsets = table[: down * across].astype(np.float64)
    heads = of_offsets.reshape(*offsets(grid), -1).transpose(2, 0, 1)
    resized = [
        scipy.interpolate.RectBivariateSpline(*known, head)(*wanted) for head in heads
    ]
    resized = np.stack(resized, axis=-1).reshape(-1, table.shape[1])
    return np.concatenate([resized.astype(table.dtype), table[down * across :]])


def _distances(side: int, new_side: int) -> np.ndarray:
    """Returns where the offsets of one axis are put, from one end to the other."""
    least, most = 1.01, 1.5
    while most - least > 1e-6:
        ratio = (least + most) / 2
        if (1 - ratio ** (side - 1)) / (1 - ratio) > new_side - 1:
            most = ratio
        else:
            least = ratio
    ahead = np.cumsum(ratio ** np.arange(side - 1))
    return np.concatenate([-ahead[::-1], [0.0], ahead])
