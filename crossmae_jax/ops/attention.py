"""Scaled dot-product attention, the one function that every model calls.

    out = softmax(q k^T / sqrt(d)) v        with the softmax in float32

Axis order is `[b, length, heads, head_dim]`. Products accumulate in float32 whatever
the input type, and the result has the type of `q`. Queries and keys may differ in
number: self-attention and cross-attention are the same function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "b q h d"], k: Float[Array, "b k h d"], v: Float[Array, "b k h d"]
) -> Float[Array, "b q h d"]:
    """Averages the values for each query, weighted by its products with the keys."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
