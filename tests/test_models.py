"""The models: shapes, counts, initial values, independence of queries, bad choices."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict, config_dict

from configs import common
from crossmae_jax import masking
from crossmae_jax.convert import spellings
from crossmae_jax.models import fusion, mim, vit
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.tokens import Encoded, Tokens
from tests import drawn


def make_config(**changes):
    """A tiny CrossMAE of 3 blocks over 4 x 6 patches; dotted keys override."""
    config = ConfigDict(dict(
        seed=0,
        model=dict(
            encoder=dict(kind="vit", size="W16-D3-H2/4", mlp_ratio=2.0),
            fusion=dict(
                kind="inter_block", maps=config_dict.placeholder(tuple), input=True
            ),
            decoder=dict(
                kind="cross", dim=8, depth=2, num_heads=2, mlp_ratio=2.0,
                self_attention=False,
            ),
            aggregator=dict(
                kind="none", kernel_size=7, visible="encoder", rewrites_retained=False
            ),
            remat="none", dtype="float32",
        ),
        masking=common.masking(pred_ratio=0.25),
        target=dict(kind="pixels", normalize=True),
        loss=dict(kind="mse", thrown_weight=1.0, weights={}),
        data=dict(image_size=(16, 24), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3),
    ))
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def _images(config, seed=0, num=2):
    shape = (num, *config.data.image_size, config.data.channels)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _ids(objective, num=2, num_pred=None):
    counts = objective.counts
    batch = {"sample": jnp.arange(num, dtype=jnp.uint32)}
    noise = masking.uniform(jax.random.key(1), batch, num=objective.num_patches)
    return masking.token_ids(
        noise, counts._replace(num_pred=num_pred or counts.num_pred)
    )


MAE = dict(
    model__fusion__kind="last", model__decoder__kind="mae", masking__pred_ratio=0.75
)
VARIANTS = {
    "cross": {},
    "cross_last": dict(model__fusion__kind="last"),
    "cross_self_attention": dict(model__decoder__self_attention=True),
    "cross_subset": dict(model__fusion__maps=(0, -1), model__fusion__input=False),
    "mae": MAE,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_takes_oblong_images_of_any_channels(changes, dtype):
    config = make_config(
        **changes, model__dtype=dtype, data__channels=5,
        data__mean=(0.5,) * 5, data__std=(1.0,) * 5,
    )
    objective = Pretrain(config)
    variables = drawn.variables(objective.init)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
    images, ids = _images(config), _ids(objective)
    pred = jax.eval_shape(objective.model.apply, variables, images, ids)["pixels"]
    assert pred.sequence.shape == (2, objective.counts.num_pred, 4 * 4 * 5)
    assert pred.sequence.dtype == jnp.dtype(dtype)
    gradient = jax.jit(jax.grad(
        lambda p: objective.masked_loss({**variables, "params": p}, images, ids)[0]
    ))(variables["params"])
    moved = {
        path: bool(jnp.abs(value).max() > 0)
        for path, value in traverse_util.flatten_dict(gradient, sep="/").items()
    }
    # Where the last block's map is not used, nothing is learnt there.
    assert [path for path, learns in moved.items() if not learns] == []


@pytest.mark.parametrize("size, decoder, parameters", [
    # specs' table: trainable plus fixed tables, millions
    ("S/16", (256, 8), (28.331, 32.186)),
    ("B/16", (512, 16), (111.908, 127.286)),
    ("L/16", (512, 16), (329.542, 347.941)),
    ("H/14", (512, 16), (657.075, 678.494)),
])
def test_parameter_counts_are_the_papers(size, decoder, parameters):
    base = dict(
        model__encoder__size=size, model__encoder__mlp_ratio=4.0,
        model__decoder__mlp_ratio=4.0, data__image_size=(224, 224),
        model__decoder__dim=decoder[0], model__decoder__num_heads=decoder[1],
    )
    counted = []
    for changes in (dict(MAE, model__decoder__depth=8), dict(model__decoder__depth=12)):
        objective = Pretrain(make_config(**base, **changes))
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        counted.append(sum(x.size for x in jax.tree.leaves(shapes)) / 1e6)
    np.testing.assert_allclose(counted, parameters, atol=5e-4)


def test_position_tables_are_not_trainable():
    variables = Pretrain(make_config()).init(jax.random.key(0))
    assert not any("pos" in path for path in traverse_util.flatten_dict(
        variables["params"], sep="/"))
    tables = traverse_util.flatten_dict(variables["constants"], sep="/")
    assert set(tables) == {"encoder/pos_embed", "decoder/decoder_pos_embed"}


def test_visible_patches_are_encoded_as_if_all_had_been_projected_and_some_dropped():
    config = make_config(model__fusion__kind="last")
    objective = Pretrain(config)
    variables = drawn.variables(objective.init)
    images, ids = _images(config), _ids(objective)
    every = jnp.tile(jnp.arange(objective.num_patches), (2, 1))
    maps = [
        jax.jit(functools.partial(objective.model.apply, method="encode"))(
            variables, images, chosen
        ).maps[0]
        for chosen in (None, ids._replace(keep=every), ids)
    ]
    np.testing.assert_array_equal(maps[0].sequence, maps[1].sequence)
    np.testing.assert_allclose(maps[2].values, maps[0].at(ids.keep), atol=1e-6)


@pytest.mark.parametrize("name", ["cross", "cross_last", "cross_subset"])
def test_a_patch_is_decoded_alike_whichever_others_are(name):
    config = make_config(**VARIANTS[name])
    objective = Pretrain(config)
    variables = drawn.variables(objective.init)
    images = _images(config)
    few, every = _ids(objective), _ids(objective, num_pred=18)
    assert few.pred.shape[1] == 6 and every.pred.shape[1] == 18
    predict = jax.jit(objective.model.apply)
    pred = predict(variables, images, few)["pixels"]
    every_pred = predict(variables, images, every)["pixels"]
    np.testing.assert_allclose(pred.values, every_pred.at(few.pred), atol=1e-5)


@pytest.mark.parametrize("reference, changes", [
    ("models_mae", MAE),
    ("models_cross_wfm_input_selfattn", dict(model__decoder__self_attention=True)),
])
def test_initial_values_follow_the_reference(reference, changes):
    golden = Path(__file__).parent / "golden" / "init_schemes.json"
    expected = json.loads(golden.read_text())[reference]
    config = make_config(
        **changes, model__encoder__size="W32-D2-H2/8", model__decoder__dim=24,
        model__decoder__depth=sum(
            name.endswith("norm2.bias") and name.startswith("decoder_blocks")
            for name in expected
        ),
        model__encoder__mlp_ratio=4.0, model__decoder__mlp_ratio=4.0,
        data__image_size=(32, 32),
    )
    objective = Pretrain(config)
    keys = jax.random.split(jax.random.key(0), 160)
    variables = jax.jit(jax.vmap(objective.init))(keys)
    flat = traverse_util.flatten_dict(variables, sep="/")
    theirs = {
        path: spellings.their_names(spellings.MAE, path.partition("/")[2])[0]
        for path in flat
    }
    assert set(theirs.values()) == set(expected)
    for path, drawn in flat.items():
        scheme = expected[theirs[path]]
        values = np.asarray(drawn, np.float64)
        # 160 draws of the reference and 160 of ours: 6 standard errors of both.
        error = 6 * np.sqrt(2 / values.size)
        if scheme["scheme"] == "constant":
            np.testing.assert_array_equal(values, scheme["value"])
        elif scheme["scheme"] == "fixed sin-cos table":
            assert abs(values.mean() - scheme["mean"]) < 5e-4
        else:
            assert abs(values.mean() - 0) < error * scheme["std"]
            # The error of a std is smaller than that of a mean for both laws.
            assert abs(values.std() / scheme["std"] - 1) < error + 1e-3
        if "bound" in scheme:
            assert np.abs(values).max() <= scheme["bound"] * (1 + 1e-6)
            assert np.abs(values).max() > scheme["bound"] * 0.95


def test_inter_block_attention_is_a_weighted_sum_and_a_norm():
    maps = tuple(_images(make_config(), seed)[:, :, :, 0] for seed in range(3))
    module = fusion.InterBlockAttention(encoder_depth=2, num_contexts=2, maps=(1,))
    tokens = tuple(Tokens(x, None, (16, 1)) for x in maps)
    encoded = Encoded(tokens[-1], tokens)
    variables = module.init(jax.random.key(0), encoded)
    weights = variables["params"]["kernel"]
    for i, context in enumerate(module.apply(variables, encoded)):
        mixture = weights[0, i] * maps[0] + weights[1, i] * maps[2]
        centred = mixture - mixture.mean(-1, keepdims=True)
        scale = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(context.values, centred / scale, atol=1e-4)


def test_maps_are_taken_in_ascending_order():
    assert fusion.resolve_maps((-1, 1), depth=4, include_input=True) == (0, 2, 4)
    assert fusion.resolve_maps(None, depth=2, include_input=False) == (1, 2)


@pytest.mark.parametrize("changes, message", [
    (dict(model__decoder__kind="croos"),
     "Unknown decoder.kind 'croos'. Known: cross, linear, local, mae, tec."),
    (dict(model__fusion__kind="mean"),
     "Unknown fusion.kind 'mean'. Known: adapter, inter_block, last, multi_level, tap"),
    (dict(model__encoder__kind="resnet"),
     "Unknown encoder.kind 'resnet'. Known: swin, vit."),
    (dict(model__dtype="float16"), "Unknown model.dtype 'float16'"),
    (dict(model__encoder__size="XL/16"),
     "Unknown model size 'XL/16'. Known: Ti, S, B, L, H"),
    (dict(model__encoder__size="B"), "Unknown model size 'B'"),
    (dict(model__encoder__size="W10-D1-H3/4"), "width 10 does not divide into 3 heads"),
    (dict(model__decoder__kind="mae"), "MAE's decoder takes one context for all of its "
     "blocks, but the fusion makes 2; set config.model.fusion.kind='last' or "
     "another config.model.decoder.kind."),
    (dict(model__decoder__num_heads=3),
     "decoder.dim=8 does not divide into decoder.num_heads=3"),
    (dict(model__decoder__num_heads=0), "decoder.dim=8 does not divide into"),
    (dict(data__image_size=(224,)), "Image size (224,) must be height and width"),
    (dict(model__decoder__dim=6), "Width 6 is not a multiple of 4"),
    (dict(model__fusion__maps=(0, 3)), "blocks of an encoder of depth 3: -3 to 2"),
    (dict(model__fusion__maps=(0, -3)), "names a block twice"),
    (dict(model__fusion__maps=()), "must name blocks"),
    (dict(data__image_size=(18, 24)), "18x24 is not a multiple of patch 4"),
    (dict(masking__pred_ratio=0.9), "pred_ratio=0.9 predicts 21 of 24 patches"),
])
def test_contradictory_configurations_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        objective = Pretrain(make_config(**changes))
        jax.eval_shape(objective.init, jax.random.key(0))
    assert message in str(error.value)


def test_images_of_another_shape_are_refused():
    config = make_config()
    model = mim.build(config)
    with pytest.raises(ValueError, match="Images are 16x16x1 but the model was built"):
        model.apply({}, jnp.zeros((1, 16, 16, 1)), None, method="encode")


def test_sizes_are_the_papers():
    assert vit.parse_size("H/14") == (vit.Size(1280, 32, 16), 14)
    assert vit.parse_size("W96-D6-H4/2") == (vit.Size(96, 6, 4), 2)
