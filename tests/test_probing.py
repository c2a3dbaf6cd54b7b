"""What a loaded model tells of itself: predictions, their parts, maps, mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import crossmae_jax
from crossmae_jax import masking
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.runs import workdir
from crossmae_jax.tokens import Tokens
from tests.interop import torch
from tests.saved_runs import save_run
from tests.test_convert import GOLDEN, HEADS

CASES = {
    "mae": ("digits_mae",),
    "cross": (
        "digits_cross", "model.decoder.depth=3", "model.encoder.size=W16-D3-H2/4"
    ),
    "prmim": ("digits_cross_prmim",),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return {
        name: save_run(directory / name, config, "model.dtype=float32", *overrides)
        for name, (config, *overrides) in CASES.items()
    }


@pytest.fixture(scope="module")
def models(runs):
    return {name: crossmae_jax.load(run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)


@pytest.mark.parametrize("name", CASES)
def test_reconstructions_are_those_of_the_run(runs, models, images, name):
    objective = Pretrain(workdir.read_config(runs[name]))
    batch = {"image": jnp.asarray(images), "sample": jnp.arange(3, dtype=jnp.uint32)}
    expected = objective.outputs["reconstruction"](
        models[name].variables, batch, jax.random.key(5, impl="threefry2x32")
    )
    found = models[name].reconstruct(images, seed=5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
    )
    assert found.target is None  # what is to be predicted is the image
    assert found.thrown.any() == (name == "prmim")


def test_masks_depend_on_seed_ratio_and_number_alone(models, images):
    model = models["cross"]
    mask = model.reconstruct(images, mask_ratio=0.5, seed=1).mask
    assert mask.sum(1).tolist() == [8, 8, 8]
    last = model.reconstruct(
        images[2:], mask_ratio=0.5, seed=1, numbers=np.array([2])
    )
    np.testing.assert_array_equal(last.mask[0], mask[2])
    assert (model.reconstruct(images, mask_ratio=0.5, seed=2).mask != mask).any()
    with pytest.raises(ValueError, match="mask_ratio=1.2 must lie between 0 and 1"):
        model.reconstruct(images, mask_ratio=1.2)
    with pytest.raises(ValueError, match="a number for each of 3 images"):
        model.reconstruct(images, numbers=np.array([2]))


def test_other_ratios_throw_in_proportion(models, images):
    trained = models["prmim"].reconstruct(images)
    fewer = models["prmim"].reconstruct(images, mask_ratio=0.375)
    shares = [p.thrown.sum() / p.mask.sum() for p in (trained, fewer)]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)
    assert fewer.mask.sum() < trained.mask.sum()


def test_parts_of_a_prediction_end_with_the_prediction(models, images):
    for name in ("mae", "cross"):
        model = models[name]
        after = model.after_each_block(images, seed=2)
        depth = model.card.model["decoder"]["depth"]
        assert len(after) == 1 + depth
        found, expected = after[-1], model.reconstruct(images, seed=2)
        np.testing.assert_allclose(found.prediction, expected.prediction, atol=1e-5)
        assert all(
            np.abs(a.prediction - b.prediction).max() > 1e-3
            for a, b in zip(after, after[1:])
        )


def test_a_decoder_that_adds_nothing_has_its_input_as_only_part(models, images):
    model = crossmae_jax.load(GOLDEN / "ckpt_mae.pth", **HEADS)
    blocks = model.variables["params"]["decoder"]
    for name in blocks:
        if name.startswith("decoder_blocks_"):
            for layer in (blocks[name]["attn"]["proj"], blocks[name]["mlp"]["fc2"]):
                layer["kernel"] = jnp.zeros_like(layer["kernel"])
                layer["bias"] = jnp.zeros_like(layer["bias"])
    images = np.random.default_rng(0).integers(
        0, 256, (1, *model.card.image_size, 3), np.uint8
    )
    first, *others = model.after_each_block(images)
    for other in others:
        np.testing.assert_allclose(other.prediction, first.prediction, atol=1e-6)


def test_a_model_with_an_aggregator_has_no_such_parts(models, images):
    with pytest.raises(ValueError, match="no sum over blocks"):
        models["prmim"].after_each_block(images)
    with pytest.raises(ValueError, match="use reconstruct"):
        models["prmim"].predict(images, np.array([3]))


def test_feature_maps_begin_with_the_input_and_end_before_the_norm(models, images):
    maps = models["cross"].feature_maps(images)
    assert maps.shape == (4, 3, 17, 16)
    # CrossMAE's encoder has no final norm: its tokens are the last map.
    np.testing.assert_array_equal(maps[-1], models["cross"].tokens(images))
    features = models["cross"].encode(images)
    np.testing.assert_allclose(maps[-1][:, 1:].mean(1), features, atol=1e-6)


def test_inter_block_weights_are_those_of_the_reference():
    """Rows are decoder blocks; PyTorch keeps `linear.weight` as [block, map]."""
    model = crossmae_jax.load(GOLDEN / "ckpt_crossmae.pth", **HEADS)
    state = torch.load(GOLDEN / "ckpt_crossmae.pth", weights_only=False)["model"]
    expected = state["wfm.linear.weight"].numpy()
    np.testing.assert_array_equal(model.inter_block_weights(), expected)
    assert len(model.mixed_maps()) == expected.shape[1]


def test_a_model_without_mixture_has_no_inter_block_weights(models):
    with pytest.raises(ConversionError, match="mixes no feature maps"):
        models["mae"].inter_block_weights()


def test_files_come_in_a_list_and_grey_arrays_with_a_channel(models, images, tmp_path):
    model, path = models["cross"], tmp_path / "grey.png"
    Image.fromarray(images[0, :, :, 0]).save(path)
    np.testing.assert_array_equal(model.prepare([path, str(path)])[0], images[0])
    with pytest.raises(ValueError, match="is one file; give a list"):
        model.encode(path)
    with pytest.raises(ValueError, match=r"Of a grey one: image\[:, :, None\]"):
        model.encode([images[0, :, :, 0]])


def test_positions_of_an_aggregator_stay_at_their_size(tmp_path):
    run = save_run(
        tmp_path / "run", "digits_cross_prmim", "model.aggregator.kind=transformer"
    )
    with pytest.raises(ConversionError, match="cannot be resized to"):
        crossmae_jax.load(run, image_size=(24, 24))


def test_an_encoder_alone_says_that_the_decoder_is_missing():
    model = crossmae_jax.load(GOLDEN / "ckpt_encoder_only.pth", num_heads=2)
    images = np.zeros((1, *model.card.image_size, 3), np.uint8)
    for method in (model.reconstruct, model.after_each_block):
        with pytest.raises(ConversionError, match="has no decoder, only encoder; this"):
            method(images)


def test_unknown_targets_are_asked_for():
    model = crossmae_jax.load(GOLDEN / "ckpt_mae.pth", **HEADS)
    object.__setattr__(model.card, "normalize", None)
    images = np.zeros((1, *model.card.image_size, 3), np.uint8)
    with pytest.raises(ConversionError, match="give load.*normalize=True"):
        model.reconstruct(images)


class TestPartialReconstruction:
    """CrossMAE, trained on a part of the masked patches, decodes any of them."""

    def test_a_prediction_does_not_depend_on_which_others_are_made(
        self, models, images
    ):
        """Bit for bit: the same number of other patches, none of them the same."""
        model = models["cross"]
        masked = np.flatnonzero(model.reconstruct(images[:1]).mask[0])
        patch, others = masked[4], np.delete(masked, 4)
        first = model.predict(images[:1], np.array([*others[:3], patch]))
        second = model.predict(images[:1], np.array([*others[-3:], patch]))
        np.testing.assert_array_equal(first[:, 3], second[:, 3])
        assert not np.array_equal(first[:, :3], second[:, :3])

    def test_a_part_is_decoded_as_all_are(self, models, images):
        model = models["cross"]
        everything = model.predict(images, np.arange(16))
        for part in (np.array([7]), np.arange(3, 16, 4), np.array([9, 2, 11])):
            np.testing.assert_allclose(
                model.predict(images, part), everything[:, part], atol=2e-6
            )

    def test_no_gradient_passes_from_one_prediction_to_another_query(
        self, models, images
    ):
        model = models["cross"]
        objective = model._objective(None)
        normal = objective.normalize({"image": jnp.asarray(images)})
        batch = {"sample": jnp.arange(3, dtype=jnp.uint32)}
        ids = objective.masked_ids(jax.random.key(0), batch)

        def run(shift):
            bound = objective.model.bind(model.variables)
            decoder = bound.decoder
            contexts = bound.fusion(bound.encode(normal, ids))
            x = decoder.queries(ids.pred) + shift
            for block, context in zip(decoder.decoder_blocks, contexts, strict=True):
                x = block(x, context.sequence)
            tokens = Tokens(x, ids.pred, objective.grid)
            return decoder.head("pixels", tokens, ids, {}).values.sum((0, 2))  # q

        shape = (1, ids.pred.shape[1], model.card.model["decoder"]["dim"])
        matrix = jnp.abs(jax.jacobian(run)(jnp.zeros(shape)))[:, 0].sum(-1)  # q q
        assert (jnp.diag(matrix) > 0).all()
        np.testing.assert_array_equal(matrix - jnp.diag(jnp.diag(matrix)), 0)

    def test_mae_predicts_masked_patches_only_and_they_matter(self, models, images):
        model, image = models["mae"], images[:1]
        mask = model.reconstruct(image).mask[0]
        masked, visible = np.flatnonzero(mask), np.flatnonzero(~mask)
        few, many = (model.predict(image, ids) for ids in (masked[:2], masked))
        assert np.abs(few - many[:, :2]).max() > 1e-6
        with pytest.raises(ValueError, match="are visible in some of these images"):
            model.predict(image, np.array([visible[0], masked[0]]))

    @pytest.mark.parametrize("ids", [[16], [-1], [[1, 2]], [], [True] * 16, [0.5]])
    def test_numbers_of_no_patch_are_refused(self, models, images, ids):
        with pytest.raises(ValueError, match="expected numbers of patches, 0 to 15"):
            models["cross"].predict(images, ids)

    def test_targets_are_what_predictions_are_measured_by(self, models, images):
        model = models["cross"]
        pictures = model.reconstruct(images[:1], seed=3)
        masked = np.flatnonzero(pictures.mask[0])
        pred = model.predict(images[:1], masked, seed=3)
        error = (pred - model.targets(images[:1])[:, masked]) ** 2
        np.testing.assert_allclose(
            error.mean(-1)[0], pictures.error[0, masked], rtol=1e-4
        )

    def test_the_loss_of_random_parts_is_unbiased(self, models, images):
        """Its mean over parts is the loss of all masked patches, within 4 errors."""
        model = models["cross"]
        objective = model._objective(None)
        normal = objective.normalize({"image": jnp.asarray(images[:1])})
        num_keep, num_all = 4, 12
        noise = jax.random.uniform(jax.random.key(0), (1, 16))
        visible = jnp.argsort(noise[0])[:num_keep]
        full = masking.token_ids(noise, masking.TokenCounts(num_keep, num_all, 0))
        expected, _ = objective.masked_loss(model.variables, normal, full)

        @jax.jit
        def losses(keys):
            def loss(key):
                # The same patches stay visible, others are drawn: those predicted.
                drawn = jax.random.uniform(key, (1, 16)).at[0, visible].add(-1)
                ids = masking.token_ids(drawn, masking.TokenCounts(num_keep, 4, 0))
                return objective.masked_loss(model.variables, normal, ids)[0]

            return jax.lax.map(loss, keys)

        found = losses(jax.random.split(jax.random.key(1), 4000))
        error = found.std() / np.sqrt(len(found))
        assert error < 0.02 * expected
        assert abs(found.mean() - expected) < 4 * error
        # The test can fail: a part that is always the same has another loss.
        always = full._replace(pred=full.pred[:, :4])
        part, _ = objective.masked_loss(model.variables, normal, always)
        assert abs(part - expected) > 4 * error
