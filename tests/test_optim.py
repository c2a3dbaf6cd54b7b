"""Learning rates and AdamW, against closed forms; the trajectories are parity's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict, config_dict

from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.optim import optimizers
from tests import test_models


def make_config(**changes):
    config = ConfigDict(dict(
        epochs=10.0,
        masking=dict(mask_ratio=0.75, pred_ratio=0.25),
        data=dict(batch_size=4096),
        optim=dict(
            base_lr=1.5e-4, base_batch=256, lr_scale="pred_over_mask", min_lr=0.0,
            warmup_lr=0.0, warmup_epochs=2.0, schedule="cosine", drop_epochs=(),
            drop_factor=0.1,
            name="adamw", weight_decay=0.05, decay_tokens=True, b1=0.9, b2=0.95,
            clip_norm=config_dict.placeholder(float), layer_decay=1.0,
            trust_coefficient=0.001,
        ),
        tune_blocks=config_dict.placeholder(float),
    ))
    config.tune_blocks = changes.pop("tune_blocks", None)
    config.optim.update(changes)
    return config


def test_crossmae_trains_a_quarter_of_the_patches_at_a_third_of_the_rate():
    assert optimizers.peak_lr(make_config()) == pytest.approx(8e-4)
    assert optimizers.peak_lr(make_config(lr_scale="none")) == pytest.approx(2.4e-3)


@pytest.mark.parametrize("kind", ["sqrt", "mask_over_pred"])  # the second there was
def test_an_unknown_factor_of_the_rate_is_answered_with_how_to_write_it(kind):
    with pytest.raises(ValueError, match=f"Unknown lr_scale '{kind}'. .* into base_lr"):
        optimizers.peak_lr(make_config(lr_scale=kind))


def test_the_rate_rises_from_zero_to_the_peak_and_falls_to_the_minimum():
    schedule = optimizers.make_schedule(make_config(min_lr=1e-5), steps_per_epoch=10.0)
    assert schedule(0) == 0
    np.testing.assert_allclose(schedule(10), 4e-4, rtol=1e-6)
    np.testing.assert_allclose(schedule(20), 8e-4, rtol=1e-6)
    np.testing.assert_allclose(schedule(60), (8e-4 + 1e-5) / 2, rtol=1e-6)
    np.testing.assert_allclose(schedule(100), 1e-5, rtol=1e-6)


def test_the_rate_keeps_its_digits_near_the_end():
    schedule = optimizers.make_schedule(make_config(), steps_per_epoch=1000.0)
    exact = 8e-4 * np.sin(np.pi / 2 * (1 / 8000)) ** 2
    np.testing.assert_allclose(schedule(9999), exact, rtol=1e-3)


def test_the_rate_drops_at_its_epochs_and_stays():
    # SimMIM: a batch of 2048 at a rate for 512, warm-up from above 0, x 0.1 at 7.
    config = make_config(
        base_lr=1e-4, base_batch=512, lr_scale="none", warmup_lr=2e-6,
        schedule="step", drop_epochs=(7.0, 9.0),
    )
    config.data.batch_size = 2048
    schedule = optimizers.make_schedule(config, steps_per_epoch=10.0)
    steps = np.array([0, 10, 20, 69, 70, 89, 90, 100])
    expected = [2e-6, 2.01e-4, 4e-4, 4e-4, 4e-5, 4e-5, 4e-6, 4e-6]
    np.testing.assert_allclose([schedule(n) for n in steps], expected, rtol=1e-6)


@pytest.mark.parametrize("changes, message", [
    (dict(schedule="linear"), "Unknown optim.schedule 'linear'. Known: cosine, step"),
    (dict(schedule="step"), r"drop_epochs=\(\) with optim.schedule='step': the sched"),
    (dict(drop_epochs=(7.0,)), r"drop_epochs=\(7.0,\) with optim.schedule='cosine'"),
    (dict(schedule="step", drop_epochs=(10.0,)), "before epochs=10.0, such as drop_ep"),
    (dict(schedule="step", drop_epochs=(2.0,)), "behind warmup_epochs=2.0"),
    (dict(warmup_lr=-1.0), "optim.warmup_lr"), (dict(base_batch=0), "optim.base_batch"),
    (dict(drop_factor=float("nan")), "optim.drop_factor"),
    (dict(drop_factor=0.5), "optim.drop_factor=0.5 does nothing with optim.sched"),
    (dict(schedule="step", drop_epochs=(7.0,), min_lr=1e-6), "optim.min_lr=1e-06 does"),
])
def test_a_schedule_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        optimizers.make_schedule(make_config(**changes), steps_per_epoch=10.0)


def test_warmup_as_long_as_training_is_refused():
    with pytest.raises(ValueError, match="=10.0 must be below epochs=10.0"):
        optimizers.make_schedule(make_config(warmup_epochs=10.0), steps_per_epoch=1.0)


@pytest.mark.parametrize("changes", [{}, test_models.MAE], ids=["cross", "mae"])
def test_only_matrices_tokens_and_mixing_weights_decay(changes):
    objective = Pretrain(test_models.make_config(**changes))
    params = jax.eval_shape(objective.init, jax.random.key(0))["params"]
    decay_mask = optimizers.decay_mask(params)
    for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert decayed == name.endswith(("kernel", "cls_token", "mask_token")), name


def test_decay_is_decoupled_from_the_gradient():
    tx = optimizers.make_optimizer(make_config(), lambda step: 0.1)
    params = {"matrix": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.1 * 0.05 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_clipping_bounds_the_norm_of_what_adam_sees():
    params, gradient = {"x": jnp.zeros(4)}, {"x": jnp.full(4, 10.0)}
    clipped = optimizers.make_optimizer(make_config(clip_norm=1.0), lambda step: 0.1)
    _, state = clipped.update(gradient, clipped.init(params), params)
    (moments,) = [
        leaf for leaf in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        ) if isinstance(leaf, optax.ScaleByAdamState)
    ]
    norm = optax.tree.norm(moments.mu) / (1 - 0.9)
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)


def test_an_optimiser_without_options_is_plain_adamw():
    """Runs that began before there were options go on from their checkpoints."""
    params = {"matrix": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    plain = optax.adamw(
        lambda step: 0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05,
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )
    states = []
    for tx in (optimizers.make_optimizer(make_config(), lambda step: 0.1), plain):
        states.append((tx.init(params), *tx.update(params, tx.init(params), params)))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_lars_takes_the_rate_after_the_momentum():
    rates = jnp.asarray([1.0, 0.0, 1.0])
    config = make_config(name="lars", weight_decay=0.0)
    tx = optimizers.make_optimizer(config, lambda step: rates[step])
    params = {"matrix": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    gradient, state, seen = jax.tree.map(jnp.ones_like, params), tx.init(params), []
    for _ in rates:
        updates, state = tx.update(gradient, state, params)
        seen.append(jax.tree.map(lambda x: float(x.ravel()[0]), updates))
    # |w| / |g| = 3 for the matrix; buffers after 1 and 3 steps are 1 and 2.71.
    np.testing.assert_allclose(
        [x["matrix"] for x in seen], [-0.003, 0, -0.00813], rtol=1e-6
    )
    np.testing.assert_allclose([x["bias"] for x in seen], [-1, 0, -2.71], rtol=1e-6)


@pytest.mark.parametrize("trust", [0.001, 0.02, 1.0])
def test_the_norm_of_lars_includes_the_decay(trust):
    tx = optimizers.make_optimizer(
        make_config(name="lars", weight_decay=0.5, trust_coefficient=trust),
        lambda step: 1.0,
    )
    params = {"matrix": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 4.0)}
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    # u = 1 + 0.5 * 4 = 3, scaled to trust * 4; a bias neither decays nor is scaled.
    np.testing.assert_allclose(updates["matrix"], -4 * trust, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -1.0, rtol=1e-6)
