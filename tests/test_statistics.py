"""Means and deviations that would blind a model are refused, whoever tells them."""

import json

import numpy as np
import pytest

import crossmae_jax
from crossmae_jax import convert
from crossmae_jax.convert.files import safetensors_file, tensor
from crossmae_jax.convert.names import ConversionError
from tests import interop
from tests.test_convert import GOLDEN, HEADS, _main

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BYTES = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
# 123.675 / 255 = 0.485, and so on.
CONVERTED = r"divided by 255: give mean=\(0.485, 0.456, 0.406\), std=\(0.229, 0.224, "
TIMM = GOLDEN / "timm_vit_tiny_like.safetensors"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("given, said", [
    (BYTES, CONVERTED),
    (dict(mean=BYTES["mean"], std=STD), r"255: give mean=\(0.485, 0.456, 0.406\)\."),
    (dict(mean=BYTES["mean"], std=(1.0, 1.0, 1.0)), r"std=\(0.003922, 0.003922, 0.0"),
    (dict(mean=MEAN, std=BYTES["std"]), r"255: give std=\(0.229, 0.224, 0.225\)"),
    (dict(mean=MEAN, std=(0.2, 0.0, 0.2)), "expected values above 0 in std"),
    (dict(mean=MEAN, std=(0.2, -0.2, 0.2)), "expected values above 0 in std"),
    (dict(mean=(0.5, float("nan"), 0.5), std=STD), "mean has a value that is no num"),
    (dict(mean=(-0.5, 0.5, 0.5), std=STD), "expected values in 0..1 in mean"),
])
def test_load_refuses_what_cannot_be_and_says_what_it_is(given, said):
    with pytest.raises(ConversionError, match=said):
        crossmae_jax.load(TIMM, num_heads=3, **given)


def test_the_command_refuses_them(tmp_path, capsys):
    status = _main(
        "import", TIMM, f"--to={tmp_path / 'in'}", "--num_heads=3",
        "--mean=123.675,116.28,103.53", "--std=58.395,57.12,57.375",
    )
    assert status == 1 and not (tmp_path / "in").exists()
    assert "give mean=(0.485, 0.456, 0.406)" in capsys.readouterr().err


def _huggingface(folder, **processor):
    interop.hf_model().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _timm(folder, **statistics):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(TIMM.read_bytes())
    (folder / "config.json").write_text(json.dumps(dict(
        architecture="vit_tiny_patch16_224", model_args=dict(num_heads=3),
        pretrained_cfg=statistics,
    )))


def _ours(folder, **statistics):
    convert.import_weights(GOLDEN / "ckpt_mae.pth", folder, check=False, **HEADS)
    path = folder / "model.safetensors"
    tensors, metadata = safetensors_file.read(path)
    held = {name: tensor.of_array(value.read()) for name, value in tensors.items()}
    card = json.dumps(json.loads(metadata["crossmae_jax"]) | statistics)
    safetensors_file.write(path, held, {"crossmae_jax": card})


@pytest.mark.parametrize("form", ("huggingface", "timm", "ours"))
def test_what_a_file_tells_is_looked_at_and_can_be_set_right(tmp_path, form):
    folder, told = tmp_path / "folder", {k: list(v) for k, v in BYTES.items()}
    if form == "huggingface":
        _huggingface(folder, image_mean=told["mean"], image_std=told["std"])
    else:
        {"timm": _timm, "ours": _ours}[form](folder, **told)
    with pytest.raises(ConversionError, match=CONVERTED):
        convert.open_weights(folder)
    with pytest.raises(ConversionError, match=CONVERTED):
        crossmae_jax.load(folder)
    model = crossmae_jax.load(folder, mean=MEAN, std=STD)
    assert (model.card.mean, model.card.std) == (MEAN, STD)
    if form != "ours":  # which takes no facts
        done = convert.import_weights(
            folder, tmp_path / "in", mean=MEAN, std=STD, check=False
        )
        assert (done.card.mean, done.card.std) == (MEAN, STD)


def test_other_ways_of_transformers_to_normalise(tmp_path):
    _huggingface(tmp_path / "one", image_mean=0.5, image_std=0.25)
    assert crossmae_jax.load(tmp_path / "one").card.std == (0.25, 0.25, 0.25)
    _huggingface(
        tmp_path / "not", image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=False
    )
    card = crossmae_jax.load(tmp_path / "not").card
    assert (card.mean, card.std) == ((0.0,) * 3, (1.0,) * 3)
    _huggingface(
        tmp_path / "signed", image_mean=[0.5] * 3, image_std=[0.5] * 3,
        rescale_factor=1 / 127.5,
    )
    weights = convert.open_weights(tmp_path / "signed")
    assert weights.card.mean is None
    assert any("rescale_factor 0.0078" in line for line in weights.evidence)
