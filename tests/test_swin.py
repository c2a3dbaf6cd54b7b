"""Swin: windows over all units or some, what it has no part in, what is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import common
from crossmae_jax import masking
from crossmae_jax.convert import spellings
from crossmae_jax.models import classifier, layers, swin, windows
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.optim import layerwise, optimizers
from tests import cost_swin, drawn
from tests.test_models import make_config

SIZE = "W8-D2.2.1-H1.2.2/2"  # cells of 2, 4 and 8 pixels


def simmim_swin(**changes):
    """Returns a small config of 4 x 8 units of 8 pixels; `a__b=c` sets config.a.b."""
    config = make_config()
    config.model = common.simmim_swin(SIZE, window=4) | dict(
        dtype="float32", remat="none"
    )
    config.masking = common.masking(mask_ratio=0.6, pred_ratio=0.6)
    config.target.normalize, config.loss.kind = False, "l1"
    config.data.image_size = (32, 64)
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


PRMIM = dict(
    masking__throw_ratio=0.25, masking__retain="furthest",
    model__aggregator__kind="conv",
)


def _batch(config, num=2):
    shape = (num, *config.data.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return {"image": jnp.asarray(pixels), "sample": jnp.arange(num, dtype=jnp.uint32)}


def _random(variables):
    """Returns variables of which none is zero or one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), variables
    )


def test_units_that_are_left_out_change_nothing_but_that_nobody_sees_them():
    config = simmim_swin(**PRMIM)
    objective = Pretrain(config)
    assert objective.counts == (12, 12, 8) and objective.grid == (4, 8)
    variables, batch = _random(drawn.variables(objective.init)), _batch(config)
    ids, images = objective.sample(jax.random.key(1), batch), objective.normalize(batch)
    encoded = jax.jit(
        lambda v, x, i: objective.model.apply(v, x, i, method="encode")
    )(variables, images, ids)
    np.testing.assert_array_equal(
        encoded.last.ids, np.sort(np.concatenate([ids.keep, ids.pred], axis=1))
    )
    assert [tokens.sequence.shape[1:] for tokens in encoded.maps] == [
        (384, 8), (384, 8), (384, 8), (96, 16), (96, 16), (24, 32)
    ]
    # As if all were there, and no query saw the thrown ones.
    whole = ids._replace(
        pred=jnp.concatenate([ids.pred, ids.thrown], axis=1), thrown=ids.thrown[:, :0]
    )
    hidden = masking.mask_of(ids.thrown, num_patches=32).reshape(2, 4, 8)
    attend = swin.WindowAttention.attend

    def without_thrown(self, queries, keys, values, within):
        cells = within.grid[0] // 4
        cell = jnp.repeat(jnp.repeat(hidden, cells, axis=1), cells, axis=2)
        cell = cell.reshape(2, -1, 1).astype(jnp.float32)
        grouped = within.grouped(cell, num_heads=1)[..., 0]  # b s g
        away = jnp.repeat(-1e9 * grouped.transpose(0, 2, 1), self.num_heads, axis=1)
        bias = windows.Windows.bias

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(windows.Windows, "bias", lambda self, table: (
                bias(self, table) + away[:, :, None]
            ))
            return attend(self, queries, keys, values, within)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swin.WindowAttention, "attend", without_thrown)
        expected = objective.model.apply(variables, images, whole, method="encode")
    for found, all_of_it in zip(encoded.maps, expected.maps, strict=True):
        assert found.grid == all_of_it.grid
        np.testing.assert_allclose(found.values, all_of_it.at(found.ids), atol=3e-5)
    np.testing.assert_allclose(
        encoded.last.values, expected.last.at(encoded.last.ids), atol=3e-5
    )


def test_images_that_share_a_mask_are_encoded_as_each_by_itself():
    changes = PRMIM | dict(masking__noise="shared")
    ids, losses = None, {}
    for together in (2, 4, 8):
        config = simmim_swin(**changes, masking__together=together)
        objective = Pretrain(config)
        batch = _batch(config, 8)
        variables = _random(drawn.variables(objective.init))
        if ids is None:
            alone = Pretrain(simmim_swin(**PRMIM))
        ids = objective.sample(jax.random.key(3), batch)
        assert len(np.unique(np.asarray(ids.keep), axis=0)) == 8 // together
        images = objective.normalize(batch)
        losses[together], expected = (
            jax.jit(jax.value_and_grad(lambda p, each=each: each.masked_loss(
                {"params": p}, images, ids
            )[0]))(variables["params"]) for each in (objective, alone)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
            losses[together], expected,
        )


def test_the_pixels_of_masked_units_reach_nothing_but_the_target():
    config = simmim_swin()
    objective = Pretrain(config)
    variables, batch = _random(drawn.variables(objective.init)), _batch(config)
    ids, images = objective.sample(jax.random.key(1), batch), objective.normalize(batch)
    predict = jax.jit(lambda x: objective.model.apply(variables, x, ids)["pixels"])
    hidden = masking.mask_of(ids.pred, num_patches=32).reshape(2, 4, 8)
    hidden = jnp.repeat(jnp.repeat(hidden, 8, axis=1), 8, axis=2)[..., None]
    before = predict(images).values
    np.testing.assert_array_equal(
        before, predict(jnp.where(hidden, 1.0, images)).values
    )
    assert jnp.abs(before - predict(jnp.where(hidden, images, 1.0)).values).max() > 1e-3


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_gradients_are_the_same_whatever_is_computed_again(remat):
    found = []
    for changes in ({}, dict(model__remat=remat)):
        config = simmim_swin(**PRMIM, **changes)
        objective = Pretrain(config)
        variables, batch = _random(drawn.variables(objective.init)), _batch(config)
        found.append(jax.jit(jax.grad(lambda p, each=objective: each.loss(
            {"params": p}, batch, jax.random.key(0)
        )[0]))(variables["params"]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found
    )


@pytest.mark.parametrize("size, parameters, macs", [
    ("Ti/4", 27.519, 4.5), ("S/4", 48.837, 8.7), ("B/4", 86.743, 15.4),
    ("L/4", 194.995, 34.5),
])
def test_parameters_and_products_are_as_many_as_the_papers(size, parameters, macs):
    """arXiv 2103.14030, table 1: 28, 50, 88, 197 M with heads of 1000 classes."""
    encoder = swin.Swin(size, (224, 224), 7)
    config = simmim_swin(model__encoder__size=size, model__encoder__window=7)
    config.data.image_size, config.model.encoder.mlp_ratio = (224, 224), 4.0
    assert round(cost_swin.encoder(config, 49).macs / 1e9, 1) == macs
    shapes = jax.eval_shape(
        encoder.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
    )
    counted = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    assert counted == pytest.approx(parameters, abs=1e-3)
    assert encoder.grid == (7, 7) and encoder.patch_size == 32
    assert encoder.title == f"Swin-{size}, window 7"
    assert isinstance(encoder.windows, tuple) and set(encoder.windows) == {7}


def test_blocks_are_counted_through_the_stages_for_rates_and_decay():
    config = simmim_swin()
    params = jax.eval_shape(Pretrain(config).init, jax.random.key(0))["params"]
    scales = traverse_util.flatten_dict(
        layerwise.lr_scales(params, decay=0.5, depth=5), sep="/"
    )
    expected = {
        "encoder/mask_token": 0, "encoder/patch_embed/norm/scale": 0,
        "encoder/blocks_0/attn/qkv/kernel": 1,
        "encoder/blocks_1/attn/relative_position_bias_table": 2,
        "encoder/downsample_1/reduction/kernel": 2, "encoder/downsample_3/norm/bias": 4,
        "encoder/blocks_4/mlp/fc1/bias": 5, "encoder/norm/scale": 6,
    }
    for name, layer in expected.items():
        assert scales[name] == 0.5 ** (6 - layer), name
    decays = traverse_util.flatten_dict(
        optimizers.decay_mask(params, tokens=False), sep="/"
    )
    assert not decays["encoder/mask_token"]
    assert not decays["encoder/blocks_1/attn/relative_position_bias_table"]
    assert decays["encoder/downsample_1/reduction/kernel"]


def test_there_is_no_class_token_and_features_are_means_of_units():
    objective = Pretrain(config := simmim_swin())
    assert objective.outputs.keys() == {"features", "reconstruction"}
    variables, batch = _random(drawn.variables(objective.init)), _batch(config)
    images = objective.normalize(batch)
    encoded = objective.model.apply(variables, images, method="encode")
    assert encoded.last.sequence.shape == (2, 32, 32) and encoded.last.cls is None
    features = objective.outputs["features"](variables, batch, None)
    np.testing.assert_allclose(features, encoded.last.values.mean(1), atol=1e-5)


def test_a_classifier_pools_normed_units():
    config = simmim_swin()
    encoder = config.model.encoder.to_dict()
    config.model = dict(
        encoder=encoder | dict(mask_tokens=False), pool="normed_mean", remat="none",
        dtype="float32",
    )
    config.data.num_classes = 5
    model = classifier.build(config)
    images = jnp.asarray(
        np.random.default_rng(0).normal(size=(2, 32, 64, 3)), jnp.float32
    )
    variables = _random(model.init(jax.random.key(0), images))
    assert variables["params"].keys() == {"encoder", "head"}
    found = model.apply(variables, images)
    np.testing.assert_allclose(
        found.features, found.tokens.values.mean(1), atol=1e-5
    )
    assert found.logits.shape == (2, 5)
    assert isinstance(model.encoder, swin.Swin)
    config.model.pool = "cls"
    with pytest.raises(ValueError, match="has not; set config.model.pool='normed_mean"):
        classifier.build(config)


@pytest.mark.parametrize("changes, message", [
    (dict(model__encoder__size="B/16/4"), "Unknown model size 'B/16/4' of a Swin."),
    (dict(model__encoder__size="W8-D2.2-H2/2"), "a depth and heads of 1 or more for e"),
    (dict(model__encoder__size="W8-D2.2-H2.3/2"), "16 of stage 2 does not divide into"),
    (dict(model__encoder__window=5),
     "encoder.window=5 does not divide the 16x32 cells of stage 1; take a divisor"),
    (dict(model__encoder__window=0), "model.encoder.window=0"),
    (dict(model__encoder__norm_epsilon=0.0), "model.encoder.norm_epsilon=0.0"),
    (dict(model__encoder__weight_init="he"), "Unknown encoder.weight_init 'he'. Known"),
    (dict(data__image_size=(36, 48)), "Image size 36x48 is not a multiple of patch 8"),
    (dict(model__fusion=dict(kind="taps", maps=(0, -1)),
          model__decoder=dict(kind="local", dim=8, depth=1, num_heads=1),
          model__encoder__mask_tokens=False), "that no fusion brings them together"),
])
def test_what_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Pretrain(simmim_swin(**changes))


@pytest.mark.parametrize("window, sides", [
    (4, (4,) * 5), (8, (8, 8, 8, 8, 4)), (12, None),
])
def test_a_window_is_at_most_a_stages_grid(window, sides):
    """As in Swin's code, which then does not move it, either."""
    config = simmim_swin(model__encoder__window=window, data__image_size=(32, 32))
    if sides is None:  # 16 cells are no multiple of 12
        with pytest.raises(ValueError, match="does not divide the 16x16 cells"):
            Pretrain(config)
    else:
        assert Pretrain(config).model.encoder.windows == sides


def test_initial_values_follow_simmims_code():
    golden = Path(__file__).parent / "golden" / "init_schemes.json"
    compare_initial_values(
        simmim_swin(
            model__encoder__size="W16-D1.1-H2.2/4", model__encoder__window=4,
            data__image_size=(32, 32),
        ),
        json.loads(golden.read_text())["simmim_swin"], spellings.simmim_swin((1, 1)),
    )


def compare_initial_values(config, expected, table):
    """Compares mean and deviation of everything that is drawn, over 160 draws."""
    keys = jax.random.split(jax.random.key(0), 160)
    flat = traverse_util.flatten_dict(
        jax.jit(jax.vmap(Pretrain(config).init))(keys)["params"], sep="/"
    )
    compared = set()
    for path, values in flat.items():
        values = np.asarray(values, np.float64)
        (name,) = spellings.their_names(table, path)
        scheme, error = expected[name], 6 * np.sqrt(2 / values.size)
        compared.add(name)
        assert values[0].size == np.prod(scheme["shape"]), path
        if scheme["scheme"] == "constant":
            np.testing.assert_allclose(values, scheme["value"], rtol=1e-6)
        else:
            assert abs(values.mean()) < error * scheme["std"], path
            assert abs(values.std() / scheme["std"] - 1) < error + 1e-2, path
            if "bound" in scheme:
                assert abs(values).max() <= scheme["bound"] * 1.001
    trained = {name for name, scheme in expected.items() if scheme["trainable"]}
    assert trained == compared


def test_blocks_are_left_out_of_pre_training_by_the_key():
    plain, dropping = (
        Pretrain(simmim_swin(model__encoder__drop_path=rate)) for rate in (0.0, 0.5)
    )
    variables, batch = _random(drawn.variables(plain.init)), _batch(simmim_swin(), 8)
    losses = [
        float(jax.jit(each.loss)(variables, batch, jax.random.key(seed))[0])
        for each, seed in ((plain, 0), (dropping, 0), (dropping, 1))
    ]
    assert len(set(losses)) == 3


def test_attention_in_windows_is_an_attention_that_is_not_watched():
    assert swin.WindowAttention.in_windows and not layers.Attention.in_windows
