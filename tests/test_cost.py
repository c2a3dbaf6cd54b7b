"""The counted cost equals published tables, and the real model's parameters."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from configs import (
    digits_cross, digits_mae, vitb_cross, vitb_cross75, vitb_cross_448, vitb_mae,
    vith_cross, vith_cross75, vith_mae, vitl_cross, vitl_cross75, vitl_mae, vits_cross,
    vits_cross75, vits_mae,
)
from crossmae_jax import cost, masking
from crossmae_jax.models import vit
from crossmae_jax.objectives import OBJECTIVES

CONFIGS = {
    "ViT-S/16": (vits_mae, vits_cross75, vits_cross),
    "ViT-B/16": (vitb_mae, vitb_cross75, vitb_cross),
    "ViT-L/16": (vitl_mae, vitl_cross75, vitl_cross),
    "ViT-H/14": (vith_mae, vith_cross75, vith_cross),
}

# Forward GMACs: encoder; decoder and total of MAE, CrossMAE 0.75, CrossMAE 0.25.
GMACS = {
    "ViT-S/16": ("1.143", "1.442", "2.585", "1.351", "2.494", "0.531", "1.674"),
    "ViT-B/16": ("4.408", "5.373", "9.781", "5.250", "9.659", "2.069", "6.477"),
    "ViT-L/16": ("15.377", "5.379", "20.756", "5.417", "20.793", "2.235", "17.612"),
    "ViT-H/14": ("41.433", "7.129", "48.562", "7.306", "48.740", "3.139", "44.572"),
}

# CrossMAE 0.75 and 0.25 as a share of MAE.
SHARES = {
    "ViT-S/16": ("96.5%", "64.8%"),
    "ViT-B/16": ("98.7%", "66.2%"),
    "ViT-L/16": ("100.2%", "84.9%"),
    "ViT-H/14": ("100.4%", "91.8%"),
}

# Millions of parameters: encoder, decoder, tables, sum; of MAE, then of CrossMAE.
PARAMS = {
    "ViT-S/16": (("21.590", "6.615", "0.126", "28.331"),
                 ("21.589", "10.471", "0.126", "32.186")),
    "ViT-B/16": (("85.647", "26.008", "0.252", "111.908"),
                 ("85.646", "41.388", "0.252", "127.286")),
    "ViT-L/16": (("303.100", "26.139", "0.303", "329.542"),
                 ("303.098", "44.540", "0.303", "347.941")),
    "ViT-H/14": (("630.436", "26.178", "0.461", "657.075"),
                 ("630.433", "47.600", "0.461", "678.494")),
}

# Patches; mask and prediction ratio; visible and predicted patches.
TOKENS = [
    (196, 0.75, 0.75, 49, 147),
    (196, 0.75, 0.25, 49, 49),
    (196, 0.75, 0.15, 49, 30),
    (196, 0.65, 0.65, 68, 128),
    (196, 0.85, 0.85, 29, 167),
    (196, 0.9, 0.9, 19, 177),
    (256, 0.75, 0.75, 64, 192),
    (256, 0.75, 0.25, 64, 64),
    (256, 0.75, 0.15, 64, 39),
    (256, 0.65, 0.65, 89, 167),
    (256, 0.85, 0.85, 38, 218),
    (256, 0.9, 0.9, 25, 231),
    (784, 0.75, 0.75, 196, 588),
    (784, 0.75, 0.25, 196, 196),
    (784, 0.75, 0.15, 196, 118),
    (784, 0.65, 0.65, 274, 510),
    (784, 0.85, 0.85, 117, 667),
    (784, 0.9, 0.9, 78, 706),
]


def giga(count):
    return f"{count / 1e9:.3f}"


@pytest.mark.parametrize("name", CONFIGS)
def test_multiply_adds_equal_the_table(name):
    mae, cross75, cross25 = (
        cost.count(module.get_config()) for module in CONFIGS[name]
    )
    assert mae.encoder_macs == cross75.encoder_macs == cross25.encoder_macs
    cells = [mae.encoder_macs]
    for counted in (mae, cross75, cross25):
        cells += [counted.decoder_macs, counted.macs]
    assert tuple(map(giga, cells)) == GMACS[name]
    shares = (f"{counted.macs / mae.macs:.1%}" for counted in (cross75, cross25))
    assert tuple(shares) == SHARES[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_the_table(name):
    mae, cross75, cross25 = (
        cost.count(module.get_config()) for module in CONFIGS[name]
    )
    for counted, cells in ((mae, 0), (cross75, 1), (cross25, 1)):
        parts = (
            counted.encoder_params, counted.decoder_params, counted.table_params,
            counted.params,
        )
        assert tuple(f"{part / 1e6:.3f}" for part in parts) == PARAMS[name][cells]


def test_multiply_adds_at_448_pixels_equal_the_table():
    cells = {}
    for module in (vitb_mae, vitb_cross75, vitb_cross_448):
        config = module.get_config()
        config.data.image_size = (448, 448)
        counted = cost.count(config)
        cells[module] = tuple(
            f"{macs / 1e9:.2f}"
            for macs in (counted.encoder_macs, counted.decoder_macs, counted.macs)
        )
    assert cells == {
        vitb_mae: ("17.91", "25.19", "43.10"),
        vitb_cross75: ("17.91", "22.03", "39.94"),
        vitb_cross_448: ("17.91", "8.60", "26.51"),
    }


@pytest.mark.parametrize("num_patches, mask_ratio, pred_ratio, keep, pred", TOKENS)
def test_token_counts_equal_the_table(num_patches, mask_ratio, pred_ratio, keep, pred):
    assert masking.token_counts(
        num_patches, mask_ratio=mask_ratio, pred_ratio=pred_ratio
    ) == (keep, pred)


def test_a_training_step_is_six_operations_a_multiply_add():
    counted = cost.count(vitb_cross.get_config())
    assert counted.train_flops == 6 * (counted.encoder_macs + counted.decoder_macs)


def leaf_counts(config):
    """Returns how many numbers the real model holds: encoder, other, tables."""
    objective = OBJECTIVES[config.objective](config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))

    def total(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    encoder = total(shapes["params"]["encoder"])
    return encoder, total(shapes["params"]) - encoder, total(shapes["constants"])


def counted_params(config):
    counted = cost.count(config)
    return counted.encoder_params, counted.decoder_params, counted.table_params


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


@functools.cache
def tiny_config():
    config = digits_cross.get_config()
    config.data.channels, config.data.mean, config.data.std = 2, (0.5,) * 2, (1.0,) * 2
    config.data.image_size = (8, 12)
    return config


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_of_every_variant_equal_the_real_model(changes):
    config = tiny_config().copy_and_resolve_references()
    config.model.update(changes)
    config.model.mlp_ratio = 2.0
    assert counted_params(config) == leaf_counts(config)


def traced_macs(jaxpr):
    """Returns the multiply-adds of every matrix product in a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += depth * math.prod(equation.outvars[0].aval.shape)
        for inner in equation.params.values():
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
    counted = cost.count(config)
    size, patch_size = vit.parse_size(config.model.size)
    patch_dim = patch_size**2 * config.data.channels
    hidden = counted.num_patches - counted.num_keep
    macs = counted.macs - hidden * patch_dim * size.dim
    if config.model.decoder == "mae":
        unread = counted.num_patches + 1 - counted.num_pred
        macs -= unread * config.model.decoder_dim * patch_dim
    return macs


@pytest.mark.parametrize(
    "module", [vitb_mae, vitb_cross, vits_cross75],
    ids=lambda module: module.__name__,
)
def test_multiply_adds_equal_the_real_model(module):
    config = module.get_config()
    assert expected_macs(config) == model_macs(config)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_multiply_adds_of_every_variant_equal_the_real_model(changes):
    config = tiny_config().copy_and_resolve_references()
    config.model.update(changes)
    config.model.mlp_ratio = 2.0
    assert expected_macs(config) == model_macs(config)


def test_the_digits_mae_equals_the_real_model():
    config = digits_mae.get_config()
    assert counted_params(config) == leaf_counts(config)
    assert expected_macs(config) == model_macs(config)


def test_a_configuration_that_contradicts_itself_is_refused():
    config = vitb_cross.get_config()
    config.masking.pred_ratio = 0.9
    with pytest.raises(ValueError, match="pred_ratio=0.9"):
        cost.count(config)
