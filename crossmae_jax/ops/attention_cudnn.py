"""Attention by cuDNN's fused kernels, with the padding that odd lengths need.

For training cuDNN refuses some odd lengths (49 queries with 50 keys) and a bias of any
odd extent. So every odd side gets one row of zeros, and the true lengths go along
whenever there is a row to hide; results are cut back. The kernels take bfloat16 and
float16 only. JAX shares their work over the devices of a mesh by itself.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    bias: Float[Array, "#b #h q k"] | None = None,
) -> Float[Array, "b q h d"]:
    """Computes attention by cuDNN, or raises NotImplementedError."""
    check(q, k, v, bias)
    queries, keys = q.shape[1], k.shape[1]
    lengths = {}
    if queries % 2 or keys % 2:
        lengths = {
            "query_seq_lengths": jnp.full(q.shape[:1], queries, jnp.int32),
            "key_value_seq_lengths": jnp.full(q.shape[:1], keys, jnp.int32),
        }
    if bias is not None:
        bias = _even(_even(bias.astype(q.dtype), 2), 3)
    out = jax.nn.dot_product_attention(
        _even(q, 1), _even(k, 1), _even(v, 1), bias, implementation="cudnn", **lengths
    )
    return out[:, :queries]


def _even(x, axis):
    if x.shape[axis] % 2 == 0:
        return x
    return jnp.pad(x, [(0, int(i == axis)) for i in range(x.ndim)])


def check(q, k, v, bias) -> None:
    """Raises NotImplementedError, with the reason, for what cuDNN does not take."""
    dim = q.shape[-1]
    types = (jnp.bfloat16, jnp.float16)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in types:
        raise NotImplementedError(
            "cuDNN's kernels take bfloat16 or float16, one type for all, but"
            f" q={q.dtype}, k={k.dtype}, v={v.dtype}."
        )
    if dim % 8 or dim > 128:
        raise NotImplementedError(
            f"cuDNN's kernels take head sizes of a multiple of 8 up to 128, not {dim}."
        )
    if not _installed():
        raise NotImplementedError("cuDNN was not found; install jax[cuda13].")


@functools.cache
def _installed():
    """Returns whether JAX, which asks for cuDNN as it traces, finds it."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    call = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(call, x, x, x)
    except RuntimeError:
        return False
    return True
