"""What a traced program multiplies: how often, where, with a gradient or not."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl

from crossmae_jax.cost import products


def matrix(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X, W = matrix(3, 4), matrix(4, 4)  # a product of the two: 3 * 4 * 4


def macs(function, *arguments):
    return sum(each.macs for each in products.trace(function, *arguments))


def test_a_product_has_as_many_as_its_result_times_what_it_sums_over():
    assert macs(jnp.matmul, X, W) == 48
    assert macs(functools.partial(jnp.einsum, "bqd,bkd->bqk"), matrix(2, 5, 7),
                matrix(2, 6, 7)) == 2 * 5 * 6 * 7
    assert macs(jnp.add, X, X) == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_sums_over_its_window_and_the_channels_of_a_group(groups):
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )
    found = macs(convolve, matrix(2, 5, 6, 4), matrix(3, 3, 4 // groups, 8))
    assert found == 2 * 5 * 6 * 8 * 3 * 3 * 4 // groups


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ w.T, x.T @ g))

INSIDE = {
    "jit": jax.jit(jnp.matmul),
    "remat": jax.checkpoint(jnp.matmul),
    "custom gradient": custom,
    "either branch": lambda x, w: jax.lax.cond(
        x.sum() > 0, lambda x: x @ w, lambda x: x, x
    ),
    "the general branch": lambda x, w: jax.lax.platform_dependent(
        x, w, cpu=lambda x, w: x @ w @ w, default=jnp.matmul
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_called_counts_once(name):
    (only,) = products.trace(INSIDE[name], X, W)
    assert only == ((), 48, True)


def test_a_scan_counts_as_often_as_it_runs():
    def scanned(x, w):
        return jax.lax.fori_loop(0, 5, lambda i, x: x @ w, x)

    assert macs(scanned, X, W) == 5 * 48


def test_a_kernel_counts_for_every_step_of_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    multiply = pl.pallas_call(
        kernel, grid=(2, 4), out_shape=matrix(16, 32),
        in_specs=[
            pl.BlockSpec((8, 16), lambda i, j: (i, 0)),
            pl.BlockSpec((16, 8), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
    )
    (only,) = products.trace(multiply, matrix(16, 16), matrix(16, 32))
    assert only == ((), 16 * 16 * 32, True)


def test_a_loop_of_no_fixed_length_is_refused():
    def until_large(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    with pytest.raises(NotImplementedError, match="Write it as a scan"):
        products.trace(until_large, X, W)
    shrunk = jax.lax.while_loop  # without products any loop will do
    assert macs(lambda x: shrunk(lambda x: x.sum() > 9, lambda x: x / 2, x), X) == 0


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="dense")(x)


class Outer(nn.Module):
    def setup(self):
        self.first, self.second = Inner(), Inner()

    def __call__(self, x):
        x = nn.remat(lambda module, x: module.first(x))(self, x)
        return self.product(self.second(x))

    def product(self, x):
        return x @ x.T


def test_each_product_stands_in_its_module():
    params = jax.eval_shape(Outer().init, jax.random.key(0), X)
    found = products.trace(lambda params, x: Outer().apply(params, x) @ x, params, X)
    assert [(each.module, each.macs) for each in found] == [
        (("first", "dense"), 48), (("second", "dense"), 48), ((), 36), ((), 36),
    ]


def differentiated(function, trained, *others):
    return [
        each.differentiated for each in products.trace(function, trained, *others)
    ]


def test_a_gradient_passes_through_what_depends_on_the_trained():
    def chain(trained, x):
        return (x @ x.T) @ (x @ trained) @ (x @ jax.lax.stop_gradient(trained)).T

    assert differentiated(chain, W, X) == [False, True, True, False, True]


def test_a_program_inside_depends_on_what_it_makes_use_of():
    @jax.checkpoint
    def both(trained, x, w):
        return x @ w, x @ trained

    def apart(trained, x, w):
        frozen, tuned = both(trained, x, w)
        return frozen @ w, tuned @ w

    assert differentiated(apart, W, X, W) == [False, True, False, True]


def test_what_a_scan_hands_on_depends_from_its_second_step():
    def scanned(trained, x):
        def step(carry, _):
            x, late = carry
            return (x + trained[:3], late @ late.T @ x), None

        return jax.lax.scan(step, (x, x), length=3)[0]

    assert differentiated(scanned, W, X) == [True, True]
