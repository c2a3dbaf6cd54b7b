"""Losses: what each place is wrong by. The caller averages.

Averaging outside keeps weights, masks and reports possible, and lets gradient
accumulation average over micro-batches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mse(
    pred: Float[Array, "*b t"], target: Float[Array, "*b t"]
) -> Float[Array, "*b t"]:
    """Returns the squared error of each value, in float32."""
    return (pred.astype(jnp.float32) - target.astype(jnp.float32)) ** 2


def l1(
    pred: Float[Array, "*b t"], target: Float[Array, "*b t"]
) -> Float[Array, "*b t"]:
    """Returns the absolute error of each value, in float32."""
    return jnp.abs(pred.astype(jnp.float32) - target.astype(jnp.float32))


def cross_entropy(
    pred: Float[Array, "*b t"], target: Float[Array, "*b t"]
) -> Float[Array, "*b 1"]:
    """Returns the cross-entropy of logits against probabilities, in float32.

    With `smooth_labels` it is the label-smoothed loss of fine-tuning, with mixed images
    the loss of their mixed targets.
    """
    log_probabilities = jax.nn.log_softmax(pred.astype(jnp.float32))
    weighted = target.astype(jnp.float32) * log_probabilities
    return -jnp.sum(weighted, axis=-1, keepdims=True)


# Each gives a place's values, whose mean is the loss of the place: [b q v].
LOSSES = {"mse": mse, "l1": l1, "cross_entropy": cross_entropy}


def mean(
    values: Float[Array, "b q v"], weights: Float[Array, "#b q"] | None = None
) -> Float[Array, "b"]:
    """Returns the mean over an example's places and their values.

    Args:
      weights: of the places; all alike if not given.
    """
    if weights is None:
        return values.mean((1, 2))
    return jnp.sum(values.mean(2) * weights, axis=1) / weights.sum(1)


def smooth_labels(
    labels: Int[Array, "b"], *, num_classes: int, smoothing: float
) -> Float[Array, "b classes"]:
    """Returns class probabilities that give `smoothing` evenly to all classes.

    The true class has 1 - smoothing + smoothing / num_classes (arXiv 1512.00567,
    section 7); with smoothing 0 they are one-hot.
    """
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return (1 - smoothing) * one_hot + smoothing / num_classes
