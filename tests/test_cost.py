"""The cost equals published tables, and tables derived from the papers.

The closed formulas stand for the counted cost: test_cost_model.py shows them equal.
"""

import dataclasses

import pytest

from configs import (
    vitb_cross,
    vitb_cross75,
    vitb_cross_448,
    vitb_mae,
    vith_cross,
    vith_cross75,
    vith_mae,
    vitl_cross,
    vitl_cross75,
    vitl_mae,
    vits_cross,
    vits_cross75,
    vits_mae,
)
from crossmae_jax import masking
from crossmae_jax.cost import counting
from tests import cost_formulas

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

# Tokens that the encoder's blocks run on.
ENCODER_TOKENS = {"ViT-S/16": 50, "ViT-B/16": 50, "ViT-L/16": 50, "ViT-H/14": 65}

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

# PR-MIM on MAE, 7 x 7 convolution. Of all patches thrown; thrown, retained; decoder's
# tokens; forward GMACs of decoder with aggregator, and total; share of MAE; that share
# if the ratio were one of the masked patches.
THROWN = {
    "ViT-S/16": [
        (0.0, 0, 147, 197, "1.442", "2.585", "100.0%", "100.0%"),
        (0.25, 49, 98, 148, "1.067", "2.209", "85.5%", "89.0%"),
        (0.5, 98, 49, 99, "0.709", "1.851", "71.6%", "78.3%"),
        (0.65, 127, 20, 70, "0.506", "1.649", "63.8%", "72.2%"),
    ],
    "ViT-B/16": [
        (0.0, 0, 147, 197, "5.373", "9.781", "100.0%", "100.0%"),
        (0.25, 49, 98, 148, "4.006", "8.414", "86.0%", "89.4%"),
        (0.5, 98, 49, 99, "2.673", "7.082", "72.4%", "79.0%"),
        (0.65, 127, 20, 70, "1.903", "6.312", "64.5%", "73.0%"),
    ],
    "ViT-L/16": [
        (0.0, 0, 147, 197, "5.379", "20.756", "100.0%", "100.0%"),
        (0.25, 49, 98, 148, "4.012", "19.389", "93.4%", "95.0%"),
        (0.5, 98, 49, 99, "2.680", "18.056", "87.0%", "90.1%"),
        (0.65, 127, 20, 70, "1.910", "17.286", "83.3%", "87.3%"),
    ],
    "ViT-H/14": [
        (0.0, 0, 192, 257, "7.129", "48.562", "100.0%", "100.0%"),
        (0.25, 64, 128, 193, "5.288", "46.721", "96.2%", "97.1%"),
        (0.5, 128, 64, 129, "3.509", "44.942", "92.5%", "94.4%"),
        (0.65, 166, 26, 91, "2.484", "43.917", "90.4%", "92.7%"),
    ],
}

# Kind of aggregator and its kernel; GMACs of mixing 14 x 14 places of width 512.
MIXING = [
    ("transformer", 7, "0.656"),
    ("convnext", 7, "0.416"),
    ("conv", 3, "0.0009"),
    ("conv", 5, "0.0025"),
    ("conv", 7, "0.0049"),
    ("conv", 9, "0.0081"),
    ("conv", 11, "0.0121"),
]

# CrossMAE's prediction ratio and depth; MAE's decoder is so many times as costly.
DECODERS = [
    (0.75, 12, "1.02"),
    (0.25, 12, "2.60"),
    (0.25, 8, "3.88"),
    (0.15, 12, "3.70"),
    (0.25, 4, "7.65"),
    (0.25, 1, "28.27"),
]

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


def count(config):
    return cost_formulas.pretraining(config)


def macs(counted, part):
    return counted.parts[part].macs


def giga(number):
    return f"{number / 1e9:.3f}"


@pytest.mark.parametrize("name", CONFIGS)
def test_multiply_adds_equal_the_table(name):
    mae, cross75, cross25 = (
        count(module.get_config()) for module in CONFIGS[name]
    )
    assert len({macs(counted, "encoder") for counted in (mae, cross75, cross25)}) == 1
    assert {counted.num_keep + 1 for counted in (mae, cross75, cross25)} == {
        ENCODER_TOKENS[name]
    }
    cells = [macs(mae, "encoder")]
    for counted in (mae, cross75, cross25):
        cells += [macs(counted, "decoder"), counted.macs]
    assert tuple(map(giga, cells)) == GMACS[name]
    shares = (f"{counted.macs / mae.macs:.1%}" for counted in (cross75, cross25))
    assert tuple(shares) == SHARES[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_the_table(name):
    mae, cross75, cross25 = (
        count(module.get_config()) for module in CONFIGS[name]
    )
    for counted, cells in ((mae, 0), (cross75, 1), (cross25, 1)):
        encoder, decoder, _ = counted.parts.values()
        parts = (
            encoder.params, decoder.params, counted.others["constants"], counted.params
        )
        assert tuple(f"{part / 1e6:.3f}" for part in parts) == PARAMS[name][cells]


def test_multiply_adds_at_448_pixels_equal_the_table():
    cells = {}
    for module in (vitb_mae, vitb_cross75, vitb_cross_448):
        config = module.get_config()
        config.data.image_size = (448, 448)
        counted = count(config)
        cells[module] = tuple(
            f"{number / 1e9:.2f}" for number in (
                macs(counted, "encoder"), macs(counted, "decoder"), counted.macs
            )
        )
    assert cells == {
        vitb_mae: ("17.91", "25.19", "43.10"),
        vitb_cross75: ("17.91", "22.03", "39.94"),
        vitb_cross_448: ("17.91", "8.60", "26.51"),
    }


def throwing(module, throw_ratio, **aggregator):
    """Returns a config that throws patches, with an aggregator if one is described."""
    config = module.get_config()
    config.masking.throw_ratio = throw_ratio
    config.model.aggregator.update(aggregator)
    return config


@pytest.mark.parametrize("name", THROWN)
def test_throwing_patches_costs_what_the_table_says(name):
    module, *_ = CONFIGS[name]
    mae = count(module.get_config())
    num_masked = mae.num_patches - mae.num_keep

    def thrown(ratio):
        kind = "conv" if ratio else "none"  # nothing thrown, nothing to aggregate
        counted = count(throwing(module, ratio, kind=kind, kernel_size=7))
        return counted, f"{counted.macs / mae.macs:.1%}"

    for row in THROWN[name]:
        counted, share = thrown(row[0])
        _, share_of_masked = thrown(round(row[0] * num_masked) / mae.num_patches)
        decoder = macs(counted, "decoder") + macs(counted, "aggregator")
        assert row == (
            row[0], counted.num_thrown, counted.num_pred, counted.decoder_tokens,
            giga(decoder), giga(counted.macs), share, share_of_masked,
        )


@pytest.mark.parametrize("kind, kernel_size, cell", MIXING)
def test_mixing_costs_what_the_table_says(kind, kernel_size, cell):
    counted = count(throwing(
        vitb_mae, 0.5, kind=kind, kernel_size=kernel_size, visible="decoder"
    ))
    last_layer = counted.num_thrown * 512 * 768
    mixing = (macs(counted, "aggregator") - last_layer) / 1e9
    assert f"{mixing:.{len(cell) - 2}f}" == cell


@pytest.mark.parametrize("pred_ratio, depth, times", DECODERS)
def test_decoders_compare_as_in_the_table(pred_ratio, depth, times):
    config = vitb_cross.get_config()
    config.masking.pred_ratio, config.model.decoder.depth = pred_ratio, depth
    mae = count(vitb_mae.get_config())
    share = macs(mae, "decoder") / macs(count(config), "decoder")
    assert f"{share:.2f}" == times


def test_inter_block_attention_costs_less_than_a_thousandth():
    config = vitb_cross75.get_config()
    config.model.fusion.kind = "last"
    mae, last = count(vitb_mae.get_config()), count(config)
    assert f"{last.macs / mae.macs:.3f}" == "0.987"
    fused = count(vitb_cross75.get_config())
    assert last.macs < fused.macs < 1.001 * last.macs


def test_plain_throwing_costs_what_predicting_fewer_costs():
    fewer = count(vitb_cross.get_config())
    plain = count(throwing(vitb_cross75, 0.5))
    assert plain == dataclasses.replace(fewer, num_thrown=98)
    mae = count(throwing(vitb_mae, 0.5))
    assert (mae.decoder_tokens, macs(mae, "aggregator")) == (99, 0)
    # An aggregator lays out all but the class token: a patch vector less to predict.
    conv = count(throwing(vitb_mae, 0.5, kind="conv"))
    assert macs(mae, "decoder") == macs(conv, "decoder") + 512 * 768


@pytest.mark.parametrize("visible, share", [("encoder", "0.968%"), ("zeros", "0.671%")])
def test_progressive_reconstruction_of_crossmae_costs_under_a_percent(visible, share):
    plain = count(throwing(vitb_cross75, 0.5))
    conv = count(throwing(
        vitb_cross75, 0.5, kind="conv", kernel_size=7, visible=visible
    ))
    assert conv.parts["decoder"] == plain.parts["decoder"]
    assert conv.decoder_tokens == 49
    added = conv.train_flops - plain.train_flops
    assert added == 6 * macs(conv, "aggregator")
    assert f"{added / plain.train_flops:.3%}" == share


@pytest.mark.parametrize("num_patches, mask_ratio, pred_ratio, keep, pred", TOKENS)
def test_token_counts_equal_the_table(num_patches, mask_ratio, pred_ratio, keep, pred):
    assert masking.token_counts(
        num_patches, mask_ratio=mask_ratio, pred_ratio=pred_ratio
    ) == (keep, pred, 0)


def test_a_training_step_is_six_operations_a_multiply_add():
    counted = count(throwing(vitb_mae, 0.5, kind="conv"))
    parts = [part.macs for part in counted.parts.values()]
    assert len(parts) == 3 and all(parts) and counted.train_flops == 6 * sum(parts)


@pytest.mark.parametrize("setting, value, message", [
    ("masking.pred_ratio", 0.9, "pred_ratio=0.9"), ("objective", "x", "objective 'x'"),
])
def test_a_configuration_that_contradicts_itself_is_refused(setting, value, message):
    config = vitb_cross.get_config()
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(ValueError, match=message):
        counting.count(config)
