"""Attention weights from outside of the layers, their sums, and what they carry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossmae_jax
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.probing import attention_weights, pretrained
from tests.saved_runs import save_run

CASES = {
    "mae": ("digits_mae", "model.decoder.depth=3", "model.decoder.num_heads=4"),
    "cross": ("digits_cross", "model.decoder.depth=2"),
    "cross_self": ("digits_cross", "model.decoder.self_attention=True"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Drawn weights, much larger than those of a new model, so that attention is."""
    directory, found = tmp_path_factory.mktemp("runs"), {}
    for name, (config, *overrides) in CASES.items():
        model = crossmae_jax.load(save_run(
            directory / name, config, "model.dtype=float32", *overrides
        ))
        model.variables["params"] = jax.tree.map(
            lambda x: 4 * x, model.variables["params"]
        )
        found[name] = model
    return found


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
@pytest.mark.parametrize("name", ["mae", "cross"])
def test_keys_times_magnitudes_are_the_heads_in_every_block(
    models, images, name, mask_ratio
):
    model = models[name]
    found = model.attention_magnitudes(images, mask_ratio=mask_ratio, seed=3)
    num_visible = 1 + int(16 * (1 - mask_ratio)) if name == "mae" else found.num_visible
    assert found.num_visible == num_visible
    assert found.num_masked == (16 - (num_visible - 1) if name == "mae" else 0)
    total = found.num_visible * found.visible + found.num_masked * found.masked
    heads, depth = model.model.decoder.num_heads, model.model.decoder.depth
    np.testing.assert_allclose(total, np.full((3, depth), heads), rtol=2e-6)
    if name == "mae":
        assert np.ptp(found.share) > 0.01  # these weights attend unevenly
    else:
        np.testing.assert_array_equal(found.masked, 0)


def test_the_numbers_of_the_paper_follow_the_same_identity():
    """Figure 1's table, MAE ViT-B: 16 heads, 50 visible keys with the class token."""
    found = attention_weights.Magnitudes(
        visible=np.array([0.196, 0.149, 0.181, 0.153, 0.193, 0.161, 0.207, 0.179]),
        masked=np.array([0.042, 0.058, 0.047, 0.057, 0.043, 0.054, 0.038, 0.048]),
        num_visible=50, num_masked=147,
    )
    total = 50 * found.visible + 147 * found.masked
    np.testing.assert_allclose(total, 16, rtol=0.005)  # printed with three digits
    table = [" ".join(line.split()) for line in found.table().splitlines()]
    assert table[-1] == "| sum | 1.419 | 0.387 | 55.5 % |"
    assert table[2] == "| 1 | 0.196 | 0.042 | 61.3 % |"


def test_magnitudes_are_means_over_the_maps_that_are_shown(models, images):
    """Sums over heads of means over masked queries and keys, by patch numbers."""
    model = models["mae"]
    found = model.attention_magnitudes(images, seed=2)
    maps = model.attention_maps(images, seed=2)
    mask = model.reconstruct(images, seed=2).mask
    for sample in range(3):
        masked = np.flatnonzero(mask[sample])
        asks = np.isin(maps.queries[sample], masked)
        of_masked = maps.weights[:, sample][:, :, asks]  # i h q k
        is_masked = np.isin(maps.keys[sample], masked)
        for keys, values in ((~is_masked, found.visible), (is_masked, found.masked)):
            mean = of_masked[..., keys].mean((2, 3)).sum(1)
            np.testing.assert_allclose(values[sample], mean, rtol=1e-5)


def test_two_softmaxes_are_not_compared(models, images):
    with pytest.raises(ValueError, match="comes from two softmaxes"):
        models["cross_self"].attention_magnitudes(images)


@pytest.mark.parametrize("name", CASES)
def test_maps_say_which_tokens_attend_to_which(models, images, name):
    model = models[name]
    maps = model.attention_maps(images, seed=1)
    mask = model.reconstruct(images, seed=1).mask
    np.testing.assert_allclose(maps.weights.sum(-1), 1, rtol=1e-5)
    for sample in range(3):
        masked, visible = (np.flatnonzero(x[sample]) for x in (mask, ~mask))
        seen = sorted([attention_weights.CLASS_TOKEN, *visible])
        everything = sorted([*seen, *masked])
        assert sorted(maps.keys[sample]) == (everything if name == "mae" else seen)
        asks = everything if name == "mae" else masked
        assert sorted(maps.queries[sample]) == list(asks)


def test_the_encoder_attends_over_whole_images(models, images):
    maps = models["cross"].attention_maps(images, part="encoder")
    assert maps.weights.shape == (1, 3, 2, 17, 17)
    np.testing.assert_array_equal(maps.keys[0], np.arange(-1, 16))
    encoder = models["cross"].attention_maps(images[:1], part="encoder")
    np.testing.assert_allclose(maps.weights[:, :1], encoder.weights, atol=1e-6)


def test_attention_of_which_nothing_is_taken_stays_as_it_is(models, images):
    """One masked patch that keeps its own key: the same numbers, by another way."""
    ratio = 1 / 16
    full = models["mae"].reconstruct(images, mask_ratio=ratio)
    assert full.mask.sum() == 3
    kept = models["mae"].reconstruct(
        images, mask_ratio=ratio, without="masked", keep_own=True
    )
    np.testing.assert_allclose(kept.pasted, full.pasted, atol=2e-5)
    taken = models["mae"].reconstruct(images, mask_ratio=ratio, without="masked")
    assert np.abs(taken.pasted - full.pasted).max() > 1e-3


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """Returns predictions of an MAE without some attention.

    Of one block: visible patches attend to all as ever, and pass on what they saw.
    """
    model = crossmae_jax.load(save_run(
        tmp_path_factory.mktemp("runs") / "shallow", "digits_mae",
        "model.dtype=float32", "model.decoder.depth=1",
    ))
    objective = model._objective(None)
    variables = jax.tree.map(lambda x: 4 * x, model.variables)

    def run(images, ids, kind):
        normal = objective.normalize({"image": jnp.asarray(images)})
        with attention_weights.without(kind, ids):
            return objective.model.apply(variables, normal, ids)["pixels"].values

    sample = jnp.arange(3, dtype=jnp.uint32)
    return run, objective.masked_ids(jax.random.key(0), {"sample": sample})


def test_without_masked_keys_predictions_do_not_know_of_each_other(ablated, images):
    run, ids = ablated
    fewer = ids._replace(pred=ids.pred[:, ::3])
    alone, together = (run(images, x, "masked") for x in (fewer, ids))
    np.testing.assert_allclose(alone, together[:, ::3], atol=1e-4)
    alone, together = (run(images, x, "visible") for x in (fewer, ids))
    assert np.abs(alone - together[:, ::3]).max() > 0.1


def test_without_visible_keys_predictions_do_not_know_the_image(ablated, images):
    run, ids = ablated
    one, other = (run(x, ids, "visible") for x in (images, 255 - images))
    np.testing.assert_allclose(one, other, atol=1e-4)
    one, other = (run(x, ids, "masked") for x in (images, 255 - images))
    assert np.abs(one - other).max() > 0.1


def test_ablations_are_refused_where_there_is_nothing_to_take(models, images):
    with pytest.raises(ValueError, match="CrossMAE's decoder does not have"):
        models["cross"].reconstruct(images, without="masked")
    with pytest.raises(ValueError, match="keep_own=True with without=None"):
        models["mae"].reconstruct(images, keep_own=True)
    with pytest.raises(ValueError, match="Unknown attention 'class'"):
        models["mae"].reconstruct(images, without="class")
    with pytest.raises(ValueError, match="Unknown part 'fusion'"):
        models["mae"].attention_maps(images, part="fusion")
    with pytest.raises(ValueError, match="leave mask_ratio out"):
        models["mae"].attention_maps(images, part="encoder", mask_ratio=0.5)


def test_an_encoder_alone_has_no_decoder_attention(models, images):
    card = models["mae"].card.encoder_only()
    variables = {
        name: tree["encoder"] for name, tree in models["mae"].variables.items()
        if "encoder" in tree
    }
    encoder = pretrained.Pretrained(card, variables)
    with pytest.raises(ConversionError, match="has no decoder, only encoder"):
        encoder.attention_maps(images)
    assert encoder.attention_maps(images, part="encoder").weights.shape[0] == 1
