"""The counted cost equals the real model's, traced: its parameters and its products."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from configs import (
    digits_cross,
    digits_mae,
    vitb_cross,
    vitb_cross75,
    vitb_cross_448,
    vitb_mae,
    vith_cross,
    vith_mae,
    vitl_cross,
    vitl_mae,
    vits_cross,
    vits_cross75,
    vits_mae,
)
from crossmae_jax.cost import counting
from crossmae_jax.models import aggregator, vit
from crossmae_jax.objectives import OBJECTIVES


def leaf_counts(config):
    """Returns how many numbers the real model holds, by part; the tables come last."""
    objective = OBJECTIVES[config.objective](config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))

    def total(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    first = total(shapes["params"]["encoder"])
    last = total(shapes["params"].get("aggregator", {}))
    between = total(shapes["params"]) - first - last
    return first, between, last, total(shapes["constants"])


def counted_params(config):
    counted = counting.count(config)
    return (
        counted.encoder_params, counted.decoder_params, counted.aggregator_params,
        counted.table_params,
    )


@pytest.mark.parametrize(
    "module",
    [vits_mae, vitb_mae, vitl_mae, vith_mae, vits_cross, vitb_cross, vitl_cross,
     vith_cross, vitb_cross_448],
    ids=lambda module: module.__name__,
)
def test_parameters_equal_the_real_model(module):
    config = module.get_config()
    assert counted_params(config) == leaf_counts(config)


VARIANTS = [
    dict(zip(("fusion", "decoder_self_attention", "fusion_maps", "fusion_input"), row))
    for row in itertools.chain(
        itertools.product(["last"], [False, True], [None], [True]),
        itertools.product(
            ["inter_block"], [False, True], [None, (0, -1)], [False, True]
        ),
    )
]

AGGREGATORS = [
    (module, dict(zip(("kind", "visible", "kernel_size", "rewrites_retained"), row)))
    for module, visible in (
        (digits_mae, aggregator.VISIBLE), (digits_cross, ("encoder", "zeros"))
    )
    for row in itertools.chain(
        itertools.product(aggregator.AGGREGATORS, visible, [3], [False]),
        [("none", "zeros", 3, False), ("conv", "zeros", 7, True)],
    )
]


def tiny(module, **changes):
    """Returns a small config of 4 x 6 patches whose widths all differ."""
    config = module.get_config()
    config.data.channels, config.data.mean, config.data.std = 2, (0.5,) * 2, (1.0,) * 2
    config.data.image_size = (8, 12)
    config.model.decoder_dim, config.model.mlp_ratio = 48, 2.0
    config.model.update(changes)
    return config


def tiny_throwing(module, changes):
    """Returns a small config with 6 patches visible, 9 decoded, 5 thrown, 4 skipped."""
    config = tiny(module)
    config.masking.update(mask_ratio=0.75, pred_ratio=0.55, throw_ratio=0.2)
    config.model.aggregator.update(changes)
    return config


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_of_every_variant_equal_the_real_model(changes):
    config = tiny(digits_cross, **changes)
    assert counted_params(config) == leaf_counts(config)


def traced_macs(jaxpr):
    """Returns the multiply-adds of all products and convolutions in a traced program.

    Where the program depends on the platform, those of the general branch: a CPU's
    does the same by other means.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "conv_general_dilated":
            _, inputs, *window = equation.params["dimension_numbers"].rhs_spec
            shape = equation.invars[1].aval.shape  # `inputs` are those of one group
            depth = math.prod(shape[axis] for axis in (inputs, *window))
            total += depth * math.prod(equation.outvars[0].aval.shape)
        inners = list(equation.params.values())
        if equation.primitive.name == "cond":
            inners.append(equation.params["branches"][-1])
        for inner in inners:
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += traced_macs(inner)
    return total


def model_macs(config):
    """Returns the multiply-adds of the real model's forward pass of one image."""
    objective = OBJECTIVES[config.objective](config)
    key = jax.random.key(0)
    images = jnp.zeros((1, *config.data.image_size, config.data.channels))
    traced = jax.make_jaxpr(objective.model.apply)(
        jax.eval_shape(objective.init, key), images,
        objective.sample(key, jnp.zeros(1, jnp.uint32)),
    )
    return traced_macs(traced.jaxpr)


def expected_macs(config):
    """Returns the counted cost without the work that this library leaves out."""
    counted = counting.count(config)
    size, patch_size = vit.parse_size(config.model.size)
    patch_dim = patch_size**2 * config.data.channels
    hidden = counted.num_patches - counted.num_keep
    macs = counted.macs - hidden * patch_dim * size.dim
    if config.model.decoder == "mae":
        aggregates = config.model.aggregator.kind != "none"
        unread = counted.num_keep + (0 if aggregates else 1)  # visible, class token
        macs -= unread * config.model.decoder_dim * patch_dim
    return macs


@pytest.mark.parametrize(
    "module", [vitb_mae, vitb_cross, vits_cross75],
    ids=lambda module: module.__name__,
)
def test_multiply_adds_equal_the_real_model(module):
    config = module.get_config()
    assert expected_macs(config) == model_macs(config)


@pytest.mark.parametrize(
    "module", [vitb_mae, vitb_cross75], ids=lambda module: module.__name__
)
def test_multiply_adds_with_an_aggregator_equal_the_real_model(module):
    config = module.get_config()
    config.masking.throw_ratio, config.model.aggregator.kind = 0.5, "conv"
    assert counted_params(config) == leaf_counts(config)
    assert expected_macs(config) == model_macs(config)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_multiply_adds_of_every_variant_equal_the_real_model(changes):
    config = tiny(digits_cross, **changes)
    assert expected_macs(config) == model_macs(config)


@pytest.mark.parametrize("module, changes", AGGREGATORS, ids=str)
def test_every_aggregator_equals_the_real_model(module, changes):
    config = tiny_throwing(module, changes)
    counted = counting.count(config)
    assert (counted.num_keep, counted.num_pred, counted.num_thrown) == (6, 9, 5)
    assert counted_params(config) == leaf_counts(config)
    assert expected_macs(config) == model_macs(config)


def test_the_digits_mae_equals_the_real_model():
    config = digits_mae.get_config()
    assert counted_params(config) == leaf_counts(config)
    assert expected_macs(config) == model_macs(config)
