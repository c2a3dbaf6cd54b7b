"""LocalMIM: oriented gradients at several scales, a small decoder for each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossmae_jax
from configs import common, finetune_digits
from crossmae_jax import train
from crossmae_jax.convert import starting
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.objectives.classify import Classify
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.targets.hog import HOG
from tests import drawn, tiny
from tests.saved_runs import save_run
from tests.test_models import make_config


def local(**changes):
    """Returns a small config on 4 x 6 patches; `a__b=c` sets config.a.b."""
    config = make_config()
    model = common.local("W16-D3-H2/4")
    model["fusion"]["maps"] = (0, 1, 2)
    model["decoder"].update(dim=16, num_heads=2)
    config.model = model | dict(dtype="float32")
    config.masking = common.masking(pred_ratio=0.75)
    config.target = common.hog()
    config.target.cells = (1, 4, 8)
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


PRMIM = dict(
    masking__throw_ratio=0.5, masking__retain="furthest", model__aggregator__kind="conv"
)


def _histogram(image, cell, bins):
    """Returns the target of one channel, pixel by pixel, in float64."""
    height, width = image.shape
    padded = np.pad(image, 1, mode="reflect")
    found = np.zeros((height // cell, width // cell, bins))
    for row in range(height):
        for column in range(width):
            window = padded[row : row + 3, column : column + 3]
            u = (window[:, 0] - window[:, 2]) @ [1, 2, 1]
            v = (window[0] - window[2]) @ [1, 2, 1]
            turn = int(np.floor(np.arctan2(u, v) / np.pi * bins)) % bins
            found[row // cell, column // cell, turn] += np.hypot(u, v) / cell**2
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)


@pytest.mark.parametrize("bins, cell", [(9, 4), (18, 2), (5, 8)])
def test_a_cell_counts_the_gradients_of_each_orientation(bins, cell):
    images = np.random.default_rng(0).normal(size=(2, 8, 16, 2))
    target = HOG((8, 16), 2, patch_size=4, bins=bins, cells=(cell,))
    (tokens,) = target({}, jnp.asarray(images, jnp.float32)).values()
    assert target.widths == {f"hog_{cell}": 2 * bins}
    assert target.init(jax.random.key(0)) == {}
    for image, values in zip(images, np.asarray(tokens.laid_out())):
        for channel in range(2):
            expected = _histogram(image[..., channel], cell, bins)
            ours = values[..., channel * bins : (channel + 1) * bins]
            np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_flat_image_has_no_orientation_and_no_nan():
    (tokens,) = HOG((8, 8), 1, 4, cells=(4,))({}, jnp.ones((1, 8, 8, 1))).values()
    assert (tokens.values == 0).all()


def test_a_bias_of_the_filters_is_drawn_and_kept_out_of_training():
    plain, biased = Pretrain(local()), Pretrain(local(target__bias=True))
    variables = jax.jit(biased.init)(jax.random.key(0))
    bias = variables["hog"]["hog"]["bias"]
    assert bias.shape == (3, 2) and 0 < jnp.abs(bias).max() <= 1 / 3
    images = jnp.ones((1, 16, 24, 3))
    assert not any(x.values.any() for x in plain.target({}, images).values())
    # Each scale has its own two numbers; a flat image has all of them in one bin.
    for number, cell in enumerate((1, 4, 8)):
        u, v = bias[number]
        values = biased.target(variables, images)[f"hog_{cell}"].values
        expected = int(np.floor(np.arctan2(u, v) / np.pi * 9)) % 9
        np.testing.assert_allclose(values[0, 0], np.tile(np.eye(9)[expected], 3))


@pytest.mark.parametrize("kind", ["hog", "pixels"])
@pytest.mark.parametrize("changes", [{}, PRMIM], ids=["LocalMIM", "PR-MIM"])
def test_every_scale_is_learnt_from_and_logged(changes, kind):
    weights = {f"{kind}_4": 2.0}
    changes = changes | dict(target__kind=kind, loss__weights=weights)
    objective = Pretrain(local(**changes))
    variables = drawn.variables(objective.init)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    batch = {"image": jnp.asarray(pixels), "sample": jnp.arange(2, dtype=jnp.uint32)}

    def loss(params):
        value, aux = objective.loss(
            {**variables, "params": params}, batch, jax.random.key(1)
        )
        return value, aux.metrics

    (value, logged), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    scales = [logged[f"loss_{kind}_{cell}"] for cell in (1, 4, 8)]
    np.testing.assert_allclose(value, sum(scales) + scales[1], rtol=1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all() and gradient.any(), path
    aggregators = {name for name in gradients if name.startswith("aggregator_")}
    expected = {f"aggregator_{kind}_{cell}" for cell in (1, 4, 8)}
    assert aggregators == (expected if objective.model.aggregators else set())


def test_lower_blocks_predict_finer_cells():
    """A scale hangs on one block: what comes behind that does not reach it."""
    objective = Pretrain(local())
    variables = drawn.variables(objective.init)
    ids = objective.sample(jax.random.key(1), {"sample": jnp.arange(1)})
    images = jax.random.normal(jax.random.key(2), (1, 16, 24, 3))
    predict = jax.jit(objective.model.apply)
    before = predict(variables, images, ids)
    assert {name: x.grid for name, x in before.items()} == {
        "hog_1": (16, 24), "hog_4": (4, 6), "hog_8": (2, 3),
    }
    block = variables["params"]["encoder"]["blocks_1"]["mlp"]["fc2"]
    block["bias"] = block["bias"] + jnp.linspace(0, 1, 16)
    after = predict(variables, images, ids)
    np.testing.assert_array_equal(before["hog_1"].values, after["hog_1"].values)
    assert all(
        jnp.abs(before[name].values - after[name].values).max() > 1e-4
        for name in ("hog_4", "hog_8")
    )


@pytest.mark.parametrize("changes, message", [
    (dict(target__cells=(4, 8, 16)), "Image size 16x24 is not a multiple of pat"),
    (dict(target__cells=(2, 4, 8), model__fusion__maps=(0, 1)), "makes 2; set conf"),
    (dict(model__fusion=dict(kind="taps")), "set config.model.fusion.maps, as LocalM"),
    (dict(model__fusion__maps=(0, 1, -1, 5)), "must name blocks of an encoder of de"),
    (dict(model__decoder__kind="mae"), "This decoder predicts one target, but"),
    (dict(model__encoder__size="W16-D3-H2/8", target__cells=(1, 4, 8)),
     "hog_1 has 16x24 cells, but LocalMIM's decoder predicts 4, 2, 1, 0.5 along"),
    (dict(target__kind="pixels", target__cells=(3, 4, 8)), "is not a multiple of"),
    (dict(target__kind="pixels", target__cells=(4, 4, 8)), "must be different sides"),
    (dict(target__kind="pixels", target__bins=18), "target.bins=18 is an option of"),
    (dict(target__cells=(8,), model__decoder__kind="mae",
          model__fusion=dict(kind="last")),
     "hog_8 has 2x3 cells, but MAE's decoder predicts one vector for each of 4x6"),
])
def test_scales_that_the_grid_cannot_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Pretrain(local(**changes))


@pytest.fixture(scope="module")
def run(digits_dir, tmp_path_factory):
    """A run of 15 steps, with an evaluation."""
    directory = tmp_path_factory.mktemp("local") / "run"
    config = tiny.config(digits_dir, dict(knn=common.knn(every_epochs=0.0)["knn"]))
    model = common.local("W16-D2-H2/4")
    model["fusion"]["maps"] = (0, 1)
    model["decoder"].update(dim=16, num_heads=2)
    config.model = model | dict(dtype="float32")
    config.masking = common.masking(pred_ratio=0.75)
    config.target = common.hog()
    config.target.cells = (4, 8)
    train.run(config, directory)
    return directory


def test_a_run_is_evaluated_and_loaded_like_any_other(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert {"train/loss_hog_4", "train/loss_hog_8"} <= set().union(*rows)
    results = json.loads((run / "results.json").read_text())
    assert 0 < results["eval/knn/top1"] <= 1
    model, images = crossmae_jax.load(run), np.zeros((2, 16, 16, 1), np.uint8)
    assert model.encode(images).shape == (2, 16)
    with pytest.raises(ConversionError, match="a decoder for each of hog_4, hog_8"):
        model.attention_maps(images)


def test_fine_tuning_starts_from_its_encoder(run):
    config = finetune_digits.get_config()
    config.update_from_flattened_dict({
        "model.encoder.size": "W16-D2-H2/4", "data.num_classes": 10,
        "data.image_size": (16, 16), "init_from": str(run),
    })
    like = jax.eval_shape(Classify(config).init, jax.random.key(0))
    plan = starting.plan(str(run), like, config)
    assert plan.new == {"fc_norm", "head"}
    assert "encoder/blocks_1/mlp/fc2/kernel" in plan.tensors


def test_one_scale_has_no_prediction_after_each_block(tmp_path):
    """A decoder that brings its tokens to cells does more than a linear layer."""
    run = save_run(
        tmp_path / "run", "digits_local", "model.dtype=float32", "target.cells=(4,)",
        "model.encoder.size=W16-D1-H2/4", "model.fusion.maps=(0,)",
    )
    model, images = crossmae_jax.load(run), np.zeros((1, 32, 32, 1), np.uint8)
    assert model.reconstruct(images).target is not None
    with pytest.raises(ValueError, match="brings its tokens to cells"):
        model.after_each_block(images)
