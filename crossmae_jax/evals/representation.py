"""What features are like, without labels: a row per image.

Effective rank: Roy & Vetterli, "The effective rank: a measure of effective
dimensionality", EUSIPCO 2007. With s_1 ... s_m the singular values of the matrix,

    p_i = s_i / (s_1 + ... + s_m),   effective rank = exp(-sum_i p_i log p_i).

It is k where k singular values are equal and the others 0, lies between 1 and the rank,
and changes neither with a rotation of the features nor with their scale. Unlike the
paper we subtract the mean of the rows first: what all images have in common would
otherwise be the largest singular value, and say nothing about how images differ.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def effective_rank(features: Float[np.ndarray, "n d"]) -> float:
    """Returns the effective rank of the centred features, computed in float64.

    It is at most min(n - 1, d): the mean takes one of n directions away. So numbers of
    different n can be compared only while n is well above d. 0.0 if all rows are equal.

    Raises:
      ValueError: for less than two rows, or numbers that are not finite.
    """
    if len(features) < 2:
        raise ValueError(
            f"The effective rank of {len(features)} rows of features; give at least 2, "
            "since it says how images differ."
        )
    if not np.isfinite(features).all():
        raise ValueError(
            "The effective rank of features that are not finite; the weights have "
            "diverged. Lower optim.base_lr or go back to an earlier checkpoint."
        )
    singular = np.linalg.svd(_centred(features), compute_uv=False)
    total = singular.sum()
    if total == 0:
        return 0.0
    share = singular[singular > 0] / total
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


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
    x, y = (_centred(values) for values in (features, others))
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
    rows = _centred(tokens.reshape(b * n, d))
    _, directions = np.linalg.eigh(rows.T @ rows)
    directions = directions[:, ::-1][:, :3]  # eigh's are in ascending order
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, np.arange(3)])
    values = rows @ directions
    low, high = np.percentile(values, [1, 99], axis=0)
    values = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return values.reshape(b, *grid, 3)


def neighbours(
    queries: Float[np.ndarray, "q d"], bank: Float[np.ndarray, "n d"], *, k: int
) -> Int[np.ndarray, "q k"]:
    """Returns which rows of a bank are the most alike, by cosine, the nearest first.

    Raises:
      ValueError: if the bank has less than `k` rows.
    """
    if not 0 < k <= len(bank):
        raise ValueError(f"k={k} neighbours out of {len(bank)}; lower k.")
    unit = [
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for x in (queries.astype(np.float64), bank.astype(np.float64))
    ]
    return np.argsort(-(unit[0] @ unit[1].T), axis=1, kind="stable")[:, :k]


def _centred(values: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    # By the first row first: equal rows are then 0 however their mean is rounded.
    shifted = values.astype(np.float64) - values[:1].astype(np.float64)
    return shifted - shifted.mean(axis=0)
