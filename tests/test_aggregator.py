"""Progressive reconstruction: what is put where, what is read, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from crossmae_jax import kinds, losses, masking
from crossmae_jax.models import aggregator, layers
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.ops import depthwise
from crossmae_jax.tokens import Tokens, take_tokens
from tests import drawn
from tests.test_models import MAE, make_config

GRID = (4, 6)
BATCH = {"sample": jnp.arange(2, dtype=jnp.uint32)}
THROWN = dict(masking__pred_ratio=0.75, masking__throw_ratio=0.5)
CROSS = dict(THROWN, model__aggregator__kind="conv")
MAE_CONV = dict(
    MAE, masking__throw_ratio=0.5, model__aggregator__kind="conv",
    model__aggregator__visible="decoder",
)


def _inputs(seed=0, num=2, dim=8, encoder_dim=16):
    batch = {"sample": jnp.arange(num, dtype=jnp.uint32)}
    noise = masking.uniform(jax.random.key(seed), batch, num=24)
    ids = masking.token_ids(noise, masking.TokenCounts(6, 6, 12))
    rng = np.random.default_rng(seed)
    retained, visible = (
        jnp.asarray(rng.normal(size=(num, 6, dim)), jnp.float32) for _ in range(2)
    )
    encoded = jnp.asarray(rng.normal(size=(num, 7, encoder_dim)), jnp.float32)
    tokens = Tokens(
        jnp.concatenate([visible, retained], axis=1),
        jnp.concatenate([ids.keep, ids.pred], axis=1), GRID,
    )
    return tokens, ids, Tokens(encoded, ids.keep, GRID, has_cls=True)


def _masked(module, variables, *inputs):
    """Returns the tokens of retained and thrown patches, behind the 6 visible ones."""
    out = jax.jit(module.apply)(variables, *inputs)
    tokens, ids, _ = inputs
    np.testing.assert_array_equal(out.ids[:, :12], tokens.ids)
    np.testing.assert_array_equal(out.ids[:, 12:], ids.thrown)
    return out.behind(6).values


def make_aggregator(kind="conv", visible="decoder", **changes):
    options = dict(kind=kind, visible=visible, kernel_size=3) | changes
    if kind == "transformer":  # which has no window
        del options["kernel_size"]
    return kinds.make(
        "aggregator", aggregator.AGGREGATORS, options, dim=8, grid=GRID, num_heads=2,
        mlp_ratio=2.0,
    )


@pytest.mark.parametrize("side", [3, 7, 11])
@pytest.mark.parametrize("grid", [(4, 6), (14, 14), (1, 5)])
def test_depthwise_conv_is_flaxs_and_so_are_its_gradients(side, grid):
    rng = np.random.default_rng(0)
    x, weight = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, *grid, 3), (side, side, 1, 3))
    )
    conv = nn.Conv(3, (side, side), feature_group_count=3, use_bias=False)

    def square(f):
        return jax.value_and_grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1))

    expected = square(lambda x, w: conv.apply({"params": {"kernel": w}}, x))(x, weight)
    for ours in (
        depthwise.depthwise_conv, depthwise._convolution, depthwise._product
    ):
        found = square(lambda x, w: ours(x, w[:, :, 0]))(x, weight)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_retained_patches_keep_their_token_and_thrown_ones_get_their_neighbours():
    tokens, ids, context = _inputs()
    module = make_aggregator()
    variables = drawn.variables(module.init, tokens, ids, context)
    out = _masked(module, variables, tokens, ids, context)
    np.testing.assert_array_equal(out[:, :6], tokens.values[:, 6:])

    weight = np.asarray(variables["params"]["mixer"]["kernel"])[:, :, 0]
    for sample in range(2):
        grid = np.zeros((24, 8), np.float32)
        grid[tokens.ids[sample]] = tokens.values[sample]
        padded = np.pad(grid.reshape(*GRID, 8), ((1, 1), (1, 1), (0, 0)))
        for place, token in zip(ids.thrown[sample], out[sample, 6:], strict=True):
            row, column = divmod(int(place), GRID[1])
            window = padded[row : row + 3, column : column + 3]
            np.testing.assert_allclose(token, (window * weight).sum((0, 1)), atol=1e-5)


def test_retained_places_can_be_rewritten():
    tokens, ids, context = _inputs()
    module = make_aggregator(rewrites_retained=True)
    variables = drawn.variables(module.init, tokens, ids, context)
    out = _masked(module, variables, tokens, ids, context)
    mixed = module.bind(variables).mixer(tokens.laid_out())
    mixed = mixed.reshape(2, 24, 8)
    np.testing.assert_allclose(
        out[:, :6], take_tokens(mixed, ids.pred), atol=1e-6
    )
    kept = _masked(make_aggregator(), variables, tokens, ids, context)
    np.testing.assert_array_equal(out[:, 6:], kept[:, 6:])


@pytest.mark.parametrize("visible", aggregator.VISIBLE)
def test_visible_places_hold_what_was_asked_for(visible):
    tokens, ids, context = _inputs()
    module = make_aggregator(visible=visible)
    variables = drawn.variables(module.init, tokens, ids, context)

    def thrown(decoded, encoded):
        seen = tokens.replace(sequence=decoded), ids, context.replace(sequence=encoded)
        return _masked(module, variables, *seen)[:, 6:]

    decoded, encoded = tokens.sequence, context.sequence
    moved = {
        "decoder": thrown(decoded.at[:, :6].add(1), encoded),
        "encoder": thrown(decoded, encoded.at[:, 1:].add(1)),
        "class token": thrown(decoded, encoded.at[:, 0].add(1)),
    }
    before = thrown(decoded, encoded)
    changed = {name for name, after in moved.items() if (after != before).any()}
    assert changed == {visible} - {"zeros"}


def test_every_thrown_place_is_another_one_to_the_transformer():
    """Zeros without a position would all give one token."""
    tokens, ids, context = _inputs()
    module = make_aggregator("transformer")
    variables = drawn.variables(module.init, tokens, ids, context)
    thrown = np.asarray(_masked(module, variables, tokens, ids, context)[0, 6:])
    assert np.unique(thrown.round(4), axis=0).shape[0] == 12


@pytest.mark.parametrize("changes", [
    CROSS, dict(CROSS, model__aggregator__visible="zeros"), MAE_CONV,
    *(dict(MAE_CONV, model__aggregator__kind=kind)
      for kind in ("pool", "transformer", "convnext")),
    dict(MAE_CONV, model__aggregator__rewrites_retained=True),
    dict(MAE_CONV, masking__retain="furthest"),
    dict(MAE_CONV, model__dtype="bfloat16"),
], ids=str)
def test_every_masked_patch_is_predicted_and_everything_learns(changes):
    objective = Pretrain(make_config(**changes))
    variables = drawn.variables(objective.init)
    if changes["model__aggregator__kind"] != "pool":  # which has no parameters
        assert "mixer" in variables["params"]["aggregator"]
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), "f4")
    ids = objective.sample(jax.random.key(1), BATCH)
    pred = jax.jit(objective.model.apply)(variables, images, ids)["pixels"]
    hidden = masking.mask_of(pred.ids, num_patches=24)
    assert (hidden == ~masking.mask_of(ids.keep, num_patches=24)).all()
    assert pred.values.shape == (2, 18, 48)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: objective.masked_loss(
            {**variables, "params": p}, images, ids)[0])(params)

    for path, value in jax.tree_util.tree_leaves_with_path(
        gradient(variables["params"])
    ):
        assert jnp.abs(value).max() > 0, jax.tree_util.keystr(path)


def test_pooling_is_the_mean_of_the_window_with_its_zeros():
    tokens, ids, context = _inputs()
    module = make_aggregator("pool")
    out = _masked(module, {}, tokens, ids, context)
    grid = tokens.laid_out()
    padded = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for place, token in zip(ids.thrown[0], out[0, 6:], strict=True):
        row, column = divmod(int(place), GRID[1])
        window = padded[0, row : row + 3, column : column + 3]
        np.testing.assert_allclose(token, window.sum((0, 1)) / 9, atol=1e-6)


def test_convnext_adds_its_branch_to_what_was_there():
    tokens, ids, context = _inputs()
    module = make_aggregator("convnext", rewrites_retained=True)
    variables = drawn.variables(module.init, tokens, ids, context)
    silent = jax.tree.map(jnp.zeros_like, variables)
    out = _masked(module, silent, tokens, ids, context)
    np.testing.assert_array_equal(out[:, :6], tokens.values[:, 6:])
    np.testing.assert_array_equal(out[:, 6:], jnp.zeros((2, 12, 8)))
    # And the branch: depth-wise, norm, MLP.
    params = variables["params"]["mixer"]
    x = tokens.laid_out()
    mixed = depthwise.depthwise_conv(x, params["conv"]["kernel"][:, :, 0])
    mixed = mixed.reshape(2, 24, 8)
    normed = layers.LayerNorm(jnp.float32).apply({"params": params["norm"]}, mixed)
    branch = layers.Mlp(normed.shape[-1], 2.0).apply({"params": params["mlp"]}, normed)
    found = _masked(module, variables, tokens, ids, context)[:, 6:]
    expected = take_tokens(branch, ids.thrown)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_crossmaes_visible_neighbours_are_what_the_last_block_attends_to():
    objective = Pretrain(make_config(**CROSS))
    variables = drawn.variables(objective.init)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), "f4")
    ids = objective.sample(jax.random.key(1), BATCH)
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, aggregator.Aggregator) and (
            context.method_name == "__call__"
        ):
            seen.append(args[2].sequence)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        _, state = objective.model.apply(
            variables, images, ids, mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "fusion",
        )
    contexts = state["intermediates"]["fusion"]["__call__"][0]
    first, last = (context.sequence for context in contexts)
    np.testing.assert_array_equal(seen[0], last)
    assert jnp.abs(first - last).max() > 0.1


def test_furthest_patches_of_an_oblong_image_are_those_of_its_grid():
    objective = Pretrain(make_config(**dict(CROSS, masking__retain="furthest")))
    key, batch = jax.random.key(1), {"sample": jnp.arange(8, dtype=jnp.uint32)}
    noise = masking.uniform(key, batch, num=24)
    expected = masking.token_ids(noise, objective.counts, columns=6)
    jax.tree.map(
        np.testing.assert_array_equal, objective.sample(key, batch), expected
    )


def test_reconstruction_also_shows_what_training_skips():
    changes = dict(CROSS, masking__pred_ratio=0.5, masking__throw_ratio=0.2)
    objective = Pretrain(make_config(**changes))
    assert objective.counts == (6, 7, 5)
    variables = drawn.variables(objective.init)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    batch = {"image": jnp.asarray(images), "sample": jnp.arange(2, dtype=jnp.uint32)}
    found = jax.jit(objective.outputs["reconstruction"].function)(
        variables, batch, jax.random.key(1)
    )
    assert (found.mask.sum(1) == 18).all() and (found.thrown.sum(1) == 18 - 7).all()


def test_only_cpus_do_without_the_convolution_and_only_for_small_grids():
    def lowered(side, dim, platform):
        x = jax.ShapeDtypeStruct((1, side, side, dim), jnp.float32)
        kernel = jax.ShapeDtypeStruct((7, 7, dim), jnp.float32)
        traced = jax.jit(depthwise.depthwise_conv).trace(x, kernel)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    for side, dim, platform, convolves in (
        (14, 512, "cpu", False), (28, 512, "cpu", True), (14, 512, "tpu", True),
        (14, 512, "cuda", True),
    ):
        text = lowered(side, dim, platform)
        assert ("stablehlo.convolution" in text) == convolves, (side, platform)
        assert ("stablehlo.dot_general" in text) != convolves, (side, platform)


def test_the_loss_weighs_the_groups():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), "f4")
    for weight in (1.0, 0.25):
        objective = Pretrain(make_config(**CROSS, loss__thrown_weight=weight))
        variables = drawn.variables(objective.init)
        ids = objective.sample(jax.random.key(1), BATCH)
        loss, aux = jax.jit(objective.masked_loss)(variables, images, ids)
        retained, thrown = (aux.metrics[f"loss_{x}"] for x in ("retained", "thrown"))
        expected = 6 * retained + 12 * weight * thrown
        np.testing.assert_allclose(loss, expected / (6 + 12 * weight), rtol=1e-5)
        pred = jax.jit(objective.model.apply)(variables, images, ids)["pixels"]
        target = objective.target(variables, images)["pixels"].at(pred.ids)
        expected = losses.mse(pred.values[:, 6:], target[:, 6:]).mean()
        np.testing.assert_allclose(thrown, expected, rtol=1e-5)
        # The trivial predictor stands beside it with the same weights.
        variance = target.var(-1).mean(0)
        expected = variance[:6].sum() + weight * variance[6:].sum()
        np.testing.assert_allclose(
            aux.metrics["loss_trivial"], expected / (6 + 12 * weight), rtol=1e-4
        )


def test_plain_throwing_keeps_thrown_patches_out_of_the_mae_decoder():
    objective = Pretrain(make_config(**dict(MAE, masking__throw_ratio=0.5)))
    variables = drawn.variables(objective.init)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), "f4")
    ids = objective.sample(jax.random.key(1), BATCH)
    apply = jax.jit(objective.model.apply)
    pred = apply(variables, images, ids)["pixels"]
    assert pred.num == 6
    # Those that stay see fewer others than when every masked patch is there.
    everything = ids._replace(pred=jnp.sort(jnp.concatenate([ids.pred, ids.thrown], 1)))
    full = apply(variables, images, everything)["pixels"]
    assert jnp.abs(full.at(ids.pred) - pred.values).max() > 1e-3
    # And which patches were thrown makes no difference to them.
    other = ids._replace(thrown=ids.thrown[:, ::-1])
    same = apply(variables, images, other)["pixels"]
    np.testing.assert_array_equal(same.values, pred.values)


def test_reconstruction_throws_as_many_as_training_does_and_says_which():
    objective = Pretrain(make_config(**dict(CROSS, masking__retain="furthest")))
    variables = drawn.variables(objective.init)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    batch = {"image": jnp.asarray(images), "sample": jnp.arange(2, dtype=jnp.uint32)}
    found = jax.jit(objective.outputs["reconstruction"].function)(
        variables, batch, jax.random.key(1)
    )
    assert (found.mask.sum(1) == 18).all() and (found.thrown.sum(1) == 12).all()
    assert (found.mask | ~found.thrown).all()
    assert ((found.error > 0) == found.mask).all()


@pytest.mark.parametrize("changes, message", [
    (dict(CROSS, model__aggregator__kind="mean"),
     "Unknown aggregator.kind 'mean'. Known: conv, convnext, none, pool, transformer."),
    (dict(CROSS, model__aggregator__kernel_size=4),
     "aggregator.kernel_size=4 has no middle; take an odd number"),
    (dict(CROSS, model__aggregator__kernel_size=-1), "kernel_size=-1 has no middle"),
    (dict(CROSS, model__aggregator__visible="decoder"),
     "that of CrossMAE has not; set config.model.aggregator.visible='encoder'"),
    (dict(CROSS, model__aggregator__visible="ones"),
     "Unknown aggregator.visible 'ones'. Known: decoder, encoder, zeros."),
    (dict(CROSS, masking__throw_ratio=0.0),
     "but throw_ratio=0.0 throws 0 of 24 patches; raise config.masking.throw_ratio"),
    (dict(CROSS, masking__throw_ratio=0.01), "throw_ratio=0.01 throws 0 of 24 patches"),
    (dict(THROWN, masking__retain="nearest"), "Unknown masking.retain 'nearest'"),
    (dict(MAE, masking__retain="furthest"),
     "but all 18 of them are decoded: throw_ratio=0.0 throws 0 of 24 patches"),
    (dict(CROSS, masking__throw_ratio=0.75), "none is left to decode"),
    (dict(CROSS, masking__throw_ratio=0.8), "throws 19 of 24 patches but mask_ratio"),
    (dict(CROSS, loss__thrown_weight=0.0), "loss.thrown_weight=0.0 must be above 0"),
])
def test_what_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        Pretrain(make_config(**changes))
    assert message in str(error.value)
