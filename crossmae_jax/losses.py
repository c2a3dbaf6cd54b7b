"""Losses, one value per example; the caller averages.

Averaging outside keeps weights, masks and reports possible, and lets gradient
accumulation average over micro-batches.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def mse(
    pred: Float[Array, "b q t"],
    target: Float[Array, "b q t"],
    weights: Float[Array, "q"] | None = None,
) -> Float[Array, "b"]:
    """Mean squared error over an example's patches and values, in float32.

    With `weights` of the patches their weighted mean.
    """
    error = pred.astype(jnp.float32) - target.astype(jnp.float32)
    if weights is None:
        return jnp.mean(error**2, axis=(1, 2))
    return jnp.sum(jnp.mean(error**2, axis=2) * weights[None], axis=1) / weights.sum()
