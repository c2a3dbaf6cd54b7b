"""Attention as plain XLA, for every platform, type and shape, with its own gradient.

Heads come before tokens here, so that every product is one of matrices that lie as they
are needed. The backward pass computes the weights P again, instead of keeping them,
from the inputs and each query's largest logit and sum of exponentials, as does
FlashAttention (arXiv 2205.14135, section 3.1): with G the gradient of the output
O = P V,

    dV = P^T G,   dS = P * (G V^T - rowsum(G * O)),   dQ = dS K,   dK = dS^T Q,

dQ and dK scaled as the logits are. Forward-mode differentiation is not possible.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    bias: Float[Array, "#b #h q k"] | None = None,
) -> Float[Array, "b q h d"]:
    """Computes attention, the softmax in float32."""
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    logits = _logits(_swap(q), _swap(k), bias)
    largest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    out = _product("bhqk,bhkd->bhqd", weights.astype(v.dtype), _swap(v)) / total
    out = _swap(out.astype(q.dtype))
    return out, (q, k, v, bias, out, largest, total)


def _backward(saved, g):
    *arrays, bias, out, largest, total = saved
    q, k, v, out, g = (_swap(x) for x in (*arrays, out, g))
    scale = q.shape[-1] ** -0.5
    # Not exp(logits - log-sum-exp): beside a large logit the logarithm is rounded away.
    weights = jnp.exp(_logits(q, k, bias) - largest) * (1 / total)
    dv = _product("bhqk,bhqd->bhkd", weights.astype(g.dtype), g)
    dweights = _product("bhqd,bhkd->bhqk", g, v)
    shared = (g.astype(jnp.float32) * out).sum(-1, keepdims=True)
    dlogits = weights * (dweights - shared)
    rounded = dlogits.astype(q.dtype)
    dq = _product("bhqk,bhkd->bhqd", rounded, k) * scale
    dk = _product("bhqk,bhqd->bhkd", rounded, q) * scale
    dbias = None
    if bias is not None:
        repeated = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
        dbias = dlogits.sum(repeated, keepdims=True).astype(bias.dtype)
    gradients = (_swap(x) for x in (dq, dk, dv))
    dq, dk, dv = (x.astype(a.dtype) for x, a in zip(gradients, arrays, strict=True))
    return dq, dk, dv, dbias


attention.defvjp(_forward, _backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _swap(x):
    """Brings heads before tokens, or back."""
    return x.transpose(0, 2, 1, 3)


def _logits(q, k, bias):
    scale = q.shape[-1] ** -0.5
    if q.dtype == jnp.float32:  # fewer numbers than logits; bfloat16 would round them
        logits = _product("bhqd,bhkd->bhqk", q * scale, k)
    else:
        logits = _product("bhqd,bhkd->bhqk", q, k) * scale
    return logits if bias is None else logits + bias.astype(jnp.float32)
