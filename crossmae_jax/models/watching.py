"""Attention weights, which on the hot path exist in a kernel only, seen from outside.

A method of `layers.Attention` is watched (`nn.intercept_methods`), in float32, and the
layers know nothing of it:

    with recording() as found:  found["decoder/decoder_blocks_0/attn"]: f32 [b h q k]

`attention_map` is one use of it: what the class token attends to, by which AMT weighs
patches (arXiv 2211.15362).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from crossmae_jax.models import layers
from crossmae_jax.models.encoders import Encoder


@contextlib.contextmanager
def recording(
    keep: Callable[[Array], Array] = lambda weights: weights
) -> Iterator[dict[str, Array]]:
    """Collects the weights of every attention that is called meanwhile, by its path.

    Inside of a function that is jitted; it must return what it wants of them. The model
    must be built with remat="none".

    Args:
      keep: what is collected of weights [b h q k]; all of them if not given.
    """
    recorded: dict[str, Array] = {}

    def watch(module, queries, keys, values, bias=None):
        weights = weights_of(module, queries, keys, bias)
        recorded["/".join(module.path)] = keep(weights)
        return None

    with attending(watch):
        yield recorded


def attention_map(
    encoder: Encoder, variables: Any, images: Float[Array, "b height width c"]
) -> Float[Array, "b n"]:
    """Returns where the class token of the last block attends to, from 0 to 1.

    The weights of each head, after the softmax, are moved and scaled so that the least
    is 0 and the greatest 1; then the mean over the heads is taken (AMT, arXiv
    2211.15362; whether it takes weights before the softmax could not be established).
    A head that weighs all patches alike counts as 0.

    Args:
      variables: the encoder's own.
    """
    rows = []

    def watch(module, queries, keys, values, bias=None):
        bias = bias if bias is None else bias[:, :, :1]
        rows.append(weights_of(module, queries[:, :1], keys, bias)[:, :, 0, 1:])
        return None

    with attending(watch):
        encoder.clone(remat="none").apply(variables, images)
    weights = rows[-1]
    weights -= weights.min(2, keepdims=True)
    greatest = weights.max(2, keepdims=True)
    return (weights / jnp.where(greatest > 0, greatest, 1)).mean(1)


def attending(function: Callable[..., Any]) -> contextlib.AbstractContextManager:
    """Calls the function in place of `Attention.attend`; None leaves it to do it.

    Attention within windows is not watched: its weights are of no two places.
    """

    def interceptor(next_function, args, kwargs, context):
        module = context.module
        if isinstance(module, layers.Attention) and not module.in_windows and (
            context.method_name == "attend"
        ):
            out = function(module, *args)
            if out is not None:
                return out
        return next_function(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def weights_of(
    module: layers.Attention, queries: Array, keys: Array, bias: Array | None
) -> Float[Array, "b h q k"]:
    """Returns the softmax weights, in float32."""
    return jax.nn.softmax(scores_of(module, queries, keys, bias), axis=-1)


def scores_of(
    module: layers.Attention, queries: Array, keys: Array, bias: Array | None
) -> Float[Array, "b h q k"]:
    """Returns what the softmax is taken of, in float32."""
    q, k = (
        x.astype(jnp.float32).reshape(*x.shape[:2], module.num_heads, -1)
        for x in (queries, keys)
    )
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return logits if bias is None else logits + bias
