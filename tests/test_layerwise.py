"""Rates and freezing by layer, through the optimiser that training makes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import finetune_vitb_simmim
from crossmae_jax import train_step
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.distributed import parallel
from crossmae_jax.models import classifier, vit
from crossmae_jax.objectives.classify import Classify
from crossmae_jax.optim import layerwise, optimizers
from tests import drawn
from tests.test_optim import make_config

DEPTH = 3


def make_classifier(**changes):
    encoder = dict(
        size=f"W8-D{DEPTH}-H2/4", image_size=(8, 8), final_norm=True,
        learned_positions=True, mlp_ratio=2.0,
    )
    changes = {"pool": "cls", **changes}
    encoder |= changes.pop("encoder", {})
    return classifier.Classifier(
        encoder=vit.ViT(**encoder), num_classes=5, **changes
    )


def params_of(**changes):
    model = make_classifier(**changes)
    return drawn.variables(model.init, jnp.zeros((1, 8, 8, 3)))["params"]


def config_of(**changes):
    config = make_config(decay_tokens=False, **changes)
    config.model = dict(
        encoder=dict(kind="vit", size=f"W8-D{DEPTH}-H2/4"), remat="none",
        dtype="float32",
    )
    config.data.update(dict(image_size=(8, 8), channels=3))
    return config


def by_name(tree):
    return dict(zip(
        jax.tree.leaves(layerwise.names(tree)), jax.tree.leaves(tree), strict=True
    ))


def moved(params, gradients=None, **changes):
    """Returns each parameter's update at a rate of 1, and the optimiser's state."""
    tx = optimizers.make_optimizer(config_of(**changes), lambda step: 1.0)
    if gradients is None:
        gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    return by_name(updates), state


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_layers_update_is_a_power_of_the_decay_times_the_heads(name):
    params = params_of()
    plain, _ = moved(params, name=name)
    decayed, _ = moved(params, name=name, layer_decay=0.5)
    layers = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "blocks_0": 1,
              "blocks_1": 2, "blocks_2": 3, "norm": 4}
    for path, update in decayed.items():
        place = path.split("/")[1] if path.startswith("encoder/") else "norm"
        np.testing.assert_allclose(
            update, 0.5 ** (4 - layers[place]) * plain[path], rtol=1e-6, err_msg=path
        )


def test_the_smallest_rate_falls_with_the_layer_too():
    config = config_of(layer_decay=0.5, min_lr=1e-4, lr_scale="none")
    schedule = optimizers.make_schedule(config, steps_per_epoch=1.0)
    tx = optimizers.make_optimizer(config, schedule)
    params = params_of()
    state = jax.tree.map(
        lambda x: jnp.full_like(x, 10) if x.dtype == jnp.int32 else x, tx.init(params)
    )
    gradient = jax.tree.map(jnp.ones_like, params)
    updates = by_name(tx.update(gradient, state, params)[0])
    ratio = updates["encoder/patch_embed/proj/bias"] / updates["head/bias"][0]
    np.testing.assert_allclose(schedule(10), 1e-4, rtol=1e-5)
    np.testing.assert_allclose(ratio, 0.5**4, rtol=1e-5)


def test_tokens_and_positions_can_be_exempt_from_decay():
    params = jax.tree.map(jnp.ones_like, params_of())
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = moved(params, zeros)
    assert {path for path, x in updates.items() if jnp.any(x)} == {
        path for path in updates if path.endswith("kernel")
    }


HEAD = {"head/kernel", "head/bias"}
POOLED = {"fc_norm/scale", "fc_norm/bias"}
NORM = {"encoder/norm/scale", "encoder/norm/bias"}


def _block(i, *parts):
    return {path for path in by_name(params_of())
            if path.startswith(tuple(f"encoder/blocks_{i}/{part}" for part in parts))}


@pytest.mark.parametrize("tune_blocks, tuned", [
    (0.0, HEAD),
    (0.5, HEAD | NORM | _block(2, "norm2", "mlp")),
    (1.0, HEAD | NORM | _block(2, "")),
    (2.0, HEAD | NORM | _block(2, "") | _block(1, "")),
    (3.0, set(by_name(params_of()))),
])
@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_only_the_last_blocks_norm_and_head_are_tuned(name, tune_blocks, tuned):
    assert tuned
    params = params_of()
    nan = jax.tree.map(
        lambda path, x: jnp.full_like(x, 1.0 if path in tuned else jnp.nan),
        layerwise.names(params), params,
    )
    updates, state = moved(
        params, nan, name=name, tune_blocks=tune_blocks, layer_decay=0.75, clip_norm=1.0
    )
    for path, update in updates.items():
        assert bool(jnp.all(update != 0) if path in tuned else jnp.all(update == 0))
    sizes = sum(params_[path].size for params_ in [by_name(params)] for path in tuned)
    copies = {"adamw": 2, "lars": 1}[name]
    counts = 2 if name == "adamw" else 1
    assert sum(x.size for x in jax.tree.leaves(state)) == copies * sizes + counts


def test_the_norm_of_a_mean_belongs_to_the_head():
    params = params_of(pool="mean", encoder=dict(final_norm=False))
    updates, _ = moved(params, tune_blocks=0.0)
    assert {path for path, x in updates.items() if jnp.any(x)} == HEAD | POOLED


def test_clipping_sees_the_tuned_parameters_only():
    params = params_of()
    large = jax.tree.map(lambda x: jnp.full_like(x, 1e6), params)
    gradients = {**large, "head": jax.tree.map(jnp.ones_like, params["head"])}
    _, state = moved(params, gradients, tune_blocks=0.0, clip_norm=1.0)
    first = jnp.concatenate([x.ravel() for x in jax.tree.leaves(
        optax.tree.get(state, "mu")
    )])
    np.testing.assert_allclose(jnp.linalg.norm(first), 1 - 0.9, rtol=1e-5)


def test_no_gradient_flows_to_what_is_frozen():
    model, params = make_classifier(), params_of()
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    params["head"] = jax.tree.map(jnp.ones_like, params["head"])

    def loss(params):
        params = layerwise.stop_frozen(params, tune_blocks=1.0, depth=DEPTH)
        return (model.apply({"params": params}, images).logits ** 2).sum()

    tuned = by_name(layerwise.is_tuned(params, tune_blocks=1.0, depth=DEPTH))
    for path, gradient in by_name(jax.grad(loss)(params)).items():
        assert bool(jnp.any(gradient != 0)) == tuned[path], path


@pytest.mark.parametrize("changes, message", [
    (dict(tune_blocks=1.5), "tune_blocks=1.5; expected 0, 0.5 (the MLP of the"),
    (dict(tune_blocks=4.0), "at most the encoder's 3."),
    (dict(tune_blocks=-1.0), "tune_blocks=-1.0; expected 0"),
    (dict(layer_decay=0.0), "optim.layer_decay=0.0 must be above 0"),
    (dict(layer_decay=1.5), "optim.layer_decay=1.5 must be above 0 and at most 1"),
    (dict(name="sgd"), "Unknown optim.name 'sgd'. Known: adamw, lars."),
])
def test_what_the_encoder_cannot_have_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        optimizers.make_optimizer(config_of(**changes), lambda step: 1.0)
    assert message in str(error.value)


def test_a_checkpoint_holds_the_state_of_the_tuned_parameters(tmp_path):
    config = config_of(tune_blocks=0.5, layer_decay=0.75, clip_norm=1.0)
    tx = optimizers.make_optimizer(config, lambda step: 1.0)
    params = params_of()
    _, opt_state = tx.update(params, tx.init(params), params)
    one = jnp.asarray(1, jnp.int32)
    state = train_step.TrainState(one, {"params": params}, opt_state)
    here = parallel.replicated(parallel.make_mesh())
    state = jax.device_put(state, here)
    checkpoints = checkpointer.Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, state, wait=True)
    step, restored = checkpoints.restore_latest(parallel.with_sharding(state, here))
    checkpoints.close()
    assert step == 1
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("biases", ["shared", "per_block"])
def test_a_relative_bias_belongs_to_its_block_and_a_shared_one_to_all(biases):
    config = finetune_vitb_simmim.get_config()
    config.model.encoder.update(size="W16-D3-H2/16", relative_bias=biases)
    shapes = jax.eval_shape(Classify(config).init, jax.random.key(0))["params"]
    scales = layerwise.lr_scales(shapes, decay=0.5, depth=3)["encoder"]
    tuned = {
        blocks: layerwise.is_tuned(shapes, tune_blocks=blocks, depth=3)["encoder"]
        for blocks in (0.5, 1.0, 3.0)
    }
    if biases == "shared":
        assert scales["relative_bias"]["table"] == 1
        found = [tuned[n]["relative_bias"]["table"] for n in (0.5, 1, 3)]
        assert found == [False, False, True]
        return
    tables = [f"relative_bias_{i}" for i in range(3)]
    assert [scales[name]["table"] for name in tables] == [1 / 8, 1 / 4, 1 / 2]
    assert [tuned[0.5][name]["table"] for name in tables] == [False] * 3
    assert [tuned[1][name]["table"] for name in tables] == [False, False, True]
    assert all(tuned[3][name]["table"] for name in tables)
