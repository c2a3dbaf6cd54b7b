"""Classifiers of others: their heads, names of classes, or the encoder alone."""

import numpy as np
import pytest

import crossmae_jax
from crossmae_jax import convert
from crossmae_jax.convert.names import ConversionError
from tests import interop
from tests.interop import timm, torch, transformers
from tests.test_convert import GOLDEN, _main
from tests.test_wrapped_weights import (
    CHECKED,
    HALF,
    TOLERANCE,
    _config,
    _plan,
    _saved,
    model,
    state,
)

__all__ = ["model", "state"]  # fixtures


@pytest.mark.parametrize("pool, changes", [
    ("avgmax", dict(fc_norm=True)), ("map", {}), ("avg", dict(fc_norm=False)),
])
def test_the_encoder_of_another_classifier_is_taken_alone(tmp_path, pool, changes):
    theirs = interop._randomise(timm.models.vision_transformer.VisionTransformer(
        **interop.SMALL, img_size=32, num_classes=5, global_pool=pool, **changes
    ))
    path = _saved(tmp_path, theirs.state_dict())
    facts = dict(num_heads=2) if pool == "map" else dict(num_heads=2, pool="mean")
    if pool != "avgmax":  # which an fc_norm does not give away
        with pytest.raises(ConversionError, match="parts='encoder'"):
            convert.open_weights(path, **facts)
    weights = crossmae_jax.load(path, num_heads=2, parts="encoder", **HALF)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    inputs = torch.tensor((images / 127.5 - 1).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        tokens = theirs.forward_features(inputs).numpy()
    scale = np.abs(tokens).max()
    np.testing.assert_allclose(weights.tokens(images), tokens, atol=TOLERANCE * scale)
    status = _main(
        "import", path, f"--to={tmp_path / 'in'}", "--num_heads=2", "--parts=encoder"
    )
    assert status == 0


def test_a_classifier_of_transformers_is_one_here(tmp_path):
    names = {0: "cat", 1: "dog", 2: "owl"}
    config = interop.vit_model().config
    config.id2label, config.label2id = names, {v: k for k, v in names.items()}
    theirs = interop._randomise(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path / "hf")
    done = convert.import_weights(tmp_path / "hf", tmp_path / "in")
    assert done.card.classes == ("cat", "dog", "owl")
    assert any(
        line.startswith(CHECKED) and "logits" in line for line in done.lines
    )
    back = convert.export_weights(
        tmp_path / "in", tmp_path / "out", format="huggingface"
    )
    assert any(line.startswith(CHECKED) and "logits" in line for line in back.lines)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    with pytest.raises(ConversionError, match="this model has pool='mean'"):
        convert.export_weights(
            GOLDEN / "ckpt_finetuned.pth", tmp_path / "mean", format="huggingface",
            num_heads=2,
        )
    assert again.config.id2label == names and again.config.label2id["owl"] == 2
    weights = convert.open_weights(tmp_path / "hf", parts="encoder")
    assert weights.card.kind == "encoder" and "encoder/norm/scale" in weights.tensors
    done = convert.import_weights(tmp_path / "hf", tmp_path / "alone", parts="encoder")
    assert any("does not return its encoder's output" in line for line in done.lines)


def test_classes_of_one_name_keep_it_with_their_numbers(tmp_path):
    config = interop.vit_model().config
    config.id2label = {0: "crane", 1: "dog", 2: "crane"}
    interop._randomise(transformers.ViTForImageClassification(config)).save_pretrained(
        tmp_path
    )
    weights = convert.open_weights(tmp_path)
    assert weights.card.classes == ("crane (0)", "dog", "crane (2)")
    assert any("several classes are called crane" in x for x in weights.evidence)


def test_the_encoder_of_a_mae_of_transformers_is_taken_alone(tmp_path):
    interop.hf_model().save_pretrained(tmp_path / "hf")
    done = convert.import_weights(tmp_path / "hf", tmp_path / "in", parts="encoder")
    assert done.card.kind == "encoder"
    assert any("does not return its encoder's output" in line for line in done.lines)


def test_names_of_classes_can_be_given_and_unknown_ones_are_noted(tmp_path, state):
    path = _saved(tmp_path, state)
    assert not _main(
        "import", path, f"--to={tmp_path / 'in'}", "--num_heads=2",
        "--mean=0.1,0.1,0.1", "--std=0.5,0.5,0.5",
        "--classes=" + ",".join("abcdefghij"[:state["head.weight"].shape[0]]),
    )
    named = convert.open_weights(tmp_path / "in").card.classes
    assert named[:2] == ("a", "b")
    config = _config(**{"data.num_classes": len(named)})
    others = tuple("zyxwvutsrq"[:len(named)])
    for source, notes in (
        (path, ["names of the head's classes are not known"]),
        (tmp_path / "in", [
            "the head is for other classes, a, b", "images with mean=(0.1, 0.1, 0.1); c"
        ]),
    ):
        report = _plan(source, config, classes=others).report
        assert all(any(note in line for line in report) for note in notes), report


def test_other_heads_of_transformers_can_be_left_out(tmp_path):
    theirs = transformers.ViTForMaskedImageModeling(interop.vit_model().config)
    interop._randomise(theirs).save_pretrained(tmp_path / "hf")
    with pytest.raises(ConversionError, match="parts='encoder'"):
        convert.open_weights(tmp_path / "hf")
    weights = convert.open_weights(tmp_path / "hf", parts="encoder")
    left_out = "left out, as asked: decoder, vit.embeddings.mask_token"
    assert left_out in weights.evidence
    np.testing.assert_array_equal(
        weights.tensors["encoder/norm/scale"].read(),
        theirs.vit.layernorm.weight.detach().numpy(),
    )
