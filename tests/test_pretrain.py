"""The objective: loss, features of whole images, reconstructions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import losses
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.tokens import Tokens, patchify, take_tokens
from tests import drawn
from tests.test_models import MAE, make_config


def _batch(config, num=3):
    shape = (num, *config.data.image_size, config.data.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return {
        "image": jnp.asarray(images), "sample": jnp.arange(num, dtype=jnp.uint32)
    }


def _objective(**changes):
    objective = Pretrain(make_config(**changes))
    variables = drawn.variables(objective.init)
    return objective, variables, _batch(objective.config)


def _encoded(objective, variables, batch):
    encode = functools.partial(objective.model.apply, method="encode")
    return jax.jit(encode)(variables, objective.normalize(batch))


def _reconstructed(objective, variables, batch, key):
    output = objective.outputs["reconstruction"]
    return jax.jit(output.__call__)(variables, batch, key)


def test_features_are_the_mean_of_patch_tokens_without_the_class_token():
    objective, variables, batch = _objective(**MAE)
    encoded = _encoded(objective, variables, batch)
    assert encoded.last.sequence.shape == (3, 1 + 24, 16)
    features = jax.jit(objective.outputs.together(("features", "class_token")))
    found = features(variables, batch)["features"]
    np.testing.assert_allclose(found, encoded.last.values.mean(1), atol=1e-6)
    again = features(variables, batch)
    np.testing.assert_array_equal(found, again["features"])
    np.testing.assert_allclose(again["class_token"], encoded.last.cls[:, 0], atol=1e-6)


def test_features_come_from_the_last_block_that_is_trained():
    objective, variables, batch = _objective(model__fusion__maps=(0, 1))
    encoded = _encoded(objective, variables, batch)
    expected = encoded.maps[2].values.mean(1)
    features = jax.jit(objective.outputs.together(("features", "class_token")))
    found = features(variables, batch)
    np.testing.assert_allclose(found["features"], expected, atol=1e-6)
    np.testing.assert_allclose(
        found["class_token"], encoded.maps[2].cls[:, 0], atol=1e-6
    )


def test_the_loss_depends_on_sample_numbers_and_not_on_places_in_the_batch():
    objective, variables, batch = _objective()
    key = jax.random.key(1)
    turned = jax.tree.map(lambda x: x[::-1], batch)
    loss_of = jax.jit(lambda batch: objective.loss(variables, batch, key)[0])
    loss = loss_of(batch)
    np.testing.assert_allclose(loss_of(turned), loss, rtol=1e-5)
    moved = batch | {"sample": batch["sample"] + 3}
    assert abs(loss_of(moved) - loss) > 1e-4


@pytest.mark.parametrize("normalize", [True, False])
def test_the_trivial_predictor_is_the_mean_of_each_patch(normalize):
    objective, variables, batch = _objective(
        target__normalize=normalize, masking__pred_ratio=0.75
    )
    images, key = objective.normalize(batch), jax.random.key(1)
    _, aux = jax.jit(objective.loss)(variables, batch, key)
    values = patchify(images, patch_size=4)
    ids = objective.sample(key, batch)
    chosen = take_tokens(values, ids.pred)
    variance = float(chosen.var(-1).mean())
    expected = (48 - 1) / 48 if normalize else variance
    np.testing.assert_allclose(aux.metrics["loss_trivial"], expected, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, MAE], ids=["cross", "mae"])
def test_reconstruction_decodes_every_masked_patch_and_shows_the_others(changes):
    objective, variables, batch = _objective(**changes)
    key = jax.random.key(1)
    found = _reconstructed(objective, variables, batch, key)
    assert (found.mask.sum(1) == 24 - 6).all()

    images = objective.normalize(batch)
    ids = objective.masked_ids(key, batch)
    pred = jax.jit(objective.model.apply)(variables, images, ids)["pixels"]
    target = objective.target(variables, images)["pixels"].at(pred.ids)
    error = found.error.sum(1) / 18
    expected = losses.mean(losses.mse(pred.values, target))
    np.testing.assert_allclose(error, expected, rtol=1e-5)

    def cut(image):
        return patchify(image, patch_size=4)

    hidden = found.mask[:, :, None]
    image, prediction, pasted = map(cut, (found.image, found.prediction, found.pasted))
    np.testing.assert_allclose(found.image, batch["image"] / 255, atol=1e-6)
    np.testing.assert_allclose(
        jnp.where(hidden, 0.5, prediction), 0.5, atol=1e-6, err_msg="the mean colour"
    )
    np.testing.assert_allclose(
        pasted, jnp.where(hidden, prediction, image), atol=1e-6
    )


def test_a_perfect_prediction_is_the_image():
    objective, variables, batch = _objective(target__normalize=True)
    images = objective.normalize(batch)

    class Oracle:
        aggregators, encoder = {}, objective.model.encoder

        def apply(self, _variables, _images, ids):
            target = objective.target({}, images)["pixels"]
            return {"pixels": Tokens(target.at(ids.pred), ids.pred, target.grid)}

    objective.model = Oracle()
    found = _reconstructed(objective, variables, batch, jax.random.key(1))
    np.testing.assert_allclose(found.error, 0.0, atol=1e-10)
    np.testing.assert_allclose(found.pasted, found.image, atol=1e-5)


@pytest.mark.parametrize("changes", [
    dict(masking__unit=2, masking__pred_ratio=0.75), dict(MAE, masking__unit=2),
    dict(masking__noise="shared", masking__together=2),
    dict(masking__rounding="ceil", masking__mask_ratio=0.7),
], ids=str)
def test_any_masking_trains_any_model(changes):
    objective, variables, batch = _objective(**changes)
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x])[:4], batch)
    key = jax.random.key(1)
    ids = objective.sample(key, batch)
    assert tuple(part.shape[1] for part in ids) == objective.counts
    gradient = jax.jit(jax.grad(
        lambda p: objective.loss({**variables, "params": p}, batch, key)[0]
    ))(variables["params"])
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert _reconstructed(objective, variables, batch, key).mask.any(1).all()


def test_weighted_masks_take_their_weights_from_the_batch():
    objective, variables, batch = _objective(masking__noise="weighted")
    with pytest.raises(ValueError, match="has only image, sample; give data with"):
        objective.loss(variables, batch, jax.random.key(1))
    weights = jnp.zeros((3, 24)).at[:, 6:].set(1.0)
    ids = objective.sample(jax.random.key(1), batch | {"weights": weights})
    np.testing.assert_array_equal(jnp.sort(ids.keep), jnp.tile(jnp.arange(6), (3, 1)))
