"""Windows of a grid: who sees whom, and groups of cells that fill them unevenly."""

import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax.models import windows


def _pairs(within, table, of_cell):
    """Returns the bias of every query and key [n n h], none where they are apart.

    Args:
      of_cell: the number in raster order of each of the given cells.
    """
    num_heads, num = table.shape[1], of_cell.max() + 1
    numbers = jnp.broadcast_to(
        1 + jnp.asarray(of_cell, jnp.float32)[None, :, None],
        (1, len(of_cell), num_heads),
    )
    grouped = within.grouped(numbers, num_heads=num_heads)
    np.testing.assert_array_equal(
        within.ungrouped(grouped, num_heads=num_heads), numbers
    )
    places, bias = np.asarray(grouped)[0, :, :, 0].astype(int) - 1, within.bias(table)
    found = np.full((num, num, num_heads), np.nan)
    for i, of_head in enumerate(np.asarray(bias)[0]):
        there = places[:, i] >= 0
        seen = np.where(of_head == windows.APART, np.nan, of_head)[there][:, there]
        ids = places[there, i]
        old = found[np.ix_(ids, ids, [i % num_heads])]
        found[np.ix_(ids, ids, [i % num_heads])] = np.where(
            np.isnan(seen), old[..., 0], seen
        )[..., None]
    return found


@pytest.mark.parametrize("grid, side, shift", [
    ((8, 8), 4, 0), ((8, 8), 4, 2), ((6, 12), 3, 1), ((6, 12), 3, 0), ((4, 4), 4, 0),
    ((10, 4), 2, 1),
])
def test_cells_see_those_of_their_window_in_any_order_and_number(grid, side, shift):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=((2 * side - 1) ** 2, 2)), jnp.float32)
    whole = _pairs(
        windows.of_all(grid, side=side, shift=shift), table, np.arange(np.prod(grid))
    )
    y, x = np.divmod(np.arange(np.prod(grid)), grid[1])
    window = [(axis + side - shift) // side for axis in (y, x)]
    together = np.logical_and(*(a[:, None] == a[None] for a in window))
    np.testing.assert_array_equal(np.isnan(whole[..., 0]), ~together)
    down, across = ((a[:, None] - a[None])[together] + side - 1 for a in (y, x))
    np.testing.assert_array_equal(
        whole[together], np.asarray(table)[down * (2 * side - 1) + across]
    )
    # The fewer, the more groups would be too many: one of all cells.
    for num in (np.prod(grid), np.prod(grid) // 2, side**2 // 2):
        some = rng.permutation(np.prod(grid))[:num]
        some[0] = np.prod(grid) - 1
        some = np.unique(some)
        rng.shuffle(some)
        within = windows.of_some(
            jnp.asarray(y[None, some]), jnp.asarray(x[None, some]), grid=grid,
            side=side, shift=shift,
        )
        found = _pairs(within, table, some)
        np.testing.assert_array_equal(
            found[np.ix_(some, some)], whole[np.ix_(some, some)]
        )


@pytest.mark.parametrize("num, side, expected", [
    (768, 7, (31, 49)),  # 12 units of 64 cells, as GreenMIM has them
    (192, 7, (7, 49)), (48, 7, (1, 48)), (49, 7, (1, 49)), (768, 14, (7, 196)),
    (192, 14, (1, 192)), (60, 7, (1, 60)),
])
def test_cells_are_grouped_where_that_takes_fewer_products(num, side, expected):
    assert windows.groups(num, side) == expected


@pytest.mark.parametrize("seed", range(8))
def test_no_mask_needs_more_groups_than_there_are(seed):
    """Worst is one cell less than half of a window beside one more than half."""
    rng = np.random.default_rng(seed)
    side, grid = 3, (12, 12)
    counts = rng.choice([4, 5, 9, 1], size=(4, 4), p=[0.4, 0.4, 0.1, 0.1])
    cells = []
    for (row, column), count in np.ndenumerate(counts):
        for cell in rng.permutation(9)[:count]:
            cells.append((3 * row + cell // 3, 3 * column + cell % 3))
    y, x = (jnp.asarray(axis)[None] for axis in np.array(cells).T)
    within = windows.of_some(y, x, grid=grid, side=side, shift=0)
    placed = np.asarray(within.slots[0])
    assert sorted(placed[placed < len(cells)]) == list(range(len(cells)))
    assert within.rows.shape[1] == 2 * -(-len(cells) // 9) - 1
    assert (np.asarray(within.back) < placed.size).all()
