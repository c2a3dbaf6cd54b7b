"""Which patches are seen and which are predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import masking

COUNTS = masking.TokenCounts(num_keep=49, num_pred=49, num_thrown=0)


def _ids(sample, seed=0, counts=COUNTS, n=196, columns=None):
    key = jax.random.key(seed, impl="threefry2x32")
    sample = jnp.asarray(sample, jnp.uint32)
    return masking.sample_token_ids(
        key, sample, counts, num_patches=n, columns=columns
    )


def test_visible_and_predicted_patches_are_disjoint_and_counted():
    ids = _ids(range(16))
    assert ids.thrown.shape == (16, 0)
    for keep, pred in zip(np.asarray(ids.keep), np.asarray(ids.pred), strict=True):
        assert len(set(keep)) == len(set(pred)) == 49
        assert not set(keep) & set(pred)
        assert (np.diff(pred) > 0).all(), "predicted patches come in raster order"


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
    spread = jax.jit(
        lambda s: masking.sample_token_ids(key, s, COUNTS, num_patches=196)
    )(sample)
    jax.tree.map(np.testing.assert_array_equal, spread, _ids(range(16)))


def test_every_patch_is_as_likely_to_be_visible():
    num_samples = 4096
    ids = _ids(range(num_samples), counts=masking.TokenCounts(4, 12, 0), n=16)
    seen = np.bincount(np.asarray(ids.keep).ravel(), minlength=16) / num_samples
    # 5 standard deviations of a frequency of 1/4.
    assert np.abs(seen - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / num_samples)


def test_a_mask_is_true_at_the_given_patches_only():
    ids = _ids([5])
    (mask,) = masking.mask_of(ids.pred, num_patches=196)
    assert mask.shape == (196,)
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
        (dict(mask_ratio=0.75, pred_ratio=0.75, throw_ratio=0.75),
         "throw_ratio=0.75 throws 147 of 196 patches, and pred_ratio=0.75 predicts "
         "147: none is left to decode"),
        (dict(mask_ratio=0.75, pred_ratio=0.25, throw_ratio=0.5),
         "throw_ratio=0.5 throws 98 of 196 patches, and pred_ratio=0.25 predicts 49"),
        (dict(mask_ratio=0.75, pred_ratio=0.75, throw_ratio=0.8),
         "throw_ratio=0.8 throws 157 of 196 patches but mask_ratio=0.75 removes only "
         "147"),
        (dict(mask_ratio=0.75, pred_ratio=0.75, throw_ratio=-0.1),
         "throw_ratio=-0.1 must be 0 or more"),
    ],
)
def test_impossible_ratios_are_refused(ratios, message):
    with pytest.raises(ValueError, match=message):
        masking.token_counts(196, **ratios)


@pytest.mark.parametrize("columns", [None, 14])
def test_every_masked_patch_is_decoded_thrown_or_skipped(columns):
    counts = masking.TokenCounts(num_keep=49, num_pred=30, num_thrown=100)
    ids = _ids(range(8), counts=counts, columns=columns)
    plain = _ids(range(8))
    for keep, pred, thrown, before in zip(*map(np.asarray, ids), plain.keep):
        np.testing.assert_array_equal(keep, before)
        assert len(set(keep) | set(pred) | set(thrown)) == 49 + 30 + 100
        assert (np.diff(pred) > 0).all() and (np.diff(thrown) > 0).all()


def test_throwing_decodes_the_patches_of_partial_prediction():
    thrown = _ids(range(4), counts=masking.TokenCounts(49, 49, 98))
    skipped = _ids(range(4))
    np.testing.assert_array_equal(thrown.pred, skipped.pred)
    masks = [masking.mask_of(part, num_patches=196) for part in thrown]
    assert (masks[0] + masks[1] + masks[2]).all()


def _smallest_gap(patches, columns):
    """Mean over samples of the smallest distance between two of the patches."""
    places = np.stack(np.divmod(np.asarray(patches), columns), -1)
    offsets = places[:, :, None] - places[:, None]
    distances = np.sqrt((offsets**2).sum(-1)) + 1e9 * np.eye(places.shape[1])
    return distances.min((1, 2)).mean()


@pytest.mark.parametrize("rows, columns", [(14, 14), (8, 20)])
def test_furthest_patches_lie_further_apart_than_random_ones(rows, columns):
    n = rows * columns
    counts = masking.token_counts(n, mask_ratio=0.75, pred_ratio=0.75, throw_ratio=0.65)
    spread, random = (
        _smallest_gap(_ids(range(32), counts=counts, n=n, columns=c).pred, columns)
        for c in (columns, None)
    )
    assert random < 1.3 and spread > 2


def test_furthest_choice_has_no_favourite_place():
    """Ties go to the first in random order: no drift to where lists begin."""
    num_samples, side = 4096, 6
    counts = masking.TokenCounts(num_keep=9, num_pred=6, num_thrown=21)
    ids = _ids(range(num_samples), counts=counts, n=side**2, columns=side)
    seen = np.bincount(np.asarray(ids.pred).ravel(), minlength=side**2)
    share = seen.reshape(side, side) / num_samples
    # The grid's symmetries leave the shares alone, up to 6 standard deviations.
    for turned in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(share - turned).max() < 6 * np.sqrt(2 * 0.25 / num_samples)
    assert share[0, 0] > share[2, 2], "corners are far from everything"


def test_furthest_choice_is_per_sample_and_the_same_on_eight_devices():
    mesh = jax.sharding.Mesh(jax.devices(), "data")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sample = jax.device_put(jnp.arange(16, dtype=jnp.uint32), sharding)
    key = jax.random.key(0, impl="threefry2x32")
    counts = masking.TokenCounts(49, 49, 98)
    spread = jax.jit(lambda s: masking.sample_token_ids(
        key, s, counts, num_patches=196, columns=14
    ))(sample)
    jax.tree.map(
        np.testing.assert_array_equal, spread,
        _ids(range(16), counts=counts, columns=14),
    )
    alone = _ids([7], counts=counts, columns=14)
    np.testing.assert_array_equal(alone.pred[0], spread.pred[7])


def test_the_throwing_ratio_is_of_all_patches():
    table = ((0.0, 0, 147), (0.25, 49, 98), (0.5, 98, 49), (0.65, 127, 20))
    for ratio, thrown, pred in table:
        assert masking.token_counts(
            196, mask_ratio=0.75, pred_ratio=0.75, throw_ratio=ratio
        ) == (49, pred, thrown)
