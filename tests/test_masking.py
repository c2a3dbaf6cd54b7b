"""Which patches are seen and which are predicted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import masking, sampling

COUNTS = masking.TokenCounts(num_keep=49, num_pred=49, num_thrown=0)


@functools.partial(jax.jit, static_argnames=("counts", "n", "columns"))
def _drawn(key, sample, counts, n, columns):
    noise = masking.uniform(key, {"sample": sample}, num=n)
    return masking.token_ids(noise, counts, columns=columns)


def _ids(sample, seed=0, counts=COUNTS, n=196, columns=None):
    key = jax.random.key(seed, impl="threefry2x32")
    return _drawn(key, jnp.asarray(sample, jnp.uint32), counts, n, columns)


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
    spread = jax.jit(lambda s: masking.token_ids(
        masking.uniform(key, {"sample": s}, num=196), COUNTS
    ))(sample)
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
    spread = jax.jit(lambda s: masking.token_ids(
        masking.uniform(key, {"sample": s}, num=196), counts, columns=14
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


def test_rounding_is_of_the_visible_patches():
    """30 visible, 88 masked and 78 thrown are AMT's numbers, 19 of 49 SimMIM's."""
    amt = dict(mask_ratio=0.85, pred_ratio=0.85, throw_ratio=0.4)
    assert masking.token_counts(196, **amt, rounding="ceil") == (30, 88, 78)
    assert masking.token_counts(196, **amt) == (29, 89, 78)
    for units, masked in ((49, 30), (36, 22)):  # of 224 and of 192 pixels
        counts = masking.token_counts(units, mask_ratio=0.6, pred_ratio=0.6)
        assert counts == (units - masked, masked, 0)
    with pytest.raises(ValueError, match="Unknown masking.rounding 'up'. Known: floor"):
        masking.token_counts(196, **amt, rounding="up")


def test_shared_noise_is_that_of_the_first_of_each_group():
    key = jax.random.key(0, impl="threefry2x32")
    batch = {"sample": jnp.asarray([8, 3, 5, 9, 1, 0], jnp.uint32)}
    own = masking.uniform(key, batch, num=10)
    together = masking.Shared(3)(key, batch, num=10)
    np.testing.assert_array_equal(together, own[jnp.array([0, 0, 0, 3, 3, 3])])
    few = masking.Shared(100)(key, batch, num=10)
    np.testing.assert_array_equal(few, own[jnp.zeros(6, int)])
    with pytest.raises(ValueError, match="together=4 does not divide a batch of 6"):
        masking.Shared(4)(key, batch, num=10)


def test_weighted_noise_draws_without_replacement_in_proportion_to_the_weights():
    num_samples, weights = 8192, np.array([1.0, 2.0, 5.0])
    batch = {
        "sample": jnp.arange(num_samples, dtype=jnp.uint32),
        "weights": jnp.tile(jnp.asarray(7 * weights, jnp.float32), (num_samples, 1)),
    }
    key = jax.random.key(0, impl="threefry2x32")
    noise = np.asarray(masking.weighted(key, batch, num=3))
    assert len(np.unique(noise)) > 0.99 * noise.size, "each sample draws for itself"
    order = np.argsort(-noise, axis=1)
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            chance = weights[first] / 8 * weights[second] / (8 - weights[first])
            share = np.mean((order[:, 0] == first) & (order[:, 1] == second))
            error = np.sqrt(chance * (1 - chance) / num_samples)
            assert abs(share - chance) < 5 * error


def test_patches_of_large_weight_are_masked_and_of_none_visible():
    weights = jnp.asarray([[0.0, 0.0, 0.0, 1e-6, 1e-6, 1e6, 1e6, 1e6]] * 4)
    batch = {"sample": jnp.arange(4, dtype=jnp.uint32), "weights": weights}
    noise = masking.weighted(jax.random.key(0), batch, num=8)
    ids = masking.token_ids(noise, masking.TokenCounts(3, 3, 2))
    np.testing.assert_array_equal(np.sort(ids.keep), [[0, 1, 2]] * 4)
    np.testing.assert_array_equal(ids.thrown, [[3, 4]] * 4)
    np.testing.assert_array_equal(ids.pred, [[5, 6, 7]] * 4)
    with pytest.raises(ValueError, match="the batch has only sample; give data with"):
        masking.weighted(jax.random.key(0), {"sample": batch["sample"]}, num=8)


@pytest.mark.parametrize("unit", [1, 2, 4])
def test_a_unit_is_a_square_of_patches(unit):
    rows, columns = 8, 12
    num = rows * columns // unit**2
    units = _ids(range(3), counts=masking.TokenCounts(num // 3, num // 3, 1), n=num)
    found = masking.expanded(units, unit=unit, grid=(rows, columns))
    for part, patches in zip(units, found, strict=True):
        for few, many in zip(np.asarray(part), np.asarray(patches), strict=True):
            expected = [
                (unit * (u // (columns // unit)) + i) * columns
                + unit * (u % (columns // unit)) + j
                for u in few for i in range(unit) for j in range(unit)
            ]
            if part is units.keep:
                np.testing.assert_array_equal(many, expected)
            else:
                np.testing.assert_array_equal(many, np.sort(expected))


@pytest.mark.parametrize("of", [(4, 6), (8, 12), (16, 6), (2, 3), (1, 6), (12, 2)])
def test_coverage_is_the_mean_of_the_mask_over_each_cell(of):
    ids = _ids(range(5), counts=masking.TokenCounts(10, 14, 0), n=24).pred
    found = masking.coverage(ids, grid=(4, 6), of=of)
    mask = np.asarray(masking.mask_of(ids, num_patches=24)).reshape(5, 4, 6)
    # As fine as both grids are, then the mean over cells.
    fine = mask.repeat(of[0], axis=1).repeat(of[1], axis=2)
    cells = fine.reshape(5, of[0], 4, of[1], 6).mean((2, 4))
    np.testing.assert_allclose(found, cells.reshape(5, -1), rtol=1e-6)
    assert set(np.unique(found)) <= {0, 1} or of[0] < 4 or of[1] < 6
    np.testing.assert_allclose(found.mean(1), 14 / 24, rtol=1e-6)


def test_coverage_of_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="Cells in 4x9 do not fit patches in 4x6"):
        masking.coverage(jnp.zeros((1, 2), int), grid=(4, 6), of=(4, 9))


def _sampler(**changes):
    options = dict(mask_ratio=0.75, pred_ratio=0.75, noise="uniform") | changes
    return sampling.make(options, grid=(8, 12))


def test_a_sampler_throws_whole_units():
    sampler = _sampler(unit=4, throw_ratio=0.5, retain="furthest", throw_by="unit")
    assert sampler.counts == (16, 32, 48)
    batch = {"sample": jnp.arange(7, dtype=jnp.uint32)}
    ids = jax.jit(sampler.draw)(jax.random.key(0), batch)
    for part in ids:
        covered = masking.coverage(part, grid=(8, 12), of=(2, 3))
        assert set(np.unique(covered)) == {0.0, 1.0}


@pytest.mark.parametrize("retain", ["furthest", "random"])
def test_a_sampler_throws_single_patches_of_masked_units(retain):
    # SimMIM's 224 pixels with PR-MIM at one half: 30 of 49 units, 98 of 196 patches.
    sampler = sampling.make(
        dict(mask_ratio=0.6, pred_ratio=0.6, throw_ratio=0.5, unit=2, retain=retain)
        | dict(noise="uniform"),
        grid=(14, 14),
    )
    assert sampler.counts == (76, 22, 98)
    batch = {"sample": jnp.arange(50, dtype=jnp.uint32)}
    keep, pred, thrown = jax.jit(sampler.draw)(jax.random.key(0), batch)
    seen = np.asarray(masking.coverage(keep, grid=(14, 14), of=(7, 7)))
    assert set(np.unique(seen)) == {0.0, 1.0} and (seen.sum(1) == 19).all()
    decoded = np.asarray(masking.coverage(pred, grid=(14, 14), of=(7, 7)))
    assert 0.25 in np.unique(decoded) and (decoded * seen == 0).all()
    together = np.sort(np.concatenate([keep, pred, thrown], axis=1))
    np.testing.assert_array_equal(together, np.tile(np.arange(196), (50, 1)))
    # The same units without throwing: what is thrown is a choice among the masked.
    whole = dataclasses.replace(sampler, throw_ratio=0.0, retain="random")
    assert whole.counts == (76, 120, 0)
    np.testing.assert_array_equal(
        jax.jit(whole.draw)(jax.random.key(0), batch).keep, keep
    )


def test_weights_are_of_what_is_masked_as_one():
    options = dict(noise="weighted", unit=2, throw_ratio=0.25)
    with pytest.raises(ValueError, match="none to order patches by; set masking.throw"):
        _sampler(**options)
    sampler = _sampler(**options, throw_by="unit")
    batch = {"sample": jnp.arange(2, dtype=jnp.uint32), "weights": jnp.ones((2, 24))}
    assert sampler.draw(jax.random.key(0), batch).thrown.shape == (2, 24)
    batch["weights"] = jnp.ones((2, 96))
    with pytest.raises(ValueError, match="has 96 numbers for each sample, but 24 patc"):
        sampler.draw(jax.random.key(0), batch)


@pytest.mark.parametrize("changes", [
    dict(pred_ratio=0.25), dict(pred_ratio=0.5, throw_ratio=0.25, retain="furthest"),
    dict(unit=2, noise="shared", together=4, pred_ratio=0.4, throw_ratio=0.1),
    dict(unit=2, throw_ratio=0.5, throw_by="unit"),
], ids=str)
def test_drawing_all_keeps_what_is_visible_and_leaves_nothing_out(changes):
    sampler, key = _sampler(**changes), jax.random.key(0)
    batch = {"sample": jnp.arange(8, dtype=jnp.uint32)}
    ids = jax.jit(sampler.draw)(key, batch)
    assert tuple(part.shape[1] for part in ids) == sampler.counts
    for throw in (True, False):
        draw = functools.partial(sampler.draw_all, throw=throw)
        every = jax.jit(draw)(key, batch)
        np.testing.assert_array_equal(every.keep, ids.keep)
        masked = np.concatenate([every.keep, every.pred, every.thrown], axis=1)
        np.testing.assert_array_equal(np.sort(masked), np.tile(np.arange(96), (8, 1)))
        expected = sampler.counts.num_pred if throw else 96 - ids.keep.shape[1]
        assert every.pred.shape[1] == expected
    if changes.get("noise") == "shared":
        np.testing.assert_array_equal(ids.pred[0], ids.pred[3])
        assert (ids.pred[3] != ids.pred[4]).any()


@pytest.mark.parametrize("changes, message", [
    (dict(noise="normal"), "Unknown masking.noise 'normal'. Known: shared, unif"),
    (dict(unit=3), "masking.unit=3 does not divide a grid of 8x12 patches"),
    (dict(unit=0), "masking.unit=0 does not divide"),
    (dict(together=8), "masking.together=8 is an option of masking.noise='shared', an"),
    (dict(noise="shared"), "masking.together=1 with masking.noise='shared'"),
    (dict(noise="shared", together=1), "in a row share a mask; give more than 1"),
    (dict(blocks=3), "Unknown option masking.blocks=3. Known: mask_ratio, no"),
    (dict(throw_by="row"), "Unknown masking.throw_by 'row'. Known: patch, unit"),
    (dict(retain="all"), "Unknown masking.retain 'all'. Known: furthest, random"),
])
def test_a_sampler_refuses_what_contradicts_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        _sampler(**changes)
