"""The layers of every transformer here: patch projection, attention, MLP, blocks.

Pre-norm blocks with exact (erf) GELU and layer norms of epsilon 1e-6, as in MAE
(arXiv 2111.06377, appendix A.1). Queries, keys and values of self-attention come from
ONE matrix, keys and values of cross-attention from another, as in the PyTorch
references: Xavier initialisation then sees the fused matrix, whose bound is smaller by
sqrt(2) than that of separate ones.

`dtype` is the compute type. Parameters, norms and softmax stay float32; norms take the
variance of centred values, since E[x^2] - E[x]^2 cancels when activations have a mean.
With bfloat16 everything else is bfloat16, the residual stream and the gradients of
matrix products included (PyTorch's autocast keeps the residual stream in float32).
"""

from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from crossmae_jax.ops import attention as attention_ops

token_init = nn.initializers.normal(stddev=0.02)


class Decoded(NamedTuple):
    """What a decoder's last block returns, before the norm and linear of its `head`.

    Attributes:
      pred: tokens of the patches to predict.
      visible: tokens of the visible patches, from a decoder that has them.
    """

    pred: Float[Array, "b q d"]
    visible: Float[Array, "b v d"] | None


def dense(features: int, dtype: DTypeLike, **kwargs: Any) -> nn.Dense:
    """Makes a linear layer with the initialisation of MAE: Xavier-uniform, bias 0."""
    return nn.Dense(
        features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), **kwargs
    )


def layer_norm(dtype: DTypeLike, **kwargs: Any) -> nn.LayerNorm:
    """Makes a layer norm of epsilon 1e-6 with float32 statistics."""
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, **kwargs)


class PatchEmbed(nn.Module):
    """Linear projection of patch vectors.

    Equal to a convolution with kernel and stride of one patch, but takes vectors, so
    that only the patches in use are projected.
    """

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, patches: Shaped[Array, "b n t"]) -> Float[Array, "b n d"]:
        bound = patches.shape[-1] ** -0.5  # PyTorch's default bias, kept by MAE

        def bias_init(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return dense(self.dim, self.dtype, bias_init=bias_init, name="proj")(patches)


class Attention(nn.Module):
    """Multi-head attention of `x` over itself, or over `context` when it is given.

    The context may have another width; keys and values are projected from it directly.
    """

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b q d"], context: Float[Array, "b k e"] | None = None
    ) -> Float[Array, "b q d"]:
        dim = x.shape[-1]
        if context is None:
            fused = [dense(3 * dim, self.dtype, name="qkv")(x)]
        else:
            fused = [
                dense(dim, self.dtype, name="q")(x),
                dense(2 * dim, self.dtype, name="kv")(context),
            ]
        q, k, v = (
            part
            for array in fused
            for part in einops.rearrange(
                array, "b n (part h d) -> part b n h d",
                part=array.shape[-1] // dim, h=self.num_heads,
            )
        )
        out = attention_ops.attention(q, k, v)
        out = einops.rearrange(out, "b q h d -> b q (h d)")
        return dense(dim, self.dtype, name="proj")(out)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    mlp_ratio: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        dim = x.shape[-1]
        x = dense(int(dim * self.mlp_ratio), self.dtype, name="fc1")(x)
        return dense(dim, self.dtype, name="fc2")(nn.gelu(x, approximate=False))


class Block(nn.Module):
    """Self-attention and MLP, each on a norm of the residual stream."""

    num_heads: int
    mlp_ratio: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        norm = layer_norm(self.dtype, name="norm1")
        x = x + Attention(self.num_heads, self.dtype, name="attn")(norm(x))
        norm = layer_norm(self.dtype, name="norm2")
        x = x + Mlp(self.mlp_ratio, self.dtype, name="mlp")(norm(x))
        return x


class CrossBlock(nn.Module):
    """Cross-attention to a context, and MLP (arXiv 2401.14391, section 3.2).

    The context is used as it comes: it is normed where it is made. With
    `self_attention` the queries first attend to each other (the paper's ablation).
    """

    num_heads: int
    mlp_ratio: float
    self_attention: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b q d"], context: Float[Array, "b k e"]
    ) -> Float[Array, "b q d"]:
        if self.self_attention:
            norm = layer_norm(self.dtype, name="norm0")
            x = x + Attention(self.num_heads, self.dtype, name="self_attn")(norm(x))
        norm = layer_norm(self.dtype, name="norm1")
        x = x + Attention(self.num_heads, self.dtype, name="cross_attn")(
            norm(x), context
        )
        norm = layer_norm(self.dtype, name="norm2")
        x = x + Mlp(self.mlp_ratio, self.dtype, name="mlp")(norm(x))
        return x
