"""In how many directions the features of images differ; needs no labels.

Effective rank: Roy & Vetterli, "The effective rank: a measure of effective
dimensionality", EUSIPCO 2007. With s_1 ... s_m the singular values of the matrix,

    p_i = s_i / (s_1 + ... + s_m),   effective rank = exp(-sum_i p_i log p_i).

It is k where k singular values are equal and the others 0, lies between 1 and the rank,
and changes neither with a rotation of the features nor with their scale. Unlike the
paper we subtract the mean of the rows first: what all images have in common would
otherwise be the largest singular value, and say nothing about how images differ.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from crossmae_jax.evals import evaluator
from crossmae_jax.evals.evaluator import About, Evaluation, Result, Wanted


@dataclasses.dataclass(frozen=True)
class Rank:
    """The evaluator: of the mean of the patch tokens, on held-out images if it can.

    Attributes:
      max_images: so many images, evenly spread; None: all of the split.
    """

    max_images: int | None = None

    def wanted(self) -> tuple[Wanted, ...]:
        return (Wanted("eval", self.max_images, "features"),)

    def check(self, about: About) -> None:
        limit = self.max_images
        available = about.num_images[evaluator.held_out(about.num_images)]
        images = available if limit is None else min(limit, available)
        if images < 2:
            raise ValueError(
                f"config.evals.rank of {images} images, with max_images={limit} of "
                f"{available}; it says how images differ and needs 2 or more."
            )

    def run(self, evaluation: Evaluation) -> Result:
        """Returns "effective"."""
        split = evaluator.held_out(evaluation.num_images)
        rows = evaluation.features_of(split, self.max_images)
        return Result({"effective": effective_rank(rows.values)})


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
    singular = np.linalg.svd(centred(features), compute_uv=False)
    total = singular.sum()
    if total == 0:
        return 0.0
    share = singular[singular > 0] / total
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def centred(values: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Returns rows, in float64, from which their mean has been taken away."""
    # By the first row first: equal rows are then 0 however their mean is rounded.
    shifted = values.astype(np.float64) - values[:1].astype(np.float64)
    return shifted - shifted.mean(axis=0)
