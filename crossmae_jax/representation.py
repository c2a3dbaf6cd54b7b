"""What a matrix of features is like, without labels: a row per image.

Effective rank: Roy & Vetterli, "The effective rank: a measure of effective
dimensionality", EUSIPCO 2007. With s_1 ... s_m the singular values of the matrix,

    p_i = s_i / (s_1 + ... + s_m),   effective rank = exp(-sum_i p_i log p_i).

It is k where k singular values are equal and the others 0, lies between 1 and the rank,
and changes neither with a rotation of the features nor with their scale. Unlike the
paper we subtract the mean of the rows first: what all images have in common would
otherwise be the largest singular value, and say nothing about how images differ.
"""

import numpy as np
from jaxtyping import Float


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
    # By the first row first: equal rows are then 0 however their mean is rounded.
    shifted = features.astype(np.float64) - features[:1].astype(np.float64)
    singular = np.linalg.svd(shifted - shifted.mean(axis=0), compute_uv=False)
    total = singular.sum()
    if total == 0:
        return 0.0
    share = singular[singular > 0] / total
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))
