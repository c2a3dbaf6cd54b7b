"""Layer norm and GELU with gradients of their own, against JAX's and flax's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax.models import layers
from crossmae_jax.ops import gelu
from tests import drawn


def with_gradients(function, *arrays):
    out, transposed = jax.vjp(function, *arrays)
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype)
    return out, *transposed(weights)


def test_gelu_is_the_exact_one_and_so_is_its_slope():
    x = jnp.concatenate([jnp.linspace(-9, 9, 4001), jnp.array([0.0, -40.0, 40.0])])
    ours = with_gradients(gelu.gelu, x)
    exact = with_gradients(lambda x: nn.gelu(x, approximate=False), x)
    for found, expected in zip(ours, exact, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)
    rough = nn.gelu(x, approximate=True)
    assert np.abs(ours[0] - rough).max() > 1e-4


def test_gelu_of_bfloat16_is_rounded_once():
    x = jnp.linspace(-4, 4, 257).astype(jnp.bfloat16)
    expected = nn.gelu(x.astype(jnp.float32), approximate=False)
    assert gelu.gelu(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        gelu.gelu(x).astype(jnp.float32), expected, rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(3, 5, 48), (7, 48)])
def test_layer_norm_is_flaxs_and_so_are_its_gradients(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    # A mean far from zero: E[x^2] - E[x]^2 would cancel.
    x = jax.random.normal(keys[0], shape) + 30.0
    params = {
        "scale": 1 + 0.3 * jax.random.normal(keys[1], (48,)),
        "bias": jax.random.normal(keys[2], (48,)),
    }
    theirs = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)

    def apply(module):
        return lambda x, params: module.apply({"params": params}, x)

    ours = with_gradients(apply(layers.LayerNorm()), x, params)
    expected = with_gradients(apply(theirs), x, params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_what_is_computed_again_changes_nothing(remat):
    x, context = (
        jax.random.normal(jax.random.key(seed), (2, n, 16))
        for seed, n in ((1, 5), (2, 7))
    )

    def build(remat):
        return layers.CrossBlock(16, 2, 2.0, self_attention=True, remat=remat)

    params, again = (
        jax.jit(build(mode).init)(jax.random.key(0), x, context)
        for mode in ("none", remat)
    )
    jax.tree.map(np.testing.assert_array_equal, params, again)
    kept, recomputed = (
        jax.jit(functools.partial(with_gradients, build(mode).apply))(
            params, x, context
        )
        for mode in ("none", remat)
    )
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def residual_bytes(remat):
    """Returns how much a block keeps for its gradient."""
    block = layers.Block(64, 2, 4.0, remat=remat)
    x = jnp.zeros((4, 9, 64))
    params = drawn.variables(block.init, x)
    _, transposed = jax.eval_shape(lambda x: jax.vjp(block.apply, params, x), x)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(transposed))


def test_the_more_is_computed_again_the_less_is_kept():
    none, selective, full = map(residual_bytes, ("none", "selective", "full"))
    assert full < selective < none
