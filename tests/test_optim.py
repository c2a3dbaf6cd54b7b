"""Learning rates and AdamW, against closed forms; the trajectories are parity's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict, config_dict

from crossmae_jax import optim
from crossmae_jax.objectives.pretrain import Pretrain
from tests.test_models import MAE, make_config


def _config(**changes):
    config = ConfigDict(dict(
        epochs=10.0,
        masking=dict(mask_ratio=0.75, pred_ratio=0.25),
        data=dict(batch_size=4096),
        optim=dict(
            base_lr=1.5e-4, lr_scale="pred_over_mask", min_lr=0.0, warmup_epochs=2.0,
            weight_decay=0.05, b1=0.9, b2=0.95,
            clip_norm=config_dict.placeholder(float),
        ),
    ))
    config.optim.update(changes)
    return config


def test_crossmae_trains_a_quarter_of_the_patches_at_a_third_of_the_rate():
    assert optim.peak_lr(_config()) == pytest.approx(8e-4)
    assert optim.peak_lr(_config(lr_scale="none")) == pytest.approx(2.4e-3)
    assert optim.peak_lr(_config(lr_scale="mask_over_pred")) == pytest.approx(7.2e-3)
    with pytest.raises(ValueError, match="Unknown lr_scale 'sqrt'. Known: mask_over"):
        optim.peak_lr(_config(lr_scale="sqrt"))


def test_the_rate_rises_from_zero_to_the_peak_and_falls_to_the_minimum():
    schedule = optim.make_schedule(_config(min_lr=1e-5), steps_per_epoch=10.0)
    assert schedule(0) == 0
    np.testing.assert_allclose(schedule(10), 4e-4, rtol=1e-6)
    np.testing.assert_allclose(schedule(20), 8e-4, rtol=1e-6)
    np.testing.assert_allclose(schedule(60), (8e-4 + 1e-5) / 2, rtol=1e-6)
    np.testing.assert_allclose(schedule(100), 1e-5, rtol=1e-6)


def test_the_rate_keeps_its_digits_near_the_end():
    schedule = optim.make_schedule(_config(), steps_per_epoch=1000.0)
    exact = 8e-4 * np.sin(np.pi / 2 * (1 / 8000)) ** 2
    np.testing.assert_allclose(schedule(9999), exact, rtol=1e-3)


def test_warmup_as_long_as_training_is_refused():
    with pytest.raises(ValueError, match="=10.0 must be below epochs=10.0"):
        optim.make_schedule(_config(warmup_epochs=10.0), steps_per_epoch=1.0)


@pytest.mark.parametrize("changes", [{}, MAE], ids=["cross", "mae"])
def test_only_matrices_tokens_and_mixing_weights_decay(changes):
    objective = Pretrain(make_config(**changes))
    params = jax.eval_shape(objective.init, jax.random.key(0))["params"]
    for path, decayed in jax.tree_util.tree_leaves_with_path(optim.decay_mask(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert decayed == name.endswith(("kernel", "cls_token", "mask_token")), name


def test_decay_is_decoupled_from_the_gradient():
    tx = optim.make_optimizer(_config(), lambda step: 0.1)
    params = {"matrix": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.1 * 0.05 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_clipping_bounds_the_norm_of_what_adam_sees():
    params, gradient = {"x": jnp.zeros(4)}, {"x": jnp.full(4, 10.0)}
    clipped = optim.make_optimizer(_config(clip_norm=1.0), lambda step: 0.1)
    _, state = clipped.update(gradient, clipped.init(params), params)
    (moments,) = [
        leaf for leaf in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        ) if isinstance(leaf, optax.ScaleByAdamState)
    ]
    norm = optax.tree.norm(moments.mu) / (1 - 0.9)
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)
