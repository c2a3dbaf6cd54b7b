"""Depth-wise convolution of a grid of tokens: each channel with a filter of its own.

XLA's own convolution, but for CPUs: there it runs the depth-wise kind, above all its
gradients, six to thirty times slower than the same sum as a matrix product over places
(measured on grids of 8 x 8 and 14 x 14, docs/pr_mim.md). The matrices hold the square
of the number of places for each channel, so larger grids keep the convolution.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_LARGEST = 2**25  # numbers in the matrices: 128 MiB of float32; 14 x 14 at width 512


def depthwise_conv(
    x: Float[Array, "b row col d"], kernel: Float[Array, "k k d"]
) -> Float[Array, "b row col d"]:
    """Correlates each channel with its filter; zeros lie around the grid."""
    _, height, width, dim = x.shape
    small = (height * width) ** 2 * dim <= _LARGEST
    return jax.lax.platform_dependent(
        x, kernel, cpu=_product if small else _convolution, default=_convolution
    )


def _convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], window_strides=(1, 1), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )


def _product(x, kernel):
    def places(length):  # k from to: 1 where tap k of the place `to` reads `from`
        offsets = np.arange(kernel.shape[0]) - kernel.shape[0] // 2
        at = np.arange(length)
        return jnp.asarray(
            at[None, :, None] == at[None, None, :] + offsets[:, None, None], x.dtype
        )

    height, width = x.shape[1:3]
    matrix = jnp.einsum("kru,lcv,kld->rcuvd", places(height), places(width), kernel)
    return jnp.einsum("brcd,rcuvd->buvd", x, matrix)
