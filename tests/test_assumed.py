"""What a file does not tell: what the user says goes first, then what is usual."""

import json

import jax
import numpy as np
import pytest
import safetensors.torch

import crossmae_jax
from crossmae_jax import convert
from crossmae_jax.convert import starting
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.objectives.pretrain import Pretrain
from tests import interop
from tests.interop import timm, torch
from tests.saved_runs import tiny_config
from tests.test_convert import GOLDEN, HEADS, _main

HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TINY = GOLDEN / "timm_vit_tiny_like.safetensors"
TOLERANCE = 3e-5


def _vit(path, **changes):
    """Saves a random VisionTransformer of timm as a bare file."""
    arguments = dict(
        img_size=32, patch_size=16, embed_dim=192, depth=12, num_heads=6, num_classes=0
    )
    model = timm.models.vision_transformer.VisionTransformer(**arguments | changes)
    model = interop._randomise(model)
    safetensors.torch.save_file(model.state_dict(), path)
    return model


@pytest.fixture(scope="module")
def six_heads(tmp_path_factory):
    """A file of ViT-Ti's shapes, which has 3 heads, with 6; and its model in timm."""
    path = tmp_path_factory.mktemp("files") / "vit.safetensors"
    return path, _vit(path)


def _plan(path, name, *overrides):
    config = tiny_config(
        name, "data.channels=3", "data.mean=(0.5, 0.5, 0.5)",
        "data.std=(0.5, 0.5, 0.5)", *overrides,
    )
    like = jax.eval_shape(Pretrain(config).init, jax.random.key(0))
    return starting.plan(str(path), like, config)


def _assumed(card):
    return [line for line in card.lines() if line.startswith("assumed")]


def test_heads_that_are_said_are_those_of_the_model(six_heads):
    path, model = six_heads
    told = crossmae_jax.load(path, num_heads=6, **HALF)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    inputs = torch.tensor((images / 127.5 - 1).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        expected = model.forward_features(inputs).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(told.tokens(images), expected, atol=TOLERANCE * scale)
    assert not any("heads" in line for line in _assumed(told.card))


def test_heads_that_are_not_said_are_printed_as_assumed(
    six_heads, capsys, caplog, tmp_path
):
    path, _ = six_heads
    said = "3 heads of the encoder, as ViT-Ti has; give num_heads if not"
    with caplog.at_level("WARNING", logger="absl"):
        card = crossmae_jax.load(path, **HALF).card
    assert f"assumed: {said}" in caplog.text
    assert any(said in line for line in _assumed(card))
    assert _main("import", path, f"--to={tmp_path / 'in'}", "--no_check") == 0
    assert f"assumed: {said}" in capsys.readouterr().out
    assert any(said in x for x in _assumed(convert.open_weights(tmp_path / "in").card))


@pytest.mark.parametrize("imported", (False, True))
def test_heads_of_the_model_beat_what_is_assumed(six_heads, tmp_path, imported):
    path, _ = six_heads
    if imported:
        path = convert.import_weights(path, tmp_path / "in", check=False).path
    plan = _plan(
        path, "digits_mae", "model.encoder.size=W192-D12-H6/16",
        "data.image_size=(32, 32)",
    )
    assert "  assumed  6 heads of the encoder, as the model has; the file does not " + (
        "tell"
    ) in plan.report


def test_statistics_of_the_references_code_are_assumed_and_give_way(caplog, tmp_path):
    path = GOLDEN / "ckpt_mae.pth"
    said = "mean 0.485 0.456 0.406, ImageNet's, as MAE's code has; give mean if not"
    with caplog.at_level("WARNING", logger="absl"):
        card = crossmae_jax.load(path, **HEADS).card
    assert card.mean == (0.485, 0.456, 0.406) and said in caplog.text
    assert any(said in line for line in _assumed(card))
    assert any("std 0.229 0.224 0.225" in line for line in _assumed(card))
    card = crossmae_jax.load(path, **HEADS, mean=HALF["mean"]).card
    assert card.mean == HALF["mean"] and set(card.assumed) == {"image_size", "std"}
    done = convert.import_weights(path, tmp_path / "in", **HEADS, check=False)
    assert f"assumed: {said}" in done.lines
    weights = convert.open_weights(path, **HEADS, **HALF)
    assert weights.card.std == HALF["std"] and set(weights.card.assumed) == {
        "image_size"
    }
    for source in (tmp_path / "in", path):
        report = _plan(
            source, "digits_mae", "model.encoder.size=W16-D2-H2/8",
            "data.image_size=(32, 32)", "model.encoder.mlp_ratio=2.0",
            "model.decoder.mlp_ratio=2.0",
        ).report
        assert (
            "  assumed  ImageNet's mean and std, as its authors' code has; the file "
            "does not tell"
        ) in report
        assert any("the weights are of images with mean=(0.485" in x for x in report)


def test_heads_of_the_file_beat_those_of_the_model(tmp_path):
    interop.hf_model().save_pretrained(tmp_path / "hf")
    size = ["model.encoder.size=W32-D2-H4/8", "data.image_size=(32, 32)"]
    with pytest.raises(ConversionError, match="encoder: 2, the model has 4"):
        _plan(tmp_path / "hf", "digits_mae", *size)


def _published_decoder(path):
    """Saves an MAE whose decoder has a published width, with 4 heads in truth."""
    model = interop.hf_model(
        decoder_hidden_size=256, decoder_num_attention_heads=4,
        decoder_num_hidden_layers=1, decoder_intermediate_size=256,
    )
    model.save_pretrained(path / "hf")
    return convert.export_weights(
        path / "hf", path / "whole.pth", format="mae", check=False
    ).path


def test_heads_of_a_decoder_are_assumed_likewise(tmp_path):
    path = _published_decoder(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({"model": content["model"]}, path)  # without our card
    said = "8 heads of the decoder, as in every published one of width 256"
    bare = convert.open_weights(path, num_heads=2)
    assert any(said in line for line in bare.evidence)
    told = convert.open_weights(path, num_heads=2, decoder_heads=4)
    assert told.card.model["decoder"]["num_heads"] == 4
    plan = _plan(
        path, "digits_mae", "model.encoder.size=W32-D2-H2/8",
        "data.image_size=(32, 32)", "model.decoder.dim=256",
        "model.decoder.num_heads=4", "model.decoder.mlp_ratio=1.0",
    )
    assert any("assumed  4 heads of the decoder" in line for line in plan.report)
    assert any(name.startswith("decoder/") for name in plan.tensors)


@pytest.mark.parametrize("facts", (dict(num_heads=0), dict(decoder_heads=-1)))
def test_no_heads_are_none(facts):
    with pytest.raises(ConversionError, match="expected 1 or more"):
        convert.open_weights(TINY, **facts)


def test_pooling_that_a_bare_file_does_not_tell_is_assumed_or_said():
    weights = convert.open_weights(TINY, num_heads=3)
    said = "assumed: the class token is pooled, as usual without an fc_norm"
    assert any(line.startswith(said) for line in weights.evidence)
    weights = convert.open_weights(TINY, num_heads=3, pool="cls")
    assert "pool" not in weights.card.assumed
    for pool in ("mean", "avgmax"):
        with pytest.raises(ConversionError, match="by itself: parts='encoder'"):
            convert.open_weights(TINY, num_heads=3, pool=pool)
        alone = convert.open_weights(TINY, num_heads=3, pool=pool, parts="encoder")
        assert alone.card.kind == "encoder"


@pytest.mark.parametrize("pool, classes, fits", [
    ("avg", 5, True), ("avgmax", 5, False), ("max", 0, False), ("token", 5, False),
])
def test_pooling_of_a_folder_of_timm_is_that_of_its_config(
    tmp_path, pool, classes, fits
):
    """An fc_norm follows the mean, the largest, both, or the class token."""
    _vit(
        tmp_path / "model.safetensors", global_pool=pool, num_classes=classes,
        fc_norm=True, depth=1,
    )
    (tmp_path / "config.json").write_text(json.dumps(dict(
        architecture="vit_tiny_patch16_224", num_classes=classes, global_pool=pool,
        model_args=dict(num_heads=6, img_size=32),
    )))
    if fits:
        card = convert.open_weights(tmp_path).card
        assert card.model["pool"] == "mean" and not card.assumed
    else:
        with pytest.raises(ConversionError, match="with an fc_norm. Known are 'cls'"):
            convert.open_weights(tmp_path)


@pytest.mark.parametrize("changes, said", [
    (dict(layer_norm_eps=1e-3), "layer_norm_eps is 0.001, but here it is always at m"),
    (dict(hidden_act="gelu_new"), "hidden_act is 'gelu_new', but here it is always"),
    (dict(hidden_act="quick_gelu"), "Train on from them in transformers"),
])
def test_what_transformers_would_compute_otherwise_is_refused(tmp_path, changes, said):
    interop.vit_model(**changes).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=said):
        convert.open_weights(tmp_path)


def test_heads_that_a_config_leaves_out_are_those_that_transformers_takes(tmp_path):
    interop.vit_model(hidden_size=24, num_attention_heads=12).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert.open_weights(tmp_path).card.encoder.num_heads == 12


@pytest.mark.parametrize("whole", (False, True))
def test_a_ratio_that_masks_nothing_is_no_obstacle(tmp_path, whole):
    model = interop.hf_model(mask_ratio=0.0)
    (model if whole else model.vit).save_pretrained(tmp_path)
    weights = convert.open_weights(tmp_path)
    assert weights.card.kind == ("pretrain" if whole else "encoder")
    assert weights.card.masking is None
    assert any(line.startswith("mask_ratio 0.0") for line in weights.evidence)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A file of 2 x 8 patches of 8 px, which does not tell so."""
    path = tmp_path_factory.mktemp("files") / "wide.safetensors"
    _vit(path, img_size=(16, 64), patch_size=8, embed_dim=16, depth=1, num_heads=2)
    return path


def test_as_many_patches_are_not_resized(wide):
    facts = dict(num_heads=2, **HALF)
    told = safetensors.torch.load_file(wide)["pos_embed"][0].numpy()
    model = crossmae_jax.load(wide, image_size=(16, 64), **facts)
    np.testing.assert_array_equal(
        model.variables["constants"]["pos_embed"], told
    )
    assert model.card.encoder.grid == (2, 8) and "image_size" not in model.card.assumed
    square = crossmae_jax.load(wide, **facts)
    assert any("16 patches are a square of 4 x 4" in x for x in _assumed(square.card))
    plan = _plan(
        wide, "digits_mae", "model.encoder.size=W16-D1-H2/8", "data.image_size=(16, 64)"
    )
    assert "  adapted  nothing" in plan.report
    assert any("assumed  a grid of 2 x 8 patches" in line for line in plan.report)
    np.testing.assert_array_equal(plan.tensors["encoder/pos_embed"].read(), told)


def test_a_grid_that_is_told_is_resized_though_patches_are_as_many(wide, tmp_path):
    convert.import_weights(
        wide, tmp_path / "in", num_heads=2, image_size=(16, 64), check=False
    )
    size = ["model.encoder.size=W16-D1-H2/8", "data.image_size=(32, 32)"]
    plan = _plan(tmp_path / "in", "digits_mae", *size)
    assert "  adapted  position tables 2 x 8 -> 4 x 4 patches" in plan.report
    plan = _plan(wide, "digits_mae", size[0], "data.image_size=(16, 32)")
    assert "  adapted  position tables 4 x 4 -> 2 x 4 patches" in plan.report
    assert any("assumed  a grid of 4 x 4 patches" in line for line in plan.report)


def test_what_the_whole_model_assumes_of_its_decoder_its_encoder_does_not():
    card = convert.open_weights(GOLDEN / "ckpt_mae.pth", **HEADS).card
    assert set(card.assumed) == {"image_size", "mean", "std"}
    assert set(card.encoder_only().assumed) == {"image_size", "mean", "std"}
    assert convert.cards.from_json(card.to_json()) == card
