"""Windows of a grid, shifted or not, over all of its cells or over some of them.

Swin (arXiv 2103.14030, section 3.2) attends within windows of w x w cells, and in every
other block within windows that are moved by s = w // 2:

    all cells       the grid is rolled by s, so that windows at its border are made of
                    pieces from opposite sides, which do not see each other
    some cells      nothing is rolled: window number (coordinate + w - s) // w, and
                    those at the border have fewer cells (GreenMIM, arXiv 2205.13515,
                    section 3.3, for the visible cells of a masked image)

Both say which cells see each other, and it is the same. A row of the table of relative
position biases belongs to an offset, columns fastest, as in `relative_bias`.

Some cells fill windows unevenly. Where that is cheaper, windows are therefore packed
into groups of w^2 places, within which those of one window see each other (GreenMIM,
section 3.3). Here in the order of the windows: a group is closed as the next window
does not fit. Two neighbours hold more than w^2 cells, so that n cells never need more
than 2 ceil(n / w^2) - 1 groups: a fixed number, whatever the mask. GreenMIM chooses by
dynamic programming, on the host, and its number of groups depends on the mask.
"""

import math
from typing import Any

import einops
import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

APART = -100.0  # added to logits of cells that do not see each other, as in Swin


@flax.struct.dataclass
class Windows:
    """Which cells of a grid are in which group, and who sees whom in it.

    Attributes:
      rows: i[m group s s], row of the bias table for a query and a key of a group;
        of m masks, each that of b / m images in a row.
      apart: bool[m group s s], they do not see each other; None: all do.
      slots: i[m (group s)], the cell at each place of the groups, of too many cells
        where it is empty; None of all cells of a grid.
      back: i[m cells], the place of each cell; None likewise.
      grid: of all cells.
      side: of a window; `shift` how far it is moved.
    """

    rows: Any
    apart: Any
    slots: Any
    back: Any
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    side: int = flax.struct.field(pytree_node=False)
    shift: int = flax.struct.field(pytree_node=False)

    def bias(self, table: Float[Array, "rows h"]) -> Float[Array, "m gh s s"]:
        """Returns what is added to the logits, groups before heads."""
        bias = jnp.take(table, jnp.asarray(self.rows), axis=0)
        if self.apart is not None:
            bias = jnp.where(jnp.asarray(self.apart)[..., None], APART, bias)
        groups = self._rolled_groups
        bias = jnp.broadcast_to(bias, (bias.shape[0], groups, *bias.shape[2:]))
        return einops.rearrange(bias, "m g q k h -> m (g h) q k")

    def grouped(
        self, x: Float[Array, "b n d"], *, num_heads: int
    ) -> Float[Array, "b s gh e"]:
        """Returns vectors by place in a group, and by group and head."""
        if self.slots is None:
            x = x.reshape(-1, *self.grid, x.shape[-1])
            if self.shift:
                x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
            return einops.rearrange(
                x, "b (r p) (c q) (h e) -> b (p q) (r c h) e",
                p=self.side, q=self.side, h=num_heads,
            )
        return einops.rearrange(
            _taken(x, self.slots), "b (g s) (h e) -> b s (g h) e",
            s=self.rows.shape[-1], h=num_heads,
        )

    def ungrouped(
        self, x: Float[Array, "b s gh e"], *, num_heads: int
    ) -> Float[Array, "b n d"]:
        """Returns the vectors as they were before `grouped`."""
        if self.slots is not None:
            x = einops.rearrange(x, "b s (g h) e -> b (g s) (h e)", h=num_heads)
            return _taken(x, self.back)
        x = einops.rearrange(
            x, "b (p q) (r c h) e -> b (r p) (c q) (h e)",
            p=self.side, r=self.grid[0] // self.side, h=num_heads,
        )
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), axis=(1, 2))
        return einops.rearrange(x, "b r c d -> b (r c) d")

    @property
    def _rolled_groups(self):
        if self.slots is not None:
            return self.rows.shape[1]
        return self.grid[0] * self.grid[1] // self.side**2


def fitted(side: int, grid: tuple[int, int], *, stage: int) -> int:
    """Returns the side of the windows of a grid: of one shorter than a window, its own.

    Raises:
      ValueError: if they do not divide the grid.
    """
    side = min(side, *grid)
    if grid[0] % side or grid[1] % side:
        raise ValueError(
            f"encoder.window={side} does not divide the {grid[0]}x{grid[1]} cells of "
            f"stage {stage + 1}; take a divisor of both sides, or images of another "
            "config.data.image_size."
        )
    return side


def shift_of(block: int, *, side: int, grid: tuple[int, int]) -> int:
    """Returns how far the windows of a stage's block are moved: those of every other.

    None are where one window is as long as a side of the grid.
    """
    return side // 2 if block % 2 and min(grid) > side else 0


def of_all(grid: tuple[int, int], *, side: int, shift: int) -> Windows:
    """Returns the windows of all cells of a grid, in raster order."""
    y, x = (axis.reshape(-1) for axis in np.indices((side, side)))
    apart = None
    if shift:
        pieces = [
            np.searchsorted([length - side, length - shift], np.arange(length), "right")
            for length in grid
        ]
        piece = einops.rearrange(
            3 * pieces[0][:, None] + pieces[1][None],
            "(r p) (c q) -> (r c) (p q)", p=side, q=side,
        )
        apart = (piece[:, :, None] != piece[:, None])[None]
    return Windows(
        rows=_rows(y, x, side)[None, None], apart=apart, slots=None, back=None,
        grid=grid, side=side, shift=shift,
    )


def of_some(
    y: Int[Array, "m n"], x: Int[Array, "m n"], *, grid: tuple[int, int], side: int,
    shift: int,
) -> Windows:
    """Returns the windows of some cells of a grid, given by their rows and columns."""
    num_cells = y.shape[1]
    down, across = (length // side + (shift > 0) for length in grid)
    row, column = ((axis + (side - shift if shift else 0)) // side for axis in (y, x))
    # Windows that begin before the grid are number 0; without a shift there are none.
    window = row * across + column
    num_groups, size = groups(num_cells, side)
    if num_groups == 1:
        slots = back = jnp.broadcast_to(jnp.arange(num_cells)[None], window.shape)
    else:
        slots, back = jax.vmap(
            lambda w: _packed(w, down * across, num_groups, size)
        )(window)

    def there(values, empty):
        taken = jnp.take_along_axis(
            values, slots, axis=1, mode="fill", fill_value=empty
        )
        return taken.reshape(-1, num_groups, size)

    window = there(window, -1)
    apart = window[..., :, None] != window[..., None, :]
    rows = jnp.where(apart, 0, _rows(there(y, 0), there(x, 0), side))
    return Windows(
        rows=rows, apart=apart, slots=slots, back=back, grid=grid, side=side,
        shift=shift,
    )


def groups(num_cells: int, side: int) -> tuple[int, int]:
    """Returns how many groups of which size hold some cells of a grid.

    One of all cells, if its products are fewer than those of groups of a window's size.
    """
    size = side**2
    num_groups = 2 * math.ceil(num_cells / size) - 1
    if num_groups * size**2 >= num_cells**2:
        return 1, num_cells
    return num_groups, size


def _rows(y, x, side):
    """Returns the row of the table for each query and key, from their coordinates."""
    down, across = (a[..., :, None] - a[..., None, :] + side - 1 for a in (y, x))
    return down * (2 * side - 1) + across


def _packed(window, num_windows, num_groups, size):
    """Returns the cell at each place of the groups, and the place of each cell."""
    counts = jnp.zeros(num_windows, jnp.int32).at[window].add(1)
    ends = jnp.cumsum(counts)
    starts = ends - counts
    # The first window that does not fit into a group that begins with this one.
    following = (ends[None] - starts[:, None] <= size).sum(1)
    following = jnp.append(following, num_windows)
    begins = jnp.zeros(num_windows + 1, bool).at[0].set(True)
    for _ in range(math.ceil(math.log2(num_windows + 1))):  # 1, 2, 4, ... groups on
        begins = begins.at[following].max(begins)
        following = following[following]
    begins = begins[:-1]
    group = jnp.cumsum(begins) - 1
    first = jax.lax.cummax(jnp.where(begins, starts, 0))
    order = jnp.argsort(window, stable=True)
    place = jnp.arange(len(window)) - first[window[order]]
    place += group[window[order]] * size
    # Numbers of empty places are too large, and differ, as those of gradients must.
    empty = len(window) + jnp.arange(num_groups * size)
    slots = empty.at[place].set(order, unique_indices=True)
    return slots, jnp.zeros_like(order).at[order].set(place, unique_indices=True)


def _taken(x, places):
    """Returns vectors of b images at places of m masks, zeros where there is none."""

    def take(x, places):
        return x.at[:, places].get(
            mode="fill", fill_value=0, unique_indices=True
        )

    m = places.shape[0]
    x = einops.rearrange(x, "(m t) n d -> m t n d", m=m)
    return einops.rearrange(jax.vmap(take)(x, places), "m t n d -> (m t) n d")
