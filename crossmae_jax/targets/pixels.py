"""What the decoder is asked to predict: pixels, standardised in each patch or raw.

Standardised pixels (MAE, arXiv 2111.06377, section 4.2), for a patch with T values x:

    y = (x - mean x) / sqrt(var x + 1e-6),   var x = sum (x - mean x)^2 / (T - 1)

The variance is the unbiased one, as `torch.Tensor.var` computes it, and the epsilon
lies inside the root. Everything here is float32. Values are centred twice: on a nearly
constant patch the rounding of its mean, divided by a tiny deviation, would otherwise
show in the target.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from crossmae_jax.tokens import patchify

_EPSILON = 1e-6


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch, with the epsilon inside the root."""

    mean: Float[Array, "b n 1"]
    std: Float[Array, "b n 1"]


def _centre(values: Float[Array, "b n t"]) -> Float[Array, "b n t"]:
    values = values - values.mean(-1, keepdims=True)
    return values - values.mean(-1, keepdims=True)


def patch_statistics(values: Float[Array, "b n t"]) -> PatchStatistics:
    """Returns the statistics that standardise each patch.

    Raises:
      ValueError: if a patch has one value only: its variance does not exist.
    """
    if values.shape[-1] < 2:
        raise ValueError(
            "A patch of 1 value cannot be standardised (unbiased variance of one "
            "number); use a larger patch or config.target.normalize=False."
        )
    mean = values.mean(-1, keepdims=True)
    variance = (_centre(values) ** 2).sum(-1, keepdims=True) / (values.shape[-1] - 1)
    return PatchStatistics(mean=mean, std=jnp.sqrt(variance + _EPSILON))


def pixels(
    images: Float[Array, "b height width c"], *, patch_size: int, normalize: bool
) -> Float[Array, "b n t"]:
    """Returns the target of every patch."""
    values = patchify(images, patch_size=patch_size)
    if not normalize:
        return values
    return _centre(values) / patch_statistics(values).std


def to_pixels(
    pred: Float[Array, "b n t"], values: Float[Array, "b n t"], *, normalize: bool
) -> Float[Array, "b n t"]:
    """Turns predictions back into pixel values with the TRUE statistics of `values`."""
    if not normalize:
        return pred
    mean, std = patch_statistics(values)
    return pred * std + mean
