"""What each decoder block adds to a prediction (arXiv 2401.14391, appendix D).

A decoder's last tokens are its first ones plus what each block has added,
f = f_0 + r_1 + ... + r_n, and the prediction is linear(norm(f)). A layer norm is linear
once its statistics are those of f, for all parts alike:

    part_i = linear( scale * (r_i - mean r_i) / std f )

The biases of norm and linear layer go to f_0's part. The sum of the parts is the
prediction.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from crossmae_jax import masking
from crossmae_jax.models import layers, mim
from crossmae_jax.probing import attention_weights

_EPSILON = 1e-6  # of layers.LayerNorm


def contributions(
    model: mim.MaskedImageModel,
    variables: Any,
    images: Float[Array, "b height width c"],
    ids: masking.TokenIds,
) -> Float[Array, "parts b q t"]:
    """Returns the parts of the prediction for `ids.pred`: f_0's, then each block's.

    Raises:
      ValueError: if an aggregator changes tokens between the last block and the head,
        or the head is more than a norm and a linear layer.
    """
    if model.aggregators:
        raise ValueError(
            "This model has an aggregator, which mixes tokens after the last decoder "
            "block: its predictions are no sum over blocks. Take one without."
        )
    weights = variables["params"]["decoder"]
    if not {"decoder_norm", "decoder_pred"} <= weights.keys():
        raise ValueError(
            f"{model.decoder.method}'s decoder brings its tokens to cells before it "
            "predicts: its predictions are no sum over blocks. Take another decoder."
        )
    streams: list[Array] = []

    def watch(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        module = context.module
        if (
            isinstance(module, (layers.Block, layers.CrossBlock))
            and context.method_name == "__call__" and module.path[0] == "decoder"
        ):
            streams.extend([out] if streams else [args[0], out])
        return out

    with nn.intercept_methods(watch), attention_weights.decoding() as calls:
        model.apply(variables, images, ids)
    ((_, (tokens,)),) = calls
    num_visible = tokens.num - ids.pred.shape[1]
    masked = [tokens.replace(sequence=x).behind(num_visible).values for x in streams]
    stream = jnp.stack(masked).astype(jnp.float32)  # i b q e
    last = stream[-1]
    centred = last - last.mean(-1, keepdims=True)
    std = jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + _EPSILON)

    norm, linear = weights["decoder_norm"], weights["decoder_pred"]
    parts = jnp.concatenate([stream[:1], jnp.diff(stream, axis=0)])
    parts = (parts - parts.mean(-1, keepdims=True)) / std[None]
    parts = (parts * norm["scale"].reshape(1, 1, 1, -1)) @ linear["kernel"]
    biases = norm["bias"] @ linear["kernel"] + linear["bias"]
    return parts.at[0].add(jnp.broadcast_to(biases, parts.shape[1:]))


def cumulative(parts: Float[Array, "parts b q t"]) -> Float[Array, "parts b q t"]:
    """Returns the prediction as it is after each block."""
    return jax.lax.cumsum(parts, axis=0)
