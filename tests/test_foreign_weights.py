"""What is said of weights that are not what they should be, or not of our models."""

import json
import shutil
from pathlib import Path

import pytest

from crossmae_jax import convert
from crossmae_jax.convert import opening
from crossmae_jax.convert.files import safetensors_file, tensor
from crossmae_jax.convert.names import ConversionError
from tests.interop import timm, torch, transformers
from tests.test_convert import GOLDEN, HEADS


@pytest.mark.parametrize("path, said", [
    ("absent", "No weights at"),
    ("folder", "it holds nothing"),
    ("run/checkpoints", "Give the --workdir of the run"),
    ("notes.safetensors", "notes.safetensors"),
])
def test_what_is_no_weights_is_named(tmp_path, path, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "notes.safetensors").write_text("hello")
    with pytest.raises(ConversionError, match=said):
        convert.inspect(tmp_path / path)


def test_tensors_of_another_library_are_named(tmp_path):
    torch.save({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    with pytest.raises(ConversionError, match="conv1.weight.*no format known here"):
        opening.open_weights(tmp_path / "resnet.pth")


def test_a_missing_and_an_additional_tensor_are_both_listed(tmp_path):
    state = torch.load(GOLDEN / "ckpt_encoder_only.pth")["model"]
    state["odd_tokens"] = state.pop("blocks.1.norm2.bias")
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(ConversionError) as error:
        opening.open_weights(tmp_path / "odd.pth", num_heads=2)
    text = str(error.value)
    assert "only in the model (1):\n    blocks.1.norm2.bias" in text
    assert "only in the file (1):\n    odd_tokens" in text


def test_a_patch_grid_that_is_no_square_needs_its_size(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 64), embed_dim=24, depth=1, num_heads=2,
        num_classes=0,
    )
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ConversionError, match="8 positions form no square"):
        opening.open_weights(tmp_path / "wide.pth", num_heads=2)
    weights = opening.open_weights(
        tmp_path / "wide.pth", num_heads=2, image_size=(32, 64)
    )
    assert weights.card.image_size == (32, 64)


def _saved(tmp_path, **changes):
    content = torch.load(GOLDEN / "ckpt_encoder_only.pth")
    torch.save({**content, **changes}, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


@pytest.mark.parametrize("args", [
    [1], "text", {"epochs": [[1]], "mask_ratio": "much", "use_fm": 5},
])
def test_arguments_of_any_kind_beside_the_tensors_do_no_harm(tmp_path, args):
    weights = opening.open_weights(_saved(tmp_path, args=args), num_heads=2)
    assert weights.card.recipe == {}
    assert any("not used as weights: args" in line for line in weights.evidence)


def test_what_torch_refuses_beside_the_tensors_is_said_and_no_obstacle(tmp_path):
    path = _saved(tmp_path, where=Path("somewhere"))
    done = convert.import_weights(path, tmp_path / "in", num_heads=2)
    assert any("torch.load(weights_only=True) does not take" in x for x in done.lines)


def test_missing_blocks_are_named_before_a_model_is_built(tmp_path):
    state = torch.load(GOLDEN / "ckpt_encoder_only.pth")["model"]
    state["blocks.999999999.norm1.bias"] = torch.zeros(16)
    torch.save({"model": state}, tmp_path / "many.pth")
    with pytest.raises(ConversionError, match="up to 999999999, but no .*blocks_2"):
        opening.open_weights(tmp_path / "many.pth", num_heads=2)


@pytest.mark.parametrize("facts, said", [
    (dict(image_size=(0, 32)), "expected a height and a width"),
    (dict(image_size=(-32, -32)), "expected a height and a width"),
    (dict(mask_ratio=7.0), "mask_ratio=7.0; expected a share"),
    (dict(std=(0.0, 1.0, 1.0)), "expected values above 0"),
    (dict(mean=(0.5,)), "1 values, but the file is for 3 channels"),
    (dict(num_head=2), "Unknown: num_head. What can be said"),
])
def test_facts_that_cannot_be_are_refused(facts, said):
    with pytest.raises(ConversionError, match=said):
        opening.open_weights(
            GOLDEN / "ckpt_encoder_only.pth", **{"num_heads": 2, **facts}
        )


def test_one_ratio_without_the_other_is_refused(tmp_path):
    state = torch.load(
        GOLDEN / "ckpt_crossmae.pth", weights_only=False
    )["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    facts = dict(**HEADS, mask_ratio=0.75)
    with pytest.raises(ConversionError, match="pred_ratio=None: give both"):
        opening.open_weights(tmp_path / "bare.pth", **facts)
    with pytest.raises(ConversionError, match="fusion_input=False"):
        opening.open_weights(
            tmp_path / "bare.pth", **facts, pred_ratio=0.25, fusion_maps=(),
            fusion_input=False,
        )
    weights = opening.open_weights(tmp_path / "bare.pth", **facts, pred_ratio=0.25)
    assert weights.card.masking["pred_ratio"] == 0.25


def test_statistics_of_images_survive_every_folder(tmp_path):
    path = GOLDEN / "ckpt_mae.pth"
    for form in ("timm", "huggingface"):
        convert.export_weights(path, tmp_path / form, format=form, check=False, **HEADS)
        folder = tmp_path / form
        tensors, metadata = safetensors_file.read(folder / "model.safetensors")
        held = {name: tensor.of_array(value.read()) for name, value in tensors.items()}
        del metadata["crossmae_jax_card"]  # as if another had written it
        safetensors_file.write(folder / "model.safetensors", held, metadata)
        card = opening.open_weights(folder).card
        assert card.mean == (0.485, 0.456, 0.406)
        assert card.std == (0.229, 0.224, 0.225)
        assert card.image_size == (32, 32)
        assert card.model["encoder"]["size"] == "W16-D2-H2/8"


@pytest.mark.parametrize("change, said", [
    (dict(model_args={"act_layer": "quick_gelu"}), "act_layer='quick_gelu'"),
    (dict(num_classes=10, global_pool="avg", model_args={"fc_norm": False}),
     "pools by 'mean', without an fc_norm"),
    (dict(num_classes=10, global_pool="map"), "pools by 'map'"),
    (dict(model_args={"img_size": [128, 48]}), "has 8 x 3 patches"),
])
def test_models_of_timm_that_ours_are_not_are_refused(tmp_path, change, said):
    folder = tmp_path / "timm"
    folder.mkdir()
    shutil.copy(GOLDEN / "timm_vit_tiny_like.safetensors", folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", **change}
    config["model_args"] = {"num_heads": 3, **config.get("model_args", {})}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=said):
        opening.open_weights(folder)


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="has saved no checkpoint yet"):
        convert.inspect(tmp_path)


def test_a_ratio_that_floats_round_down_gives_the_right_width(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=176, depth=1, num_heads=2,
        num_classes=0, mlp_ratio=240.5 / 176,
    )
    assert int(176 * (240 / 176)) == 239
    torch.save(model.state_dict(), tmp_path / "narrow.pth")
    weights = opening.open_weights(tmp_path / "narrow.pth", num_heads=2)
    assert weights.tensors["encoder/blocks_0/mlp/fc1/kernel"].shape == (176, 240)
    config = convert.exporting.huggingface_config(weights.card)
    assert config["intermediate_size"] == 240


def test_a_model_in_several_files_is_one(tmp_path):
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        intermediate_size=32, patch_size=8, decoder_hidden_size=16,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    transformers.ViTMAEForPreTraining(config).save_pretrained(
        tmp_path / "hf", max_shard_size="8KB"
    )
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    done = convert.import_weights(tmp_path / "hf", tmp_path / "in")
    assert any("through transformers" in line for line in done.lines)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    shard = sorted(tmp_path.glob("hf/model-*.safetensors"))[0]
    # A hub's cache has links to where it keeps the files.
    shard.rename(tmp_path / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"),
                 "gone.safetensors", "..", "deep/../../elsewhere.safetensors"):
        names = {k: name if v == shard.name else v
                 for k, v in written["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(ConversionError, match="expected a file beside it") as said:
            opening.open_weights(tmp_path / "hf")
        assert str(said.value).startswith(f"{index} names {name!r}; ")
    index.write_text(json.dumps(written))
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    assert opening.open_weights(tmp_path / "hf").tensors
    index.write_text("{}")
    with pytest.raises(ConversionError, match="has no weight_map"):
        opening.open_weights(tmp_path / "hf")


def test_the_pooler_of_a_vitmodel_is_left_out_and_said_so(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, image_size=16, patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    done = convert.import_weights(tmp_path / "vit", tmp_path / "in")
    assert "left out: pooler.dense.weight, which comes after the encoder" in done.lines
    assert any("through transformers" in line for line in done.lines)


def test_a_card_that_was_changed_by_hand_is_refused(tmp_path):
    convert.import_weights(GOLDEN / "ckpt_mae.pth", tmp_path / "in", **HEADS)
    path = tmp_path / "in" / "model.safetensors"
    tensors, metadata = safetensors_file.read(path)
    held = {name: tensor.of_array(value.read()) for name, value in tensors.items()}
    card = json.loads(metadata["crossmae_jax"])
    del card["channels"]
    safetensors_file.write(path, held, {"crossmae_jax": json.dumps(card)})
    with pytest.raises(ConversionError, match="KeyError: 'channels'"):
        opening.open_weights(tmp_path / "in")
