"""Gradient deviation: zero for the same objective, and what is compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gradient_deviation
from crossmae_jax.objectives.pretrain import Pretrain
from tests import drawn
from tests.test_models import MAE, make_config

PROGRESSIVE = dict(
    MAE, masking__throw_ratio=0.5, model__aggregator__kind="conv",
    model__aggregator__visible="decoder",
)


@pytest.fixture(scope="module")
def trained():
    config = make_config(**PROGRESSIVE)
    shape = (2, 4, *config.data.image_size, config.data.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batches = [
        {"image": jnp.asarray(part), "sample": jnp.arange(4, dtype=jnp.uint32) + 4 * i}
        for i, part in enumerate(images)
    ]
    return drawn.variables(Pretrain(config).init), batches


def test_the_same_objective_does_not_deviate_but_another_mask_does(trained):
    variables, batches = trained
    mae = Pretrain(make_config(**MAE))
    found = gradient_deviation.deviation(
        mae, {"itself": mae}, variables, batches, jax.random.key(1)
    )
    for values in found["itself"]:
        np.testing.assert_allclose(values, np.zeros(2), atol=1e-5)
    assert (found[gradient_deviation.ANOTHER_MASK].distance > 0.1).all()


def test_the_measure_is_the_distance_of_encoder_gradients(trained):
    variables, batches = trained
    mae = Pretrain(make_config(**MAE))
    variant = Pretrain(make_config(**PROGRESSIVE))
    key = jax.random.key(1)
    found = gradient_deviation.deviation(
        mae, {"progressive": variant}, variables, batches, key
    )["progressive"]
    mask_key, _ = jax.random.split(key)
    for i, batch in enumerate(batches):
        ids = [o.sample(mask_key, batch) for o in (mae, variant)]
        np.testing.assert_array_equal(ids[0].keep, ids[1].keep)
        flat = []
        for objective, own in zip((mae, variant), ids):
            images = objective.normalize(batch)

            def loss(params):
                changed = {**variables, "params": params}
                return objective.masked_loss(changed, images, own)[0]

            gradient = jax.jit(jax.grad(loss))(variables["params"])["encoder"]
            flat.append(np.concatenate([g.ravel() for g in jax.tree.leaves(gradient)]))
        distance = np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0])
        cosine = flat[0] @ flat[1] / np.prod([np.linalg.norm(g) for g in flat])
        np.testing.assert_allclose(found.distance[i], distance, rtol=1e-3)
        np.testing.assert_allclose(found.angle[i], 1 - cosine, rtol=1e-2, atol=1e-4)


def test_a_variant_with_another_mask_ratio_is_refused(trained):
    variables, batches = trained
    other = Pretrain(make_config(**MAE, masking__mask_ratio=0.8))
    with pytest.raises(ValueError, match="'other' sees 4 patches, the reference 6"):
        gradient_deviation.deviation(
            Pretrain(make_config(**MAE)), {"other": other}, variables, batches,
            jax.random.key(0),
        )
