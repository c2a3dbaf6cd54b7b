"""How the parameters of an encoder are drawn: as MAE, SimMIM and BEiT, or Swin do.

Biases are 0 and norms 1 in all of them, but for the bias of the patch projection, which
MAE's authors and Swin's left at PyTorch's default.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

token = nn.initializers.normal(stddev=0.02)


class Init(NamedTuple):
    """How the matrices of a block, or what makes its tokens, are drawn.

    Attributes:
      kernel: of the matrices.
      output: of those whose result is added to the residual stream.
      token: of class token, mask token and trained positions.
      patch_kernel: of the patch projection; likewise `patch_bias`.
    """

    kernel: nn.initializers.Initializer
    output: nn.initializers.Initializer
    token: nn.initializers.Initializer
    patch_kernel: nn.initializers.Initializer
    patch_bias: nn.initializers.Initializer


def bounded(num_inputs: int) -> nn.initializers.Initializer:
    """Returns how PyTorch draws a convolution by default: uniformly, kernel and bias.

    Args:
      num_inputs: of a sum, over the channels and the window.
    """
    bound = num_inputs**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def xavier(number: int, *, patch_dim: int = 1) -> Init:
    """Returns how MAE draws block `number`: Xavier-uniform, tokens normal.

    The bias of the patch projection, of `patch_dim` values, is PyTorch's default.
    """
    matrix = nn.initializers.xavier_uniform()
    return Init(matrix, matrix, token, matrix, bounded(patch_dim))


def truncated(number: int, *, patch_dim: int = 1) -> Init:
    """Returns how SimMIM draws block `number`, from 1.

    Normal with deviation 0.02, cut there, so that what is drawn has 0.0108. Matrices
    whose result is added are divided by sqrt(2 number), as in BEiT.
    """

    def normal(std):
        return nn.initializers.truncated_normal(std, lower=-1.0, upper=1.0)

    output = normal(0.02 / (2 * number) ** 0.5)
    matrix, zeros = normal(0.02), nn.initializers.zeros_init()
    return Init(matrix, output, matrix, matrix, zeros)


def normal(number: int, *, patch_dim: int = 1) -> Init:
    """Returns how Swin (arXiv 2103.14030) draws any block: normal, deviation 0.02.

    Its code cuts at 2, which is never reached. The patch projection is PyTorch's.
    """
    return Init(token, token, token, bounded(patch_dim), bounded(patch_dim))


INITS = {"xavier": xavier, "truncated": truncated, "normal": normal}
