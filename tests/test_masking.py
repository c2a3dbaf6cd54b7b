"""Which patches are seen and which are predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import masking

COUNTS = masking.TokenCounts(num_keep=49, num_pred=49, num_thrown=0)


def _ids(sample, seed=0, **counts):
    key = jax.random.key(seed, impl="threefry2x32")
    sample = jnp.asarray(sample, jnp.uint32)
    return masking.sample_token_ids(key, sample, **(counts or COUNTS))


def test_visible_and_predicted_patches_are_disjoint_and_counted():
    ids = _ids(range(16))
    for keep, pred, restore in zip(*map(np.asarray, ids), strict=True):
        assert len(set(keep)) == len(set(pred)) == 49
        assert not set(keep) & set(pred)
        assert (np.diff(pred) > 0).all(), "predicted patches come in raster order"
        assert sorted(restore) == list(range(196))
        assert (restore[keep] == np.arange(49)).all()


def test_a_samples_mask_depends_on_its_number_and_the_seed_only():
    together = _ids([3, 7, 2**32 - 1])
    alone = _ids([7])
    assert (together.keep[1] == alone.keep[0]).all()
    assert (together.keep[0] != together.keep[1]).any()
    assert (together.keep[2] != together.keep[1]).any()
    assert (_ids([7], seed=1).keep != alone.keep).any()


def test_masks_are_the_same_on_eight_devices():
    mesh = jax.sharding.Mesh(jax.devices(), "data")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sample = jax.device_put(jnp.arange(16, dtype=jnp.uint32), sharding)
    key = jax.random.key(0, impl="threefry2x32")
    spread = jax.jit(lambda s: masking.sample_token_ids(key, s, **COUNTS))(sample)
    jax.tree.map(np.testing.assert_array_equal, spread, _ids(range(16)))


def test_every_patch_is_as_likely_to_be_visible():
    num_samples = 4096
    ids = _ids(range(num_samples), num_patches=16, num_keep=4, num_pred=12)
    seen = np.bincount(np.asarray(ids.keep).ravel(), minlength=16) / num_samples
    # 5 standard deviations of a frequency of 1/4.
    assert np.abs(seen - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / num_samples)


def test_pred_mask_is_true_for_predicted_patches_only():
    ids = _ids([5])
    (mask,) = masking.pred_mask(ids)
    assert set(np.flatnonzero(mask)) == set(np.asarray(ids.pred[0]))


@pytest.mark.parametrize(
    "ratios, message",
    [
        (dict(mask_ratio=0.75, pred_ratio=0.9),
         "pred_ratio=0.9 predicts 176 of 196 patches but mask_ratio=0.75 removes only "
         "147"),
        (dict(mask_ratio=0.75, pred_ratio=0.0), "pred_ratio=0.0 must be above 0"),
        (dict(mask_ratio=1.0, pred_ratio=0.5), "mask_ratio=1.0 must lie between"),
        (dict(mask_ratio=0.0, pred_ratio=0.0), "mask_ratio=0.0 must lie between"),
        (dict(mask_ratio=0.999, pred_ratio=0.5), "leaves none of 196 patches visible"),
    ],
)
def test_impossible_ratios_are_refused(ratios, message):
    with pytest.raises(ValueError, match=message):
        masking.token_counts(196, **ratios)
