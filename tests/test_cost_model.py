"""The cost counted from the traced program equals the closed formulas."""

import itertools

import pytest

from configs import (
    digits_cross,
    digits_green,
    digits_local,
    digits_mae,
    digits_simmim,
    digits_simmim_swin,
    digits_tec,
    finetune_digits,
    linprobe_vitb,
    swinb_green_prmim,
    swinb_simmim_prmim,
    vitb_cross_448,
    vitb_mae,
    vitb_simmim_100,
    vitb_simmim_prmim,
    vitb_tec_prmim,
    vith_cross,
    vitl_mae,
    vitl_tec,
    vits_cross75,
)
from crossmae_jax.cost import counting
from crossmae_jax.models import aggregator
from tests import cost_formulas

# Every size once, both decoders, both ratios of prediction.
REAL = (
    vits_cross75, vitb_mae, vitb_cross_448, vitl_mae, vith_cross, digits_mae,
    digits_simmim, digits_local, digits_simmim_swin, swinb_simmim_prmim,
    digits_green, swinb_green_prmim, digits_tec, vitb_tec_prmim, vitl_tec,
)


@pytest.mark.parametrize("module", REAL, ids=lambda module: module.__name__)
def test_real_models_cost_what_the_formulas_say(module):
    config = module.get_config()
    assert counting.count(config) == cost_formulas.pretraining(config)


def test_throwing_half_of_the_patches_halves_simmim():
    # PR-MIM, table 4: 50 % less; by the formulas 49.9 % is left.
    whole, thrown = (
        counting.count(module.get_config())
        for module in (vitb_simmim_100, vitb_simmim_prmim)
    )
    assert thrown.macs / whole.macs == pytest.approx(0.499, abs=5e-4)
    assert thrown == cost_formulas.pretraining(vitb_simmim_prmim.get_config())


OPTIONS = ("fusion.kind", "decoder.self_attention", "fusion.maps", "fusion.input")
VARIANTS = [
    dict(zip(OPTIONS, row))
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
        itertools.product(("conv", "convnext", "pool"), visible, [3], [False]),
        itertools.product(("transformer",), visible, [7], [False]),
        [("none", "zeros", 3, False), ("conv", "zeros", 7, True)],
    )
]


def tiny(module, **changes):
    """Returns a small config of 4 x 6 patches whose widths all differ."""
    config = module.get_config()
    config.data.channels, config.data.mean, config.data.std = 2, (0.5,) * 2, (1.0,) * 2
    config.data.image_size = (8, 12)
    config.model.decoder.dim = 48
    config.model.encoder.mlp_ratio = config.model.decoder.mlp_ratio = 2.0
    config.model.update_from_flattened_dict(changes)
    return config


def tiny_throwing(module, changes):
    """Returns a small config with 6 patches visible, 9 decoded, 5 thrown, 4 skipped."""
    config = tiny(module)
    config.masking.update(mask_ratio=0.75, pred_ratio=0.55, throw_ratio=0.2)
    config.model.aggregator.update(changes)
    return config


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_costs_what_the_formulas_say(changes):
    config = tiny(digits_cross, **changes)
    assert counting.count(config) == cost_formulas.pretraining(config)


@pytest.mark.parametrize("module, changes", AGGREGATORS, ids=str)
def test_every_aggregator_costs_what_the_formulas_say(module, changes):
    config = tiny_throwing(module, changes)
    counted = counting.count(config)
    assert (counted.num_keep, counted.num_pred, counted.num_thrown) == (6, 9, 5)
    assert counted == cost_formulas.pretraining(config)


def test_micro_batches_and_what_is_computed_again_change_nothing():
    config = tiny(digits_cross)
    counted = counting.count(config)
    config.optim.accum_steps, config.model.remat = 2, "full"
    assert counting.count(config) == counted


def classifier(**changes):
    """Returns a small classifier's config whose widths all differ."""
    config = finetune_digits.get_config()
    config.model.encoder.size, config.data.num_classes = "W24-D3-H2/4", 10
    config.model.update(changes)
    return config


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_classifier_costs_what_the_formulas_say(pool):
    counted = counting.count(config := classifier(pool=pool))
    macs = sum(part.macs for part in counted.parts.values())
    assert counted == cost_formulas.classification(config, differentiated=macs)
    assert counted.train_flops == 6 * macs == 6 * counted.computed


def test_a_classifier_of_224_pixels_costs_the_published_number():
    counted = counting.count(config := linprobe_vitb.get_config())
    assert f"{counted.macs / 1e9:.2f}" == "17.56"
    # Of a linear probe only the head is trained.
    head = 768 * 1000
    assert counted == cost_formulas.classification(config, differentiated=head)
    assert counted.train_flops == 2 * counted.macs + 4 * head


@pytest.mark.parametrize("tune_blocks, blocks", [(0.0, 0), (1.0, 1), (2.0, 2)])
def test_frozen_blocks_need_one_pass(tune_blocks, blocks):
    config = classifier(pool="cls")
    config.tune_blocks = tune_blocks
    counted = counting.count(config)
    hidden, tokens = int(24 * config.model.encoder.mlp_ratio), counted.num_patches + 1
    block = 4 * tokens * 24**2 + 2 * tokens**2 * 24 + 2 * tokens * 24 * hidden
    assert counted.differentiated == blocks * block + 24 * 10


def test_half_a_block_is_its_mlp():
    config = classifier(pool="cls")
    config.tune_blocks = 0.5
    hidden, counted = int(24 * config.model.encoder.mlp_ratio), counting.count(config)
    mlp = 2 * (counted.num_patches + 1) * 24 * hidden
    assert counted.differentiated == mlp + 24 * 10
