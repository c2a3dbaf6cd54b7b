"""SimMIM's own .pth files: read, checked against timm's Beit, written, tuned from."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import finetune_vitb_simmim, vitb_simmim_prmim
from crossmae_jax import convert
from crossmae_jax.convert import exporting, names, opening, spellings, starting
from crossmae_jax.convert.files import tensor
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.models import relative_bias
from crossmae_jax.objectives.classify import Classify
from crossmae_jax.objectives.pretrain import Pretrain
from tests.interop import torch
from tests.test_parity import GOLDEN

SHARED, PER_BLOCK = "simmim_vit_shared_rpb.npz", "simmim_vit_ape_rpb.npz"


def _state(name):
    """Returns the tensors of a fixture under the names of SimMIM's scripts."""
    data = np.load(GOLDEN / name)
    return {
        key.removeprefix("sd/"): torch.from_numpy(data[key])
        for key in data.files if key.startswith("sd/")
    }


def _file(tmp_path, name=SHARED, **changes):
    """Writes what SimMIM's scripts save."""
    path = tmp_path / "simmim.pth"
    torch.save({"model": _state(name) | changes, "epoch": 799}, path)
    return path


@pytest.mark.parametrize("name, told", [
    (SHARED, ["encoder.positions none, encoder.relative_bias shared",
              "encoder.qkv_bias qv", "encoder.layer_scale 0.1", "4 x 4 patches"]),
    (PER_BLOCK, ["encoder.positions learned, encoder.relative_bias per_block",
                 "encoder.qkv_bias none", "encoder.layer_scale None", "5 x 5 patches"]),
])
def test_a_file_of_simmim_is_recognised_checked_and_written_as_it_was(
    tmp_path, name, told
):
    path = _file(tmp_path, name)
    made = convert.import_weights(path, tmp_path / "ours", num_heads=2)
    said = "\n".join(made.lines)
    assert "format simmim: names like blocks.0.attn.q_bias" in said
    assert "check: 2 random images through timm" in said and "tokens" in said
    assert all(line in said for line in told), said
    assert "assumed: mean 0.485 0.456 0.406, ImageNet's, as SimMIM's code has" in said
    assert made.card.normalize is False and made.card.parts == ["encoder", "decoder"]

    back = tmp_path / "back.pth"
    convert.export_weights(tmp_path / "ours", back, format="simmim")
    theirs = torch.load(back, weights_only=True)["model"]
    expected = {
        name: value for name, value in _state(name).items()
        if not name.endswith("relative_position_index")
    }
    assert theirs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(theirs[name].numpy(), value.numpy(), name)


def test_the_check_notices_a_wrong_bias(tmp_path, monkeypatch):
    rows = relative_bias.rows
    monkeypatch.setattr(relative_bias, "rows", lambda grid: rows(grid).T)
    with pytest.raises(ConversionError, match="The two sides disagree in tokens"):
        convert.import_weights(_file(tmp_path), tmp_path / "ours", num_heads=2)


def test_the_encoder_alone_is_taken_with_its_bias(tmp_path):
    weights = opening.open_weights(
        _file(tmp_path, **{"decoder.1.weight": torch.zeros(3)}), num_heads=2,
        parts="encoder",
    )
    assert weights.card.kind == "encoder"
    assert "encoder/relative_bias/table" in weights.tensors
    made = convert.export_weights(
        _file(tmp_path), tmp_path / "alone.pth", format="simmim", parts="encoder",
        num_heads=2,
    )
    assert any("check: 2 random images" in line for line in made.lines)


def test_another_size_of_images_is_told_or_asked_for(tmp_path):
    grid, table = (2, 4), "encoder.rel_pos_bias.relative_position_bias_table"
    path = _file(tmp_path, **{table: torch.zeros(relative_bias.num_rows(grid), 2)})
    with pytest.raises(ConversionError, match="24 biases of offsets are of no square"):
        opening.open_weights(path, num_heads=2)
    weights = opening.open_weights(path, num_heads=2, image_size=(16, 32))
    assert weights.card.encoder.grid == grid


@pytest.mark.parametrize("format, said", [
    ("timm", "has no place for an encoder with qkv_bias='qv', relative_bias='shared'"),
    ("mae", "The format mae has no place"),
    ("huggingface", "take format 'simmim', whose names timm's Beit has, too"),
])
def test_formats_of_a_plain_vit_have_no_place_for_it(tmp_path, format, said):
    to = tmp_path / ("to.pth" if format == "mae" else "to")
    with pytest.raises(ConversionError, match=said):
        convert.export_weights(_file(tmp_path), to, format=format, num_heads=2)


def test_a_plain_vit_is_no_simmim(tmp_path):
    with pytest.raises(ConversionError, match="has no bias of keys, this encoder has"):
        convert.export_weights(
            GOLDEN / "ckpt_mae.pth", tmp_path / "to.pth", format="simmim", num_heads=2,
            decoder_heads=2,
        )


def test_a_vit_without_positions_has_no_place_in_timm(tmp_path):
    config = {"positions": "none", "relative_bias": "none", "layer_scale": None}
    card = opening.open_weights(_file(tmp_path), num_heads=2).card
    encoder = card.model["encoder"] | config | dict(qkv_bias="qkv", mask_tokens=False)
    card = dataclasses.replace(card, model=card.model | {"encoder": encoder})
    with pytest.raises(ConversionError, match="an encoder with positions='none'"):
        exporting.check_encoder(card, "timm")


def _classifier(**changes):
    config = finetune_vitb_simmim.get_config()
    config.update_from_flattened_dict({
        "model.encoder.size": "W24-D2-H2/8", "model.encoder.mlp_ratio": 2.0,
        "model.dtype": "float32", "data.image_size": (32, 32), "data.num_classes": 5,
        **changes,
    })
    return config


def _plan(path, config):
    like = jax.eval_shape(Classify(config).init, jax.random.key(0))
    return starting.plan(str(path), like, config)


def test_fine_tuning_begins_with_a_copy_of_the_bias_in_each_block(tmp_path):
    path = _file(tmp_path)
    plan = _plan(path, _classifier())
    table = _state(SHARED)["encoder.rel_pos_bias.relative_position_bias_table"].numpy()
    for i in range(2):
        copy = plan.tensors[f"encoder/relative_bias_{i}/table"].read()
        np.testing.assert_array_equal(copy, table)
    assert "encoder/mask_token" not in plan.tensors
    report = "\n".join(plan.report)
    assert "adapted  the shared relative position bias copied to each of 2 bl" in report
    assert plan.new == {"fc_norm", "head"}


def test_fine_tuning_on_larger_images_resizes_the_bias(tmp_path):
    plan = _plan(_file(tmp_path), _classifier(**{"data.image_size": (48, 48)}))
    table = _state(SHARED)["encoder.rel_pos_bias.relative_position_bias_table"].numpy()
    expected = relative_bias.resize(table, grid=(4, 4), new_grid=(6, 6))
    np.testing.assert_array_equal(
        plan.tensors["encoder/relative_bias_1/table"].read(), expected
    )
    assert "relative position biases 4 x 4 -> 6 x 6 patches" in "\n".join(plan.report)


def test_weights_of_a_plain_vit_are_none_of_this_encoder():
    with pytest.raises(ConversionError) as error:
        _plan(GOLDEN / "ckpt_encoder_only.pth", _classifier(**{
            "model.encoder.size": "W16-D2-H2/8", "model.encoder.mlp_ratio": 2.0,
        }))
    said = str(error.value)
    assert "file has encoder.positions=sincos, model none" in said
    assert "file has encoder.relative_bias=none, model per_block" in said


def test_pre_training_goes_on_from_a_run_of_another_recipe(tmp_path):
    config = vitb_simmim_prmim.get_config()
    config.update_from_flattened_dict({
        "model.encoder.size": "W24-D2-H2/8", "model.encoder.mlp_ratio": 2.0,
        "model.dtype": "float32", "data.image_size": (32, 32),
    })
    like = jax.eval_shape(Pretrain(config).init, jax.random.key(0))
    plan = starting.plan(str(_file(tmp_path)), like, config)
    assert plan.new == {"aggregator"}
    assert "encoder/mask_token" in plan.tensors
    assert "decoder/decoder_pred/kernel" in plan.tensors


def test_an_imported_file_is_masked_as_simmim_masks(tmp_path):
    weights = opening.open_weights(_file(tmp_path), num_heads=2)
    assert weights.card.masking["mask_ratio"] == 0.6
    assert weights.card.masking["unit"] == 1  # squares of 32 pixels are the image
    assert weights.card.assumed["unit"] == "masked in squares of 8 pixels"
    assert "60 % masked, as SimMIM's code" in weights.card.assumed["mask_ratio"]
    told = opening.open_weights(_file(tmp_path), num_heads=2, mask_ratio=0.5)
    assert told.card.masking["pred_ratio"] == 0.5 and "mask_ratio" not in (
        told.card.assumed
    )


def test_a_tuned_classifier_is_what_timm_makes_of_its_file(tmp_path):
    variables = Classify(_classifier()).init(jax.random.key(0))
    rng = np.random.default_rng(0)
    ours = {
        name: tensor.of_array(rng.normal(0, 0.3, value.shape).astype(np.float32))
        for name, value in names.without_collections(variables).items()
    }
    theirs, left_over = spellings.to_theirs(
        spellings.SIMMIM_CLASSIFIER, ours, patch_size=8
    )
    assert not left_over
    path = tmp_path / "tuned.pth"
    torch.save({"model": {
        name: torch.from_numpy(value.read().copy()) for name, value in theirs.items()
    }}, path)
    made = convert.import_weights(path, tmp_path / "ours", num_heads=2)
    (line,) = [line for line in made.lines if line.startswith("check:")]
    assert "logits" in line and "features" in line
    assert made.card.model["pool"] == "mean" and made.card.model["num_classes"] == 5
    alone = convert.import_weights(
        path, tmp_path / "alone", num_heads=2, parts="encoder"
    )
    assert any("check: 2 random images" in line for line in alone.lines)
