"""Losses, one value per example; the caller averages.

Averaging outside keeps weights, masks and reports possible, and lets gradient
accumulation average over micro-batches.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def mse(
    pred: Float[Array, "b q t"], target: Float[Array, "b q t"]
) -> Float[Array, "b"]:
    """Mean squared error over an example's patches and values, in float32."""
    error = pred.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(error**2, axis=(1, 2))
