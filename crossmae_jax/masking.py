"""Which patches the encoder sees and which the decoder predicts. Masks are data.

Of N patches, with mask ratio p and prediction ratio gamma (both fractions of ALL
patches; CrossMAE, arXiv 2401.14391, section 3.3), one random permutation is cut into

    visible   = int(N (1 - p))            the encoder's input, in shuffled order
    skipped   = int(N (p - gamma))        neither seen nor predicted
    predicted = N - visible - skipped     the decoder's queries, in raster order

`int` truncates in double precision, as the PyTorch references do: 100 patches at
p = 0.9 leave 9 visible, not 10. MAE (arXiv 2111.06377) is gamma = p.

Every sample draws from its own key, `fold_in(key, sample number)`, so the mask of a
sample depends on nothing but the seed and its number: not on the batch, the device or
the number of hosts. The model never samples; it is handed the `TokenIds`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt


class TokenCounts(NamedTuple):
    """How many patches of an image stay visible and how many are predicted."""

    num_keep: int
    num_pred: int


class TokenIds(NamedTuple):
    """Patch numbers of each sample.

    Attributes:
      keep: visible patches, in the order in which the encoder sees them.
      pred: patches to predict, in raster order.
      restore: inverse of the shuffle: place of each patch in (keep, removed).
    """

    keep: Int[Array, "b v"]
    pred: Int[Array, "b q"]
    restore: Int[Array, "b n"]


def _floor(ratio: float) -> float:
    """Rounds down to three digits, and off the edge where truncation bites."""
    return math.floor((ratio - 1e-9) * 1000) / 1000


def token_counts(
    num_patches: int, *, mask_ratio: float, pred_ratio: float
) -> TokenCounts:
    """Returns the numbers of visible and of predicted patches.

    Raises:
      ValueError: if more would be predicted than was masked, or if nothing is left to
        see or to predict.
    """
    num_keep = int(num_patches * (1 - mask_ratio))
    num_pred = num_patches - num_keep - int(num_patches * (mask_ratio - pred_ratio))
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} must lie between 0 and 1.")
    if pred_ratio > mask_ratio:
        raise ValueError(
            f"pred_ratio={pred_ratio} predicts {int(num_patches * pred_ratio)} of "
            f"{num_patches} patches but mask_ratio={mask_ratio} removes only "
            f"{num_patches - num_keep}; lower pred_ratio or raise mask_ratio."
        )
    if pred_ratio <= 0:
        raise ValueError(f"pred_ratio={pred_ratio} must be above 0.")
    if num_keep < 1:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves none of {num_patches} patches visible; "
            f"lower mask_ratio to {_floor(1 - 1 / num_patches)} or less."
        )
    return TokenCounts(num_keep, num_pred)


def token_ids(
    noise: Float[Array, "b n"], *, num_keep: int, num_pred: int
) -> TokenIds:
    """Orders patches by noise: the smallest stay visible, the largest are predicted."""
    num_patches = noise.shape[1]
    shuffle = jnp.argsort(noise, axis=1, stable=True)
    return TokenIds(
        keep=shuffle[:, :num_keep],
        pred=jnp.sort(shuffle[:, num_patches - num_pred :], axis=1),
        restore=jnp.argsort(shuffle, axis=1),
    )


def sample_token_ids(
    key: Key[Array, ""],
    sample: UInt[Array, "b"],
    *,
    num_patches: int,
    num_keep: int,
    num_pred: int,
) -> TokenIds:
    """Samples ids for each sample number from its own key."""

    def noise(number):
        return jax.random.uniform(jax.random.fold_in(key, number), (num_patches,))

    return token_ids(jax.vmap(noise)(sample), num_keep=num_keep, num_pred=num_pred)


def pred_mask(ids: TokenIds) -> Bool[Array, "b n"]:
    """Returns True where a patch is predicted, and so counts in the loss."""
    rows = jnp.arange(ids.pred.shape[0])[:, None]
    return jnp.zeros(ids.restore.shape, bool).at[rows, ids.pred].set(True)
