"""Weights of timm, transformers and MAE compute the same there and here."""

import argparse
import dataclasses
import fractions
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch

from crossmae_jax import masking
from crossmae_jax.convert import checks, exporting, names, opened, opening, structure
from crossmae_jax.convert.files import tensor
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.objectives.pretrain import Pretrain
from tests import interop
from tests.interop import timm, torch, transformers

GOLDEN = Path(__file__).parent / "golden"
# Float32, sums in another order: outputs of size 1 to 10.
ABSOLUTE = 3e-5
RELATIVE_LOSS = 2e-6


@pytest.fixture(scope="module", autouse=True)
def hasty_compiler():
    """Compiling takes longer than all else in models of this size."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _timm_file(path, case, half=False):
    state = interop.timm_model(case).state_dict()
    if half:
        state = {name: value.bfloat16() for name, value in state.items()}
    safetensors.torch.save_file(state, path)
    size = interop.TIMM[case]["img_size"]
    return opening.open_weights(path, format="timm", num_heads=2, image_size=size)


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    """Returns file and weights of a case; opened once, they are not to be changed."""
    folder = tmp_path_factory.mktemp("timm")

    @functools.cache
    def get(case):
        path = folder / f"{case}.safetensors"
        return path, _timm_file(path, case)

    return get


def _ratio(normalize):
    return 0.75 if normalize else 0.6


def _saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """Returns folder and weights of a ViTMAEForPreTraining; not to be changed."""

    @functools.cache
    def get(normalize=True):
        model = interop.hf_model(norm_pix_loss=normalize, mask_ratio=_ratio(normalize))
        folder = _saved(model, tmp_path_factory.mktemp("huggingface"))
        return folder, opening.open_weights(folder)

    return get


def _rename(folder, change):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state = {change(name): value for name, value in state.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return state


@functools.cache
def _mae(name, folder=GOLDEN):
    return opening.open_weights(folder / name, num_heads=2, decoder_heads=2)


def _replaced(weights, name, change):
    tensors = dict(weights.tensors)
    tensors[name] = tensor.of_array(np.ascontiguousarray(change(tensors[name].read())))
    return dataclasses.replace(weights, tensors=tensors)


@pytest.mark.parametrize("case", interop.TIMM)
def test_a_file_of_timm_computes_the_same_here(timm_file, case):
    path, weights = timm_file(case)
    [line] = checks.compare(weights, path, "timm")
    assert f"2 random images through timm {timm.__version__}: tokens differ" in line
    classifies = weights.card.kind == "classifier"
    assert ("features by" in line) == classifies
    assert ("logits by" in line) == (interop.TIMM[case]["num_classes"] > 0)


@pytest.mark.parametrize("format", ("timm", "huggingface"))
def test_a_half_precision_file_is_compared_in_float32(tmp_path, format):
    if format == "timm":
        path = tmp_path / "a.safetensors"
        weights = _timm_file(path, "token", half=True)
    else:
        path = _saved(interop.vit_model().bfloat16(), tmp_path)
        weights = opening.open_weights(path)
    assert {str(x.dtype) for x in weights.tensors.values()} == {"bfloat16"}
    [line] = checks.compare(weights, path, format)
    difference = float(line.partition("tokens differ by at most ")[2].split()[0])
    assert difference < ABSOLUTE


@pytest.mark.parametrize("case", ("token", "mean", "rectangular", "grey", "normless"))
def test_timm_loads_exported_folders(timm_file, tmp_path, case):
    _, weights = timm_file(case)
    exporting.write_timm(weights, tmp_path / "folder")
    [line] = checks.compare(weights, tmp_path / "folder", "timm")
    assert "through timm" in line


@pytest.mark.parametrize("name", ("ckpt_mae.pth", "ckpt_crossmae.pth"))
@pytest.mark.parametrize("legacy", (False, True))
def test_encoders_of_mae_files_compute_the_same_in_timm(tmp_path, name, legacy):
    weights, path = _mae(name), GOLDEN / name
    if legacy:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        path = tmp_path / name
        torch.save(content, path, _use_new_zipfile_serialization=False)
    check, decoder = checks.compare(weights, path, "mae")
    assert "through timm" in check and "tokens differ by at most" in check
    assert decoder.startswith("not checked: the outputs of the decoder")
    assert "agree exactly in names, shapes and values" in decoder


def test_a_class_row_that_the_reference_never_adds_is_left_out_on_both_sides(tmp_path):
    for name in ("ckpt_mae.pth", "ckpt_crossmae.pth"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(GOLDEN / name, weights_only=True)
        content["model"]["pos_embed"][:, 0] = torch.arange(16)
        torch.save(content, tmp_path / name)
        weights = _mae(name, tmp_path)
        row = weights.tensors["encoder/pos_embed"].read()[0]
        assert row.any() == (name == "ckpt_mae.pth")
        assert len(checks.compare(weights, tmp_path / name, "mae")) == 2


@pytest.mark.parametrize("normalize", (True, False))
def test_a_folder_of_transformers_computes_the_same_here(hf_folder, normalize):
    folder, weights = hf_folder(normalize)
    assert weights.card.normalize is normalize
    assert weights.card.masking["mask_ratio"] == _ratio(normalize)
    [line] = checks.compare(weights, folder, "huggingface")
    assert f"transformers {transformers.__version__}: predictions differ by" in line
    assert "loss by" in line


@pytest.mark.parametrize("file", ("model.safetensors", "pytorch_model.bin"))
def test_the_spelling_of_published_folders_is_the_same_model(tmp_path, file):
    folder = _saved(interop.hf_model(), tmp_path)
    here, there = "decoder.decoder_encoder.layer.", "decoder.decoder_layers."
    state = _rename(folder, lambda name: name.replace(here, there))
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in state
    if file == "pytorch_model.bin":
        torch.save(state, folder / file)
        (folder / "model.safetensors").unlink()
    [line] = checks.compare(opening.open_weights(folder), folder, "huggingface")
    assert "predictions differ by" in line


@pytest.mark.parametrize("kind", ("ViTModel", "ViTMAEModel"))
def test_encoders_of_transformers_compute_the_same_here(tmp_path, kind):
    vit, vit_mae = interop.vit_model(image_size=[16, 40]), interop.hf_model().vit
    folder = _saved(vit if kind == "ViTModel" else vit_mae, tmp_path)
    assert f'"{kind}"' in (folder / "config.json").read_text()
    [line] = checks.compare(opening.open_weights(folder), folder, "huggingface")
    assert "tokens differ by" in line


def test_the_pooler_of_a_vit_is_left_out(tmp_path):
    weights = opening.open_weights(_saved(interop.vit_model(), tmp_path / "without"))
    folder = _saved(interop.vit_model(pooled=True), tmp_path / "with")
    assert "pooler.dense.bias" in _rename(folder, lambda name: name)
    [line] = checks.compare(weights, folder, "huggingface")
    assert "tokens differ by" in line


def test_an_encoder_without_a_norm_is_found_before_the_norm_of_a_vit(tmp_path):
    weights = opened.encoder_of(_mae("ckpt_crossmae.pth"))
    exporting.write_huggingface(weights, tmp_path / "folder", fresh_norm=True)
    [line] = checks.compare(weights, tmp_path / "folder", "huggingface")
    assert "tokens differ by" in line


def test_an_unknown_class_of_transformers_is_not_checked(hf_folder, tmp_path):
    _, weights = hf_folder()
    config = json.dumps({"architectures": ["ViTForMaskedImageModeling"]})
    (tmp_path / "config.json").write_text(config)
    [line] = checks.compare(weights, tmp_path, "huggingface")
    assert line.startswith(
        "not checked: ViTForMaskedImageModeling;"
    )


def test_our_own_file_is_compared_tensor_by_tensor(tmp_path):
    weights = _mae("ckpt_mae.pth")
    exporting.write_safetensors(weights, tmp_path / ".unfinished.safetensors")
    path = tmp_path / ".unfinished.safetensors"
    [line] = checks.compare(weights, path, "safetensors")
    assert line.endswith("tensors read back, all exactly as they were")
    for name in ("encoder/norm/bias", "decoder/mask_token"):
        changed = _replaced(weights, name, lambda x: np.nextafter(x, np.float32(9)))
        with pytest.raises(ConversionError, match=rf"differing \(1\):\n    {name}"):
            checks.compare(changed, path, "safetensors")
    fewer = {n: x for n, x in weights.tensors.items() if n != "encoder/norm/bias"}
    fewer = dataclasses.replace(weights, tensors=fewer)
    with pytest.raises(ConversionError, match="only in the file"):
        checks.compare(fewer, path, "safetensors")


def _swap_queries_and_keys(kernel):
    queries, keys, values = np.split(kernel, 3, axis=-1)
    return np.concatenate([keys, queries, values], axis=-1)


@pytest.mark.parametrize("name, change", (
    ("encoder/blocks_1/attn/qkv/kernel", _swap_queries_and_keys),
    ("encoder/blocks_0/attn/proj/kernel", np.transpose),
    ("encoder/pos_embed", np.flipud),
    ("encoder/patch_embed/proj/kernel", lambda x: x[::-1]),
    ("encoder/norm/bias", lambda x: x * np.nan),
    ("head/kernel", lambda x: x[:, ::-1]),
))
def test_a_wrong_tensor_is_noticed_in_timm(timm_file, name, change):
    path, weights = timm_file("token")
    weights = _replaced(weights, name, change)
    with pytest.raises(ConversionError, match="The two sides disagree") as error:
        checks.compare(weights, path, "timm")
    assert ("logits" if name == "head/kernel" else "tokens") in str(error.value)
    assert "where the largest value of timm" in str(error.value)


@pytest.mark.parametrize("name, change", (
    ("encoder/blocks_1/attn/qkv/bias", _swap_queries_and_keys),
    ("decoder/decoder_blocks_1/attn/qkv/kernel", _swap_queries_and_keys),
    ("decoder/decoder_blocks_0/attn/proj/kernel", np.transpose),
    ("decoder/decoder_pos_embed", np.flipud),
    ("decoder/decoder_pred/bias", lambda x: x[::-1]),
))
def test_a_wrong_tensor_is_noticed_in_transformers(hf_folder, name, change):
    folder, weights = hf_folder()
    weights = _replaced(weights, name, change)
    with pytest.raises(ConversionError, match="disagree in predictions: by"):
        checks.compare(weights, folder, "huggingface")


def test_a_wrong_target_is_noticed_in_transformers(hf_folder):
    folder, weights = hf_folder()
    card = dataclasses.replace(weights.card, normalize=False)
    with pytest.raises(ConversionError, match="disagree in loss: by"):
        checks.compare(dataclasses.replace(weights, card=card), folder, "huggingface")
    card = dataclasses.replace(weights.card, normalize=None)
    unknown = dataclasses.replace(weights, card=card)
    [line] = checks.compare(unknown, folder, "huggingface")
    assert "loss" not in line


def test_a_wrong_tensor_of_a_decoder_without_counterpart_is_noticed():
    name = "decoder/decoder_blocks_0/cross_attn/q/kernel"
    weights = _replaced(_mae("ckpt_crossmae.pth"), name, np.transpose)
    with pytest.raises(ConversionError) as error:
        checks.compare(weights, GOLDEN / "ckpt_crossmae.pth", "mae")
    assert str(error.value).startswith("The two sides disagree in the values of tens")
    assert f"differing (1):\n    {name}" in str(error.value)


def test_what_the_other_side_refuses_is_listed(timm_file, tmp_path):
    path, weights = timm_file("token")
    state = safetensors.torch.load_file(path)
    path = tmp_path / path.name
    state["surplus"] = state.pop("norm.bias")
    safetensors.torch.save_file(state, path)
    with pytest.raises(ConversionError, match="(?s)refuses.*norm.bias.*surplus"):
        checks.compare(weights, path, "timm")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConversionError, match="timm .* refuses"):
        checks.compare(weights, path, "timm")
    torch.save({"model": state, "step": fractions.Fraction(1)}, tmp_path / "a.pth")
    (line,) = checks.compare(weights, tmp_path / "a.pth", "timm")
    assert line.startswith("not checked: beside its tensors the file holds objects")
    folder = _saved(interop.hf_model(), tmp_path / "folder")
    weights = opening.open_weights(folder)
    _rename(folder, lambda n: "surplus" if n == "decoder.decoder_norm.bias" else n)
    with pytest.raises(ConversionError) as error:
        checks.compare(weights, folder, "huggingface")
    assert "missing (1):\n    decoder.decoder_norm.bias" in str(error.value)
    assert "unexpected (1):\n    surplus" in str(error.value)


@pytest.mark.parametrize("missing", ("timm", "torch"))
def test_a_missing_package_is_said_and_is_no_error(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    [line] = checks.compare(_mae("ckpt_mae.pth"), GOLDEN / "ckpt_mae.pth", "mae")
    assert line.startswith(
        f"not checked: {missing} is not installed; pip install 'crossmae-jax[interop]'"
    )


@pytest.mark.parametrize("tail", ("", ".models.vit_mae.modeling_vit_mae"))
def test_transformers_missing_is_said_and_is_no_error(monkeypatch, hf_folder, tail):
    folder, weights = hf_folder()
    monkeypatch.setitem(sys.modules, f"transformers{tail}", None)
    [line] = checks.compare(weights, folder, "huggingface")
    assert line.startswith(f"not checked: transformers{tail} is not installed")


def test_a_package_that_does_not_import_is_said_with_its_reason(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('no operator')\n")
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.syspath_prepend(tmp_path)
    [line] = checks.compare(_mae("ckpt_mae.pth"), GOLDEN / "ckpt_mae.pth", "mae")
    assert line == "not checked: timm does not import (RuntimeError: no operator)"


def _read(weights):
    like = structure.abstract_variables(weights.card)
    return names.variables_of(weights.tensors, like)


def _images(channels=3):
    images = np.random.default_rng(5).standard_normal((3, 32, 32, channels))
    return 1 + 2 * jnp.asarray(images, jnp.float32)


def _channels_first(images):
    return torch.tensor(np.array(images)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("normalize", (True, False))
def test_predictions_and_loss_are_those_of_transformers(hf_folder, normalize):
    """Without the checker, which could be wrong on both sides alike."""
    model = interop.hf_model(norm_pix_loss=normalize, mask_ratio=_ratio(normalize))
    _, weights = hf_folder(normalize)
    images = _images()
    noise = np.random.default_rng(6).random((3, 16)).astype(np.float32)
    with torch.inference_mode():
        theirs = model(_channels_first(images), noise=torch.from_numpy(noise))
    objective = Pretrain(structure.config_of(weights.card))
    ids = masking.token_ids(jnp.asarray(noise), objective.counts)
    variables = _read(weights)
    loss, _ = jax.jit(objective.masked_loss)(variables, images, ids)
    np.testing.assert_allclose(loss, theirs.loss.numpy(), rtol=RELATIVE_LOSS)
    logits = jax.jit(objective.model.apply)(variables, images, ids)["pixels"].values
    for i, patches in enumerate(np.array(ids.pred)):
        np.testing.assert_allclose(
            logits[i], theirs.logits[i, patches].numpy(), rtol=0, atol=ABSOLUTE
        )


@pytest.mark.parametrize("case", ("token", "mean", "grey"))
def test_logits_are_those_of_timm(timm_file, case):
    _, weights = timm_file(case)
    images = _images(weights.card.channels)
    with torch.inference_mode():
        logits = interop.timm_model(case)(_channels_first(images)).numpy()
    model = structure.build(weights.card)
    found = jax.jit(model.apply)(_read(weights), images).logits
    np.testing.assert_allclose(found, logits, rtol=0, atol=ABSOLUTE)
    assert np.ptp(logits) > 0.5
