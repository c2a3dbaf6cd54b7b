"""How alike the features of blocks or checkpoints are, and what tokens look like.

Nothing here needs labels. The effective rank stands in `evals.rank`, the nearest
neighbours in `evals.knn`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from crossmae_jax.evals.rank import centred


def cka(
    features: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m e"]
) -> float:
    """Returns how alike two sets of features of the same images are, 0 to 1.

    Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414, section 3):

        |Y'X|^2 / (|X'X| |Y'Y|)   with Frobenius norms, X and Y centred

    1 where one is the other rotated and scaled. It is computed from whichever of the
    matrices d x e and n x n is smaller, in float64. Few images flatter it: independent
    features of more dimensions than images are far from 0.

    Raises:
      ValueError: if there are not the same images, two or more, or if all rows of one
        set are equal.
    """
    if len(features) != len(others) or len(features) < 2:
        raise ValueError(
            f"Features of {len(features)} and {len(others)} images; give those of the "
            "same images to both, 2 or more."
        )
    x, y = (centred(values) for values in (features, others))
    if len(x) < max(x.shape[1], y.shape[1]):
        grams = x @ x.T, y @ y.T
        shared, norms = np.sum(grams[0] * grams[1]), [np.linalg.norm(g) for g in grams]
    else:
        shared = np.sum((y.T @ x) ** 2)
        norms = [np.linalg.norm(z.T @ z) for z in (x, y)]
    if not all(norms):
        raise ValueError(
            "All rows of a set of features are equal: there is nothing to compare."
        )
    return float(shared / (norms[0] * norms[1]))


def cka_matrix(
    maps: Sequence[Float[np.ndarray, "n d"]], others: Sequence[Float[np.ndarray, "n e"]]
) -> Float[np.ndarray, "i j"]:
    """Returns `cka` of each of some features (of blocks, say) with each of others."""
    return np.array([[cka(x, y) for y in others] for x in maps])


def principal_colours(
    tokens: Float[np.ndarray, "b n d"], *, grid: tuple[int, int]
) -> Float[np.ndarray, "b row col 3"]:
    """Returns the three main components of patch tokens as red, green and blue, 0..1.

    The components are those of all tokens of all images together, so that a colour
    means the same in each. Of a component's values the lowest and highest hundredth are
    cut off. Which end is dark is arbitrary: here the larger weights point to bright.

    Raises:
      ValueError: if the tokens do not fill the grid (leave the class token out), or
        have less than three dimensions.
    """
    b, n, d = tokens.shape
    if n != grid[0] * grid[1] or d < 3:
        raise ValueError(
            f"{n} tokens of {d} dimensions on a grid of {grid[0]} x {grid[1]}; give a "
            "token of 3 dimensions or more for each patch, without the class token."
        )
    rows = centred(tokens.reshape(b * n, d))
    _, directions = np.linalg.eigh(rows.T @ rows)
    directions = directions[:, ::-1][:, :3]  # eigh's are in ascending order
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, np.arange(3)])
    values = rows @ directions
    low, high = np.percentile(values, [1, 99], axis=0)
    values = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return values.reshape(b, *grid, 3)
