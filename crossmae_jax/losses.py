"""Losses, one value per example; the caller averages.

Averaging outside keeps weights, masks and reports possible, and lets gradient
accumulation average over micro-batches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def smooth_labels(
    labels: Int[Array, "b"], *, num_classes: int, smoothing: float
) -> Float[Array, "b classes"]:
    """Returns class probabilities that give `smoothing` evenly to all classes.

    The true class has 1 - smoothing + smoothing / num_classes (arXiv 1512.00567,
    section 7); with smoothing 0 they are one-hot.
    """
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return (1 - smoothing) * one_hot + smoothing / num_classes


def soft_cross_entropy(
    logits: Float[Array, "b classes"], targets: Float[Array, "b classes"]
) -> Float[Array, "b"]:
    """Cross-entropy of logits against class probabilities, in float32.

    With `smooth_labels` it is the label-smoothed loss of fine-tuning, with mixed images
    the loss of their mixed targets.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(targets.astype(jnp.float32) * log_probabilities, axis=-1)
