"""Image operations on the device.

Images travel as uint8, a quarter of the traffic of float32, and are normalised here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def _per_channel(values: tuple[float, ...], channels: int, name: str) -> Array:
    if len(values) != channels:
        raise ValueError(
            f"config.data.{name} has {len(values)} values {tuple(values)} but images "
            f"have {channels} channels; give one value per channel."
        )
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, channels)


def normalize(
    images: UInt8[Array, "b height width c"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b height width c"]:
    """Scales to 0..1, subtracts the mean of each channel and divides by its std."""
    channels = images.shape[-1]
    return (
        images.astype(jnp.float32) / 255.0 - _per_channel(mean, channels, "mean")
    ) / _per_channel(std, channels, "std")


def unnormalize(
    images: Float[Array, "b height width c"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b height width c"]:
    """Undoes `normalize`, to 0..1; clips what lies outside."""
    channels = images.shape[-1]
    pixels = images * _per_channel(std, channels, "std") + _per_channel(
        mean, channels, "mean"
    )
    return jnp.clip(pixels, 0.0, 1.0)
