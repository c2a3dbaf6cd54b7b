"""Attention and norms: against float64, and in float32 where bfloat16 would not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax.models import layers
from crossmae_jax.ops import attention


def _random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _exact(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("queries, keys, dim", [(50, 50, 64), (49, 50, 32), (7, 1, 80)])
def test_attention_is_the_weighted_mean_of_the_values(queries, keys, dim):
    q = _random(2, queries, 3, dim)
    k, v = _random(2, keys, 3, dim, seed=1), _random(2, keys, 3, dim, seed=2)
    out = attention.attention(q, k, v)
    np.testing.assert_allclose(out, _exact(q, k, v), atol=2e-6)


def test_softmax_is_taken_in_float32():
    # Logits of 30 that differ by less than bfloat16 can tell apart there (0.125).
    q = jnp.ones((1, 1, 1, 64), jnp.bfloat16)
    k = jnp.full((1, 2, 1, 64), 3.75, jnp.bfloat16).at[0, 1, 0, :8].add(0.0625)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    v = jnp.broadcast_to(v, (1, 2, 1, 64))
    out = attention.attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out, _exact(q, k, v), atol=4e-3)  # half an ulp at 0.5


@pytest.mark.parametrize(
    "dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float32, 2e-4)]
)
def test_norm_statistics_survive_a_large_mean(dtype, tolerance):
    x = (_random(4, 64) + (100.0 if dtype == jnp.bfloat16 else 1000.0)).astype(dtype)
    norm = layers.layer_norm(dtype)
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=tolerance)
