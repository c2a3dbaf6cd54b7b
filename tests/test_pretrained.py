"""`crossmae_jax.load`: the features of our evaluations, from files of any format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossmae_jax
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.ops import attention, attention_xla
from crossmae_jax.runs import workdir
from tests.parity_files import load_npz
from tests.saved_runs import save_run
from tests.test_convert import GOLDEN, HEADS


@pytest.fixture(scope="module", params=["digits_mae", "digits_cross"])
def run(request, tmp_path_factory):
    """A float32 model of two blocks; CrossMAE's decoder sees the first."""
    overrides = ["model.encoder.size=W16-D2-H2/4", "model.dtype=float32"]
    if request.param == "digits_cross":
        overrides.append("model.fusion.maps=(0,)")
    return save_run(
        tmp_path_factory.mktemp("runs") / request.param, request.param, *overrides
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)


def test_features_are_those_of_the_evaluations(run, images):
    objective = Pretrain(workdir.read_config(run))
    variables = checkpointer.restore_variables(run / "checkpoints")
    expected = objective.outputs["features"](
        variables, {"image": jnp.asarray(images)}
    )
    encoder = crossmae_jax.load(run)
    np.testing.assert_allclose(encoder(images), expected, atol=2e-6)


def test_the_same_images_give_the_same_features(run, images):
    encoder = crossmae_jax.load(run)
    np.testing.assert_array_equal(encoder(images), encoder(images))
    np.testing.assert_allclose(encoder(images[:1]), encoder(images)[:1], atol=2e-6)


def test_an_encoder_works_on_one_device_and_kernels_may_know(run, images, monkeypatch):
    encoder, meshes = crossmae_jax.load(run), []
    monkeypatch.setitem(
        attention.IMPLEMENTATIONS, "xla", attention.Implementation(
            attention_xla.attention,
            lambda *_: meshes.append(jax.sharding.get_abstract_mesh()), None,
        ),
    )
    encoder(images)
    assert meshes and all(not mesh.empty and mesh.size == 1 for mesh in meshes)


def test_a_list_of_images_is_resized_and_cropped(run, images):
    encoder = crossmae_jax.load(run)
    big = np.kron(images[0], np.ones((4, 2, 1), np.uint8))
    assert encoder([big, images[1]]).shape == (2, 16)
    np.testing.assert_array_equal(encoder(list(images)), encoder(images))


def test_another_image_size_resizes_the_position_table(run):
    images = np.random.default_rng(0).integers(0, 256, (1, 24, 32, 1), np.uint8)
    encoder = crossmae_jax.load(run, image_size=(24, 32))
    assert encoder.tokens(images).shape == (1, 1 + 6 * 8, 16)
    with pytest.raises(ValueError, match=r"expected \(b, 16, 16, 1\)"):
        crossmae_jax.load(run)(images)


def test_features_of_the_reference_at_a_larger_size_come_out():
    data = load_npz(GOLDEN / "ckpt_encoder_only_expected.npz")
    encoder = crossmae_jax.load(
        GOLDEN / "ckpt_encoder_only.pth", num_heads=2, image_size=(56, 56)
    )
    images = jnp.asarray(data["imgs/interp"].transpose(0, 2, 3, 1))
    tokens = encoder.model.apply(encoder.variables, images).last.sequence
    np.testing.assert_allclose(tokens, data["tokens/cls_interp"], atol=3e-5)


def test_a_classifier_gives_its_logits(images):
    encoder = crossmae_jax.load(GOLDEN / "ckpt_finetuned.pth", num_heads=2)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert encoder.logits(images).shape == (2, 9)
    assert encoder(images).shape == (2, 16)
    maps, attention = (
        encoder.feature_maps(images), encoder.attention_maps(images, part="encoder")
    )
    assert maps.shape[1:] == attention.queries.shape + (16,)
    assert len(maps) == 1 + len(attention.weights)


def test_an_encoder_has_no_logits(run, images):
    with pytest.raises(ConversionError, match="has no head, only encoder"):
        crossmae_jax.load(run).logits(images)


def test_a_wide_image_needs_its_size_once(tmp_path):
    from tests.interop import timm, torch

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 64), embed_dim=24, depth=1, num_heads=2,
        num_classes=0,
    )
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    half = (0.5, 0.5, 0.5)
    encoder = crossmae_jax.load(
        tmp_path / "wide.pth", num_heads=2, image_size=(32, 64), mean=half, std=half
    )
    images = np.zeros((1, 32, 64, 3), np.uint8)
    assert encoder.tokens(images).shape == (1, 9, 24)
    with pytest.raises(ValueError, match="list of images is empty"):
        encoder([])


def test_unknown_statistics_are_asked_for():
    path = GOLDEN / "timm_vit_tiny_like.safetensors"
    with pytest.raises(ConversionError, match="give mean and std"):
        crossmae_jax.load(path, num_heads=3)
    half = (0.5, 0.5, 0.5)
    encoder = crossmae_jax.load(path, num_heads=3, mean=half, std=half)
    images = np.full((1, 64, 64, 3), 255, np.uint8)
    grey = crossmae_jax.load(path, num_heads=3, mean=(0.0,) * 3, std=half)
    assert np.abs(encoder(images) - grey(images)).max() > 1e-3


@pytest.mark.parametrize("make, said", [
    (lambda x: x / np.float32(255), "of type float32; expected uint8"),
    (lambda x: x[0], r"the shape \(16, 16, 1\)"),
    (lambda x: [x[0].astype(np.int64)], "of type int64"),
])
def test_images_that_are_none_are_refused(run, images, make, said):
    with pytest.raises(ValueError, match=said):
        crossmae_jax.load(run)(make(images))


def test_a_whole_foreign_model_has_all_its_parts():
    model = crossmae_jax.load(GOLDEN / "ckpt_crossmae.pth", **HEADS)
    assert model.card.parts == ["encoder", "fusion", "decoder"]
    assert set(model.variables["params"]) == {"encoder", "fusion", "decoder"}
