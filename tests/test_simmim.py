"""SimMIM's ViT: mask tokens and a relative bias in the encoder, one layer behind it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import traverse_util

import crossmae_jax
from configs import common
from crossmae_jax import train
from crossmae_jax.convert import spellings
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.models import layers, mim, relative_bias, vit
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.tokens import patchify, put_tokens, unpatchify
from tests import drawn, tiny
from tests.test_models import make_config

GRID = (4, 6)  # of make_config


def simmim(**changes):
    """Returns a small config; `a__b=c` sets config.a.b."""
    config = make_config()
    model = common.simmim("W16-D2-H2/4")
    model["encoder"]["drop_path"] = 0.0
    config.model = model | dict(dtype="float32")
    config.masking = common.masking(mask_ratio=0.6, pred_ratio=0.6) | dict(unit=2)
    config.target.normalize = False
    config.loss.kind = "l1"
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


PRMIM = dict(
    masking__throw_ratio=0.25, masking__retain="furthest",
    model__aggregator__kind="conv",
)


def _batch(num=2):
    pixels = np.random.default_rng(0).integers(0, 256, (num, 16, 24, 3), np.uint8)
    return {"image": jnp.asarray(pixels), "sample": jnp.arange(num, dtype=jnp.uint32)}


def _random(variables):
    """Returns variables of which none is zero or one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), variables
    )


@pytest.mark.parametrize("grid", [(4, 6), (3, 3)])
def test_the_bias_of_two_patches_depends_on_their_offset_alone(grid):
    module = relative_bias.RelativeBias(grid, num_heads=2)
    table = np.random.default_rng(0).normal(size=(relative_bias.num_rows(grid), 2))
    table = jnp.asarray(table, jnp.float32)
    bias = np.asarray(module.apply({"params": {"table": table}}))[0]
    rows, columns = grid
    found = {}
    for q in range(rows * columns):
        for k in range(rows * columns):
            offset = q // columns - k // columns, q % columns - k % columns
            found.setdefault(offset, []).append(bias[:, 1 + q, 1 + k])
    assert len(found) == (2 * rows - 1) * (2 * columns - 1)
    values = np.stack([np.unique(x, axis=0)[0] for x in found.values()])
    assert all(len(np.unique(x, axis=0)) == 1 for x in found.values())
    assert len(np.unique(values, axis=0)) == len(found)  # each has its own row
    # From the class token, to it, and from it to itself: the last three.
    many = (rows * columns, 1)
    np.testing.assert_array_equal(bias[:, 0, 1:].T, np.tile(table[-3], many))
    np.testing.assert_array_equal(bias[:, 1:, 0].T, np.tile(table[-2], many))
    np.testing.assert_array_equal(bias[:, 0, 0], table[-1])


def _distances(side, new_side):
    """Returns where offsets 0, 1, ... are put; the last one lies at the new end."""
    def excess(ratio):
        return sum(ratio**i for i in range(side - 1)) - (new_side - 1)

    ratio = scipy.optimize.brentq(excess, 1.01, 1.5)
    return np.array([sum(ratio**i for i in range(offset)) for offset in range(side)])


@pytest.mark.parametrize("new_grid", [(7, 7), (8, 7)])
def test_a_bias_is_resized_along_distances_that_grow_geometrically(new_grid):
    """A spline has any cubic as it is: so has the table of a larger grid."""
    def cubic(y, x):
        y, x = y[:, None], x[None]
        return np.stack([0.1 * y**3 - x**2 + 3, x * y**2 - y + 0.02 * x**3], axis=-1)

    known, wanted = [], []
    for side, new_side in zip((5, 6), new_grid):
        ahead = _distances(side, new_side)
        known.append(np.concatenate([-ahead[:0:-1], ahead]))
        wanted.append(np.arange(1 - new_side, new_side))
    of_class = np.arange(6.0).reshape(3, 2)
    table, expected = (
        np.concatenate([cubic(*axes).reshape(-1, 2), of_class]).astype(np.float32)
        for axes in (known, wanted)
    )
    resized = relative_bias.resize(table, grid=(5, 6), new_grid=new_grid)
    np.testing.assert_allclose(resized, expected, rtol=1e-4, atol=1e-3)


def test_a_bias_of_another_grid_is_refused():
    table = np.zeros((relative_bias.num_rows((5, 5)), 3), np.float32)
    assert relative_bias.resize(table, grid=(5, 5), new_grid=(5, 5)) is table
    with pytest.raises(ValueError, match="does not fit a grid of 4x5: expected 66"):
        relative_bias.resize(table, grid=(4, 5), new_grid=(7, 7))
    with pytest.raises(ValueError, match="both need 3 patches or more a side"):
        relative_bias.resize(table, grid=(5, 5), new_grid=(2, 7))


@pytest.mark.parametrize("biases", ["shared", "per_block"])
def test_thrown_patches_leave_the_encoder_and_take_their_bias_along(biases):
    config = simmim(**PRMIM, model__encoder__relative_bias=biases)
    objective = Pretrain(config)
    assert objective.counts == (8, 10, 6)
    variables = _random(drawn.variables(objective.init))
    batch, key = _batch(), jax.random.key(1)
    ids = objective.sample(key, batch)
    images = objective.normalize(batch)
    encode = jax.jit(lambda v, x, i: objective.model.apply(v, x, i, method="encode"))
    encoded = encode(variables, images, ids)
    assert encoded.last.sequence.shape[1] == 1 + 8 + 10
    np.testing.assert_array_equal(
        encoded.last.ids, np.sort(np.concatenate([ids.keep, ids.pred], axis=1))
    )
    # As if all were there, and no query saw the thrown ones.
    whole = ids._replace(
        pred=jnp.concatenate([ids.pred, ids.thrown], axis=1), thrown=ids.thrown[:, :0]
    )
    thrown = jnp.zeros((2, 25), bool)
    thrown = jax.vmap(lambda mask, ids: mask.at[1 + ids].set(True))(thrown, ids.thrown)
    attend, hidden = layers.Attention.attend, jnp.where(thrown, -jnp.inf, 0.0)

    def without_thrown(self, queries, keys, values, bias=None):
        return attend(self, queries, keys, values, bias + hidden[:, None, None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.Attention, "attend", without_thrown)
        expected = objective.model.apply(variables, images, whole, method="encode")
    np.testing.assert_allclose(
        encoded.last.values, expected.last.at(encoded.last.ids), atol=2e-5
    )


def test_the_pixels_of_masked_patches_reach_nothing_but_the_target():
    objective = Pretrain(simmim())
    variables = _random(drawn.variables(objective.init))
    batch, key = _batch(), jax.random.key(1)
    ids, images = objective.sample(key, batch), objective.normalize(batch)
    apply = jax.jit(objective.model.apply)

    def predict(images):
        return apply(variables, images, ids)["pixels"].values

    before = predict(images)
    patches = patchify(images, patch_size=4)
    other = put_tokens(patches, ids.pred, jnp.ones((2, ids.pred.shape[1], 48)))
    other = unpatchify(other, grid=GRID, patch_size=4)
    np.testing.assert_array_equal(before, predict(other))
    seen = put_tokens(patches, ids.keep[:, :1], jnp.ones((2, 1, 48)))
    seen = unpatchify(seen, grid=GRID, patch_size=4)
    assert jnp.abs(before - predict(seen)).max() > 1e-4


def test_blocks_are_left_out_of_pre_training_by_the_key():
    plain = Pretrain(simmim())
    dropping = Pretrain(simmim(model__encoder__drop_path=0.5))
    variables = _random(drawn.variables(plain.init))
    batch, key = _batch(8), jax.random.key(0)
    ids, images = plain.sample(key, batch), plain.normalize(batch)

    def loss(seed):
        rngs = None if seed is None else {"drop_path": jax.random.key(seed)}
        return jax.jit(dropping.masked_loss)(variables, images, ids, rngs)[0]

    whole, *dropped = (float(loss(seed)) for seed in (None, 0, 1))
    assert whole == jax.jit(plain.loss)(variables, batch, key)[0]
    found = float(jax.jit(dropping.loss)(variables, batch, key)[0])
    assert len({whole, *dropped, found}) == 4  # none of them by chance


def test_the_final_norm_may_stand_behind_the_aggregator():
    shapes = [
        jax.eval_shape(
            Pretrain(simmim(model__decoder__norm=norm)).init, jax.random.key(0)
        )["params"] for norm in (False, True)
    ]
    assert "norm" in shapes[0]["encoder"] and "norm" not in shapes[1]["encoder"]
    assert "decoder_norm" not in shapes[0]["decoder"]
    assert "decoder_norm" in shapes[1]["decoder"]


@pytest.mark.parametrize("changes, message", [
    (dict(model__encoder__mask_tokens=False),
     "from the encoder, which has none; set config.model.encoder.mask_tokens=True"),
    (dict(model__decoder=dict(kind="mae", dim=16, depth=1, num_heads=2)),
     "the encoder has them, too; set config.model.encoder.mask_tokens=False"),
    (dict(model__fusion=dict(kind="inter_block")), "takes one context for all"),
    (PRMIM | dict(model__aggregator__visible="encoder"), "would see these twice"),
    (dict(model__encoder__positions="rope"), "Unknown encoder.positions 'rope'. Known"),
    (dict(model__encoder__relative_bias="all"), "encoder.relative_bias 'all'. Known"),
    (dict(model__encoder__qkv_bias="k"), "Unknown encoder.qkv_bias 'k'. Known: qkv"),
    (dict(model__encoder__weight_init="he"), "Unknown encoder.weight_init 'he'. Kno"),
    (dict(masking__unit=5), "masking.unit=5 does not divide a grid of 4x6 patches"),
    (dict(masking__throw_ratio=0.7), "throw_ratio=0.7 throws 17 of 24 patches but m"),
])
def test_what_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Pretrain(simmim(**changes))


def test_initial_values_follow_simmims_code():
    golden = Path(__file__).parent / "golden" / "init_schemes.json"
    expected = json.loads(golden.read_text())["simmim_vit"]
    depth = sum(name.endswith("mlp.fc1.bias") for name in expected)
    model = common.simmim(f"W32-D{depth}-H2/8")
    table = expected.get("encoder.pos_embed")
    config = simmim(data__image_size=(32, 32))
    config.model = model | dict(dtype="float32")
    config.model.encoder.update(
        positions="learned" if table else "none",
        relative_bias="shared" if any("rel_pos_bias." in x for x in expected)
        else "per_block" if any("bias_table" in x for x in expected) else "none",
        layer_scale=0.1 if "encoder.blocks.0.gamma_1" in expected else None,
    )
    objective = Pretrain(config)
    keys = jax.random.split(jax.random.key(0), 160)
    flat = traverse_util.flatten_dict(
        jax.jit(jax.vmap(objective.init))(keys)["params"], sep="/"
    )
    compared = set()
    for path, values in flat.items():
        values = np.asarray(values, np.float64)
        for name in spellings.their_names(spellings.SIMMIM, path):
            if name not in expected:
                continue
            scheme, error = expected[name], 6 * np.sqrt(2 / values.size)
            compared.add(name)
            if scheme["scheme"] == "constant":
                np.testing.assert_allclose(values, scheme["value"], rtol=1e-6)
            else:
                assert abs(values.mean()) < error * scheme["std"], path
                assert abs(values.std() / scheme["std"] - 1) < error + 1e-3, path
    assert len(compared) > 25 and {"decoder.0.weight", "encoder.mask_token"} <= compared
    drawn_at_random = {n for n, scheme in expected.items() if scheme["trainable"]}
    assert drawn_at_random - compared == set()


@pytest.fixture(scope="module")
def run(digits_dir, tmp_path_factory):
    """A run of 15 steps: PR-MIM on SimMIM, with evaluations."""
    directory = tmp_path_factory.mktemp("simmim") / "run"
    config = tiny.config(
        digits_dir, dict(
            knn=common.knn(every_epochs=0.0)["knn"],
            reconstruction=dict(every_epochs=0.0, num_images=4),
        ),
        data__image_size=(24, 24),
    )
    model = common.simmim("W16-D2-H2/4")
    config.model = model | dict(dtype="float32")
    config.model.aggregator.kind = "conv"
    config.masking = common.masking(
        mask_ratio=0.6, pred_ratio=0.6, throw_ratio=0.25
    ) | dict(unit=2)
    config.target.normalize, config.loss.kind = False, "l1"
    config.optim.update(lr_scale="none", clip_norm=5.0)
    train.run(config, directory)
    return directory


def test_a_run_is_evaluated_and_looked_at_like_any_other(run):
    results = json.loads((run / "results.json").read_text())
    assert 0 < results["eval/knn/top1"] <= 1 and results["eval/reconstruction/psnr"] > 0
    assert list((run / "panels").glob("*.png"))
    model = crossmae_jax.load(run)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 1), np.uint8)
    assert model.encode(images).shape == (3, 16)
    assert model.tokens(images).shape == (3, 37, 16)
    pictures = model.reconstruct(images)
    assert pictures.mask.sum(1).tolist() == [24] * 3  # 6 of 9 squares
    assert pictures.thrown.sum(1).tolist() == [9] * 3
    weights = model.attention_maps(images, part="encoder").weights
    assert weights.shape == (2, 3, 2, 37, 37)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_the_encoders_attention_has_its_bias(run):
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 1), np.uint8)
    model = crossmae_jax.load(run)
    before = model.attention_maps(images, part="encoder").weights
    table = model.variables["params"]["encoder"]["relative_bias"]["table"]
    model.variables["params"]["encoder"]["relative_bias"]["table"] = (
        table.at[-3].add(100.0)  # from the class token to patches
    )
    after = model.attention_maps(images, part="encoder").weights
    assert (after[:, :, :, 0, 0] < 1e-6).all() and (before[:, :, :, 0, 0] > 1e-6).all()
    np.testing.assert_allclose(after[:1, :, :, 1:], before[:1, :, :, 1:], atol=1e-6)


@pytest.mark.parametrize("look", [
    lambda model, images: model.attention_maps(images),
    lambda model, images: model.attention_magnitudes(images),
    lambda model, images: model.after_each_block(images),
], ids=["maps", "magnitudes", "after_each_block"])
def test_a_decoder_without_blocks_has_no_attention_to_look_at(run, look):
    images = np.zeros((1, 24, 24, 1), np.uint8)
    with pytest.raises(ConversionError, match="is one layer without attention; what"):
        look(crossmae_jax.load(run), images)


def test_people_call_it_simmim():
    kinds = dict(fusion="last", decoder="linear")
    assert mim.method(**kinds, aggregator="none") == "SimMIM"
    assert mim.method(**kinds, aggregator="conv") == "PR-MIM on SimMIM"
    assert vit.ViT("B/16", (224, 224), relative_bias="shared").title == "ViT-B/16"
