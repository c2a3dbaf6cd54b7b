"""Weights inside of what training scripts wrap them in, and beside other things."""

import argparse
import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.torch

import crossmae_jax
from configs import finetune_digits, vitb_cross
from crossmae_jax import convert
from crossmae_jax.convert import starting, structure
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.objectives.classify import Classify
from tests import interop
from tests.interop import torch
from tests.test_convert import GOLDEN, HEADS, _main, _same

HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TOLERANCE = 3e-5
CHECKED = "check: 2 random images through t"  # imm or ransformers


@pytest.fixture(scope="module")
def model():
    return interop.timm_model("token")


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


@pytest.fixture(scope="module")
def expected(state, tmp_path_factory):
    return _read(_saved(tmp_path_factory.mktemp("bare"), state))


def _saved(folder, content):
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def _read(path, **facts):
    weights = convert.open_weights(path, num_heads=2, **facts)
    return {name: value.read() for name, value in weights.tensors.items()}


def _under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def _lines(path, to, **facts):
    return convert.import_weights(path, to, num_heads=2, **facts).lines


@pytest.mark.parametrize("prefix", [
    "module.", "module._orig_mod.", "model.encoder.", "teacher.backbone.",
])
@pytest.mark.parametrize("key", ("", "model", "state_dict", "model_ema"))
def test_what_all_names_begin_with_is_taken_off(tmp_path, state, expected, prefix, key):
    content = _under(prefix, state)
    path = _saved(tmp_path, {key: content, "epoch": 3} if key else content)
    lines = _lines(path, tmp_path / "in")
    assert f"taken off: {prefix}, with which all names began" in lines
    assert any(line.startswith(CHECKED) for line in lines)
    _same(_read(path), expected)


def test_a_whole_model_in_a_wrapping_keeps_its_decoder(tmp_path):
    content = torch.load(GOLDEN / "ckpt_crossmae.pth", weights_only=False)
    content["model"] = _under("module.", content["model"])
    path = _saved(tmp_path, content)
    wrapped = convert.open_weights(path, **HEADS)
    bare = convert.open_weights(GOLDEN / "ckpt_crossmae.pth", **HEADS)
    assert dataclasses.replace(wrapped.card, origin=bare.card.origin) == bare.card
    for name, value in bare.tensors.items():
        np.testing.assert_array_equal(wrapped.tensors[name].read(), value.read())


def test_safetensors_and_folders_of_transformers_are_unwrapped_too(
    tmp_path, state, expected
):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(_under("backbone.", state), path)
    _same(_read(path), expected)
    vit = interop.hf_model()
    vit.save_pretrained(tmp_path / "hf")
    bare = _read(tmp_path / "hf")
    held = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    safetensors.torch.save_file(
        _under("model.", held), tmp_path / "hf" / "model.safetensors"
    )
    _same(_read(tmp_path / "hf"), bare)
    done = convert.import_weights(tmp_path / "hf", tmp_path / "in")
    assert "not checked: transformers does not look under model" in done.lines


def _several(state):
    """Two networks that differ, as self-distillation and averages of weights have."""
    other = {name: value + 1 for name, value in state.items()}
    head = {"head.mlp.0.weight": torch.zeros(3, 3)}
    return {
        "dino": (
            {"student": _under("module.backbone.", other),
             "teacher": _under("backbone.", state) | head},
            "teacher.backbone", "student.module.backbone",
        ),
        "ema": (
            {"state_dict": other, "state_dict_ema": state, "arch": "vit"},
            "state_dict_ema", "state_dict",
        ),
        "flat": (
            _under("teacher.", state) | _under("student.", other), "teacher", "student",
        ),
        "momentum": (
            _under("momentum.", other) | state, ".", "momentum",
        ),
    }


@pytest.mark.parametrize("kind", ("dino", "ema", "flat", "momentum"))
def test_of_several_networks_both_are_named_and_one_is_chosen(
    tmp_path, state, expected, kind
):
    content, wanted, other = _several(state)[kind]
    path = _saved(tmp_path, content)
    with pytest.raises(ConversionError, match="holds the weights of 2 ViTs") as error:
        convert.open_weights(path, num_heads=2)
    assert f"    {wanted} (32 tensors)" in str(error.value)
    assert f"    {other} (32 tensors)" in str(error.value)
    lines = _lines(path, tmp_path / "in", under=wanted)
    assert any(f"32 tensors under {wanted}, as asked" in line for line in lines)
    assert any(line.startswith(CHECKED) for line in lines)
    _same(_read(path, under=wanted), expected)
    assert _read(path, under=other)["encoder/norm/bias"][0] != (
        expected["encoder/norm/bias"][0]
    )
    with pytest.raises(ConversionError, match="no patch projection under='nothing'"):
        convert.open_weights(path, num_heads=2, under="nothing")


def test_the_cure_of_an_error_works_in_a_command(tmp_path, state, capsys):
    path = _saved(tmp_path, {"state_dict": state, "state_dict_ema": state})
    import_it = ("import", path, f"--to={tmp_path / 'in'}", "--num_heads=2")
    assert _main(*import_it) == 1
    assert "--under=state_dict" in capsys.readouterr().err
    assert _main(*import_it, "--under=state_dict_ema") == 0
    capsys.readouterr()
    assert _main("inspect", path, "--under=state_dict", "--num_heads=2") == 0
    assert "32 tensors under state_dict, as asked" in capsys.readouterr().out


def test_an_encoder_beside_other_parts_is_taken_when_asked(tmp_path, state, expected):
    content = _under("model.encoder.", state) | {
        "model.projector.0.weight": torch.zeros(3, 3),
        "model.projector.0.bias": torch.zeros(3),
    }
    path = _saved(tmp_path, {"state_dict": content})
    said = "To take the ViT alone: under='state_dict.model.encoder'"
    with pytest.raises(ConversionError, match=said) as error:
        convert.open_weights(path, num_heads=2)
    assert "model.projector (2 tensors)" in str(error.value)
    _same(_read(path, under="state_dict.model.encoder"), expected)


def _config(**changes):
    config = finetune_digits.get_config()
    config.update_from_flattened_dict({
        "model.encoder.size": "W32-D2-H2/8", "data.image_size": (32, 32),
        "data.channels": 3, "data.mean": (0.4,) * 3, "data.std": (0.5,) * 3,
        "data.num_classes": 5, "model.pool": "cls",
    } | changes)
    return config


def _plan(path, config, **kwargs):
    like = jax.eval_shape(Classify(config).init, jax.random.key(0))
    return starting.plan(str(path), like, config, **kwargs)


@pytest.mark.parametrize("kind", ("several", "beside", "pool"))
def test_starting_from_what_must_be_told_names_the_import_that_is_told(
    tmp_path, state, capsys, kind
):
    """And the import that is named can be started from."""
    content = {
        "several": {"state_dict_ema": state, "state_dict": state},
        "beside": _under("vit.", state) | {"projector.0.weight": torch.zeros(3, 3)},
        "pool": {"model": state, "args": argparse.Namespace(global_pool=True)},
    }[kind]
    path, config = _saved(tmp_path, content), _config()
    with pytest.raises(ConversionError, match="and start from NEW, which it") as error:
        _plan(path, config)
    flag = {"several": "--under=state_dict_ema", "beside": "--under=vit"}
    assert flag.get(kind, "--parts=encoder") in str(error.value)
    command = str(error.value).splitlines()[-1].partition("python -m crossmae_jax ")[2]
    name, *arguments = command.replace("NEW", str(tmp_path / "new")).split()
    assert name == "convert" and not _main(*arguments, "--no_check")
    start = _plan(tmp_path / "new", config)
    assert any(line.startswith("  loaded   encoder") for line in start.report)


def test_heads_are_told_to_an_import_where_a_file_does_not_tell_them():
    config = vitb_cross.get_config()
    assert structure.flags_of_heads(config) == ""
    config.model.encoder.size = "W96-D2-H4/16"
    config.model.decoder.update(dim=48, num_heads=3)
    assert structure.flags_of_heads(config) == "--num_heads=4 --decoder_heads=3"


def test_what_was_changed_is_said_wherever_weights_are_opened(tmp_path, state, caplog):
    scaled = {name: value for name, value in state.items()} | {
        f"blocks.0.ls{number}.gamma": torch.full((32,), 2.0) for number in (1, 2)
    }
    path = _saved(tmp_path, _under("module.", scaled))
    said = (
        "taken off: module., with which all names began",
        "folded: the layer scale at 2 places, into the layers before it",
    )
    with caplog.at_level("WARNING", logger="absl"):
        crossmae_jax.load(path, num_heads=2, **HALF)
    report = _plan(path, _config()).report
    lines = _lines(path, tmp_path / "in", check=False)
    for line in said:
        assert line in caplog.text and f"  note     {line}" in report and line in lines


def _with_names(folder, model, number):
    """Saves a classifier of 5 classes as a folder of timm that names so many."""
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        architecture="vit_tiny_patch16_224", num_classes=5, global_pool="token",
        model_args=dict(num_heads=2, img_size=32, patch_size=8),
        label_names=list("abcdefg"[:number]),
    )))
    return folder


@pytest.mark.parametrize("number", (4, 6))
def test_names_of_other_than_all_classes_are_left_out(
    tmp_path, model, number, caplog
):
    assert convert.open_weights(
        _with_names(tmp_path / "right", model, 5)
    ).card.classes == tuple("abcde")
    folder = _with_names(tmp_path / "wrong", model, number)
    said = f"there are {number} names of classes, but the head has 5"
    with caplog.at_level("WARNING", logger="absl"):
        loaded = crossmae_jax.load(folder, **HALF)
    assert f"left out: names of the classes; {said}" in caplog.text
    assert loaded.classes is None and loaded.card.model["num_classes"] == 5
    told = convert.open_weights(folder, classes=tuple("vwxyz"))
    assert told.card.classes == tuple("vwxyz")
    with pytest.raises(ConversionError, match="classes: there are 2 names of classes,"):
        convert.open_weights(folder, classes=("v", "w"))
    # The card of a file of ours may have been changed by hand.
    card = dataclasses.replace(told.card, classes=tuple("abcdefg"[:number]))
    path = tmp_path / "ours.safetensors"
    convert.exporting.write_safetensors(dataclasses.replace(told, card=card), path)
    ours = convert.open_weights(path)
    assert ours.card.classes is None and any(said in line for line in ours.changed)


def test_the_encoder_of_crossmae_is_taken_whatever_its_class_row_holds(tmp_path):
    content = torch.load(GOLDEN / "ckpt_crossmae.pth", weights_only=False)
    content["model"]["pos_embed"][:, 0] = 0.5
    path = _saved(tmp_path, content)
    done = convert.import_weights(path, tmp_path / "in", parts="encoder", **HEADS)
    assert any(line.startswith(CHECKED) for line in done.lines)
    said = "positions: zeros for the class token, whatever its row holds; CrossMAE's"
    assert any(line.startswith(said) for line in done.lines)
    table = convert.open_weights(tmp_path / "in").tensors["encoder/pos_embed"].read()
    assert not table[0].any() and table[1:].any()


def test_a_place_is_not_asked_of_our_own_files(tmp_path, state):
    path = _saved(tmp_path, state)
    done = convert.import_weights(path, tmp_path / "in", num_heads=2, check=False)
    with pytest.raises(ConversionError, match="tells all of itself; leave out under"):
        convert.open_weights(done.path, under="model")


def test_scalars_beside_and_among_the_tensors_are_no_obstacle(
    tmp_path, state, expected
):
    path = _saved(tmp_path, {
        "model": {**state, "accuracy": np.float64(0.5)}, "best": np.float32(2),
        "step": np.int64(7),
        "optimizer": torch.optim.AdamW([torch.zeros(2)]).state_dict(),
    })
    _same(_read(path), expected)
    evidence = convert.open_weights(path, num_heads=2).evidence
    said = "beside the tensors, not used as weights: accuracy, best, optimizer, step"
    assert said in evidence


def test_objects_that_are_not_read_name_the_cure_and_it_works(
    tmp_path, model, state, expected
):
    optimizer = torch.optim.AdamW(model.parameters())
    path = _saved(tmp_path, {"model": state, "optimizer": optimizer})
    cure = r"torch.load\(PATH, weights_only=False\), then torch.save\(\{'model'"
    with pytest.raises(ConversionError, match=f"it names torch.optim.*{cure}"):
        convert.open_weights(path, num_heads=2)
    content = torch.load(path, weights_only=False)
    torch.save({"model": content["model"]}, path)
    _same(_read(path), expected)
    with pytest.raises(ConversionError, match=r"content.state_dict\(\) where"):
        convert.open_weights(_saved(tmp_path, model), num_heads=2)


@pytest.mark.parametrize("name", ("reg_token", "dist_token"))
def test_tokens_that_we_have_not_are_named_and_what_to_do(tmp_path, state, name):
    path = _saved(tmp_path, {**state, name: torch.zeros(1, 4, 32)})
    for parts in ("all", "encoder"):
        with pytest.raises(ConversionError, match=f"{name}.*nor can its encoder by i"):
            convert.open_weights(path, num_heads=2, parts=parts)
