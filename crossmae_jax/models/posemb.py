"""Position tables: fixed 2-D sine-cosine tables and their bicubic resizing.

For a patch in row y and column x and width D (MAE, arXiv 2111.06377, appendix A, with
the layout of its released weights), with frequencies w_i = 10000^(-i / (D/4)):

    [ sin(x w), cos(x w), sin(y w), cos(y w) ]        D/4 values each

so the first half of the channels encodes the COLUMN. Row 0 of a table belongs to the
class token and is zero. Coordinates are whole numbers and the arithmetic is float64,
rounded to float32 once. NumPy only: tables are made before anything is traced.
"""

import numpy as np


def sincos(grid: tuple[int, int], dim: int) -> np.ndarray:
    """Returns the table `[1 + n, dim]`: class row, then patches in raster order.

    Raises:
      ValueError: if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(
            f"Width {dim} is not a multiple of 4, as a sine-cosine position table "
            f"needs; nearest: {dim // 4 * 4}, {dim // 4 * 4 + 4}."
        )
    frequencies = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.meshgrid(*(np.arange(side) for side in grid), indexing="ij")

    def encode(coordinates):
        angles = coordinates.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    patches = np.concatenate([encode(columns), encode(rows)], axis=1)
    return np.concatenate([np.zeros((1, dim)), patches]).astype(np.float32)


def _bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Returns the `[size_out, size_in]` weights of PyTorch's bicubic interpolation.

    Cubic convolution with A = -0.75, half-pixel centres, borders clamped, and no
    antialiasing when shrinking: `jax.image.resize` differs in the last two.
    """
    a = -0.75
    centre = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((size_out, size_in))
    for tap in range(4):
        x = np.abs(centre - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = ((x - 5) * x + 8) * a * x - 4 * a
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        column = np.clip(first + tap, 0, size_in - 1)
        np.add.at(matrix, (np.arange(size_out), column), weight)
    return matrix


def resize(
    table: np.ndarray, *, grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """Resizes a table `[1 + n, dim]` to another grid; the class row is kept as it is.

    Raises:
      ValueError: if the table does not have `1 + rows * columns` rows.
    """
    if table.shape[0] != 1 + grid[0] * grid[1]:
        raise ValueError(
            f"A position table of {table.shape[0]} rows does not fit a grid of "
            f"{grid[0]}x{grid[1]}: expected 1 + {grid[0] * grid[1]} rows."
        )
    if grid == new_grid:
        return table
    patches = table[1:].reshape(*grid, -1).astype(np.float64)
    patches = np.einsum(
        "yr,xc,rcd->yxd",
        _bicubic_matrix(grid[0], new_grid[0]),
        _bicubic_matrix(grid[1], new_grid[1]),
        patches,
    )
    patches = patches.reshape(-1, table.shape[1]).astype(table.dtype)
    return np.concatenate([table[:1], patches])
