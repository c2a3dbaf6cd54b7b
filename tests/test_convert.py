"""Weights in and out through the command and its functions, with real files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import crossmae_jax
from crossmae_jax import __main__ as front_door
from crossmae_jax import convert
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.convert import cards, names, opening, spellings
from crossmae_jax.convert.files import safetensors_file, tensor
from crossmae_jax.convert.names import ConversionError
from tests.interop import timm, torch, transformers
from tests.saved_runs import STEP, save_run

GOLDEN = Path(__file__).parent / "golden"
HEADS = dict(num_heads=2, decoder_heads=2)


@pytest.fixture(scope="module", params=["digits_mae", "digits_cross"])
def run(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / request.param
    return save_run(directory, request.param)


def _tensors(path, **facts):
    return {
        name: value.read()
        for name, value in opening.open_weights(path, **facts).tensors.items()
    }


def _same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def _main(*arguments):
    return front_door.main(["convert", *map(str, arguments)])


def test_import_prints_its_evidence_and_the_result_is_ours(tmp_path, capsys):
    path = GOLDEN / "ckpt_crossmae.pth"
    status = _main(
        "import", path, f"--to={tmp_path / 'in'}", "--num_heads=2", "--decoder_heads=2"
    )
    text = capsys.readouterr().out
    assert status == 0
    assert "format mae: a mask_token" in text
    assert "3 feature maps, all blocks and the encoder's input" in text
    assert "check: 2 random images through timm" in text
    weights = opening.open_weights(tmp_path / "in")
    assert weights.format == "safetensors"
    assert weights.card.normalize is True
    assert weights.card.masking["pred_ratio"] == 0.25
    _same(_tensors(tmp_path / "in"), _tensors(path, **HEADS))


@pytest.mark.parametrize("name, form, kind, facts", [
    ("ckpt_mae.pth", "mae", "pretrain", HEADS),
    ("ckpt_encoder_only.pth", "mae", "encoder", dict(num_heads=2)),
    ("ckpt_encoder_only_legacy.pth", "mae", "encoder", dict(num_heads=2)),
    ("ckpt_finetuned.pth", "mae", "classifier", dict(num_heads=2)),
    ("timm_vit_tiny_like.safetensors", "timm", "classifier", dict(num_heads=3)),
    ("timm_vit_tiny_like_avg.safetensors", "timm", "classifier", dict(num_heads=2)),
])
def test_every_kind_of_file_is_recognised_and_imported(
    tmp_path, name, form, kind, facts
):
    done = convert.import_weights(GOLDEN / name, tmp_path / "in", **facts)
    assert done.card.kind == kind
    assert done.lines[0].startswith(f"format {form}: ")
    assert any(line.startswith("check: 2 random images") for line in done.lines)
    _same(_tensors(tmp_path / "in"), _tensors(GOLDEN / name, **facts))


def test_what_a_file_does_not_tell_is_asked_for(tmp_path, capsys):
    arguments = ["import", GOLDEN / "ckpt_mae.pth", f"--to={tmp_path / 'in'}"]
    assert _main(*arguments) == 1
    assert "give num_heads" in capsys.readouterr().err
    assert _main(*arguments, "--num_heads=2") == 1
    assert "give decoder_heads" in capsys.readouterr().err
    assert not (tmp_path / "in").exists()


def test_contradicting_the_file_is_an_error(tmp_path):
    with pytest.raises(ConversionError, match="normalize=False was given, but the fi"):
        convert.import_weights(
            GOLDEN / "ckpt_mae.pth", tmp_path / "in", **HEADS, normalize=False
        )


def test_nothing_is_overwritten_and_nothing_is_left_half_done(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    path = GOLDEN / "ckpt_encoder_only.pth"
    assert _main("import", path, f"--to={tmp_path / 'in'}", "--num_heads=2") == 1
    assert "exists and is not overwritten" in capsys.readouterr().err
    # 16 heads of width 1 have the shapes of 2 of width 8; the images tell.
    other = convert.import_weights(path, tmp_path / "other", num_heads=2)
    _corrupt(other.path / "model.safetensors")
    with pytest.raises(ConversionError, match="disagree"):
        convert.checks.compare(opening.open_weights(tmp_path / "other"), path, "mae")


def _corrupt(path):
    """Exchanges queries and keys of a block, which no shape shows."""
    tensors, metadata = safetensors_file.read(path)
    name = "encoder/blocks_0/attn/qkv/kernel"
    values = tensors[name].read()
    q, k, v = np.split(values, 3, axis=1)
    changed = dict(tensors) | {name: tensor.of_array(np.concatenate([k, q, v], axis=1))}
    held = {key: tensor.of_array(value.read()) for key, value in changed.items()}
    safetensors_file.write(path, held, metadata)


def test_sides_that_disagree_leave_nothing_behind(tmp_path, monkeypatch):
    def write(weights, path):
        path.mkdir()
        convert.exporting.write_safetensors(weights, path / opening.WEIGHTS)

    monkeypatch.setitem(convert.exporting.WRITERS, "timm", (write, ""))
    with pytest.raises(ConversionError):
        convert.export_weights(
            GOLDEN / "ckpt_encoder_only.pth", tmp_path / "out", format="timm",
            num_heads=2,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form, name", [
    ("mae", "out.pth"), ("safetensors", "out.safetensors"),
])
def test_a_run_comes_back_the_same_from_forms_that_hold_all_of_it(
    run, tmp_path, form, name
):
    done = convert.export_weights(run, tmp_path / name, format=form)
    back = opening.open_weights(tmp_path / name)
    assert back.card.model == done.card.model
    assert back.card.step == STEP
    variables = checkpointer.restore_variables(run / "checkpoints")
    _same(
        {name: value.read() for name, value in back.tensors.items()},
        {k: np.asarray(v) for k, v in names.without_collections(variables).items()},
    )


def test_mae_form_is_what_the_references_scripts_load(run, tmp_path):
    convert.export_weights(run, tmp_path / "out.pth", format="mae")
    state = torch.load(tmp_path / "out.pth", map_location="cpu")["model"]
    weights = opening.open_weights(run)
    expected, _ = spellings.to_theirs(
        spellings.MAE, weights.tensors, patch_size=weights.card.patch_size
    )
    assert set(state) == set(expected)
    for name, value in state.items():
        np.testing.assert_array_equal(value.numpy(), expected[name].read())


def test_timm_loads_an_export_strictly_with_our_features(run, tmp_path):
    done = convert.export_weights(run, tmp_path / "out", format="timm")
    assert any("left out: " in line and "decoder" in line for line in done.lines)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    state = safetensors_file.read(tmp_path / "out" / "model.safetensors")[0]
    assert state.keys() == model.state_dict().keys()
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), np.uint8)
    encoder = crossmae_jax.load(run)
    cfg = model.pretrained_cfg
    normal = (images / 255 - cfg["mean"]) / np.asarray(cfg["std"])
    with torch.no_grad():
        tokens = model.forward_features(
            torch.tensor(normal.transpose(0, 3, 1, 2), dtype=torch.float32)
        ).numpy()
    np.testing.assert_allclose(encoder.tokens(images), tokens, atol=3e-5)


def test_transformers_loads_an_export(run, tmp_path):
    crosses = run.name == "digits_cross"
    if crosses:
        with pytest.raises(ConversionError, match="With fresh_norm it gets one"):
            convert.export_weights(run, tmp_path / "out", format="huggingface")
        assert not (tmp_path / "out").exists()
    done = convert.export_weights(
        run, tmp_path / "out", format="huggingface", fresh_norm=crosses
    )
    assert any("through transformers" in line for line in done.lines)
    loader, options = (
        transformers.ViTModel, dict(add_pooling_layer=False)
    ) if crosses else (transformers.ViTMAEForPreTraining, {})
    _, found = loader.from_pretrained(
        tmp_path / "out", output_loading_info=True, **options
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6
    back = opening.open_weights(tmp_path / "out")
    assert back.format == "huggingface"
    ours = {k: v.read() for k, v in opening.open_weights(run).tensors.items()}
    for name, value in back.tensors.items():
        if not (crosses and name.startswith("encoder/norm/")):
            np.testing.assert_array_equal(value.read(), ours[name], err_msg=name)


def test_the_encoder_can_be_taken_alone(run, tmp_path):
    done = convert.export_weights(
        run, tmp_path / "e.safetensors", format="safetensors", parts="encoder"
    )
    assert done.card.kind == "encoder"
    assert all(name.startswith("encoder/") for name in _tensors(done.path))


def test_a_step_of_a_run_can_be_named(run, tmp_path):
    done = convert.export_weights(
        run, tmp_path / "s.safetensors", format="safetensors", step=STEP
    )
    assert done.card.step == STEP
    with pytest.raises(checkpointer.RestoreError, match="No step 7"):
        convert.export_weights(
            run, tmp_path / "t.safetensors", format="safetensors", step=7
        )


def test_an_aggregator_has_no_place_in_the_references_layout(tmp_path):
    run = save_run(tmp_path / "run", "digits_cross_prmim")
    with pytest.raises(ConversionError, match="no place for PR-MIM's aggregator"):
        convert.export_weights(run, tmp_path / "out.pth", format="mae")
    convert.export_weights(run, tmp_path / "a.safetensors", format="safetensors")
    assert opening.open_weights(tmp_path / "a.safetensors").card.parts[-1] == (
        "aggregator"
    )


def test_blocks_that_no_decoder_saw_are_named_in_an_export(tmp_path):
    run = save_run(
        tmp_path / "run", "digits_cross", "model.fusion.maps=(0,)",
        "model.encoder.size=W16-D2-H2/4",
    )
    done = convert.export_weights(run, tmp_path / "out", format="timm")
    assert any("blocks from 1 on were not trained" in line for line in done.lines)


@pytest.mark.parametrize("arguments, said", [
    (dict(format="onnx", to="x"), "Unknown format 'onnx'"),
    (dict(format="mae", to="x"), "end in .pth"),
    (dict(format="timm", to="x.safetensors"), "no suffix of a file"),
    (dict(format="timm", to="x", parts="decoder"), "Unknown parts 'decoder'"),
    (dict(format="timm", to="x", fresh_norm=True), "leave it out"),
    (dict(format="timm", to="x", step=7), "is no run"),
])
def test_a_wrong_request_says_what_to_ask_for(tmp_path, arguments, said):
    to = tmp_path / arguments.pop("to")
    with pytest.raises(ConversionError, match=said):
        convert.export_weights(
            GOLDEN / "ckpt_encoder_only.pth", to, num_heads=2, **arguments
        )
    assert list(tmp_path.iterdir()) == []


def test_inspect_describes_without_reading(capsys, monkeypatch, tmp_path):
    convert.import_weights(GOLDEN / "ckpt_mae.pth", tmp_path / "in", **HEADS)
    path = tmp_path / "in" / "model.safetensors"
    with path.open("r+b") as file:  # the header stays, the values become a hole
        size = path.stat().st_size
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    assert _main("inspect", tmp_path / "in") == 0
    text = capsys.readouterr().out
    assert "pretrain: encoder, decoder" in text
    assert "50 tensors, 13,936 numbers" in text
    assert "decoder/decoder_blocks_0/attn/qkv/kernel" in text


def test_inspect_lists_a_file_whose_model_is_not_clear(capsys):
    assert _main("inspect", GOLDEN / "ckpt_mae.pth") == 0
    text = capsys.readouterr().out
    assert "give num_heads" in text
    assert "blocks.1.attn.qkv.weight" in text
    assert "optimizer, epoch, scaler, args" in text


def test_a_fresh_norm_is_left_out_again_when_its_export_is_read(tmp_path):
    path = GOLDEN / "ckpt_crossmae.pth"
    done = convert.export_weights(
        path, tmp_path / "out", format="huggingface", fresh_norm=True, **HEADS
    )
    assert any("added: a norm of scale 1" in line for line in done.lines)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(
        crossmae_jax.load(tmp_path / "out")(images),
        crossmae_jax.load(path, **HEADS)(images), atol=1e-6,
    )


def test_an_unknown_target_is_not_passed_on_to_transformers(tmp_path):
    state = torch.load(GOLDEN / "ckpt_mae.pth", weights_only=False)["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    with pytest.raises(ConversionError, match="normalize=True or False"):
        convert.export_weights(
            tmp_path / "bare.pth", tmp_path / "out", format="huggingface", **HEADS
        )


def test_a_card_survives_json():
    card = opening.open_weights(GOLDEN / "ckpt_crossmae.pth", **HEADS).card
    assert cards.from_json(card.to_json()) == card
    values = json.loads(card.to_json())
    for name in ("parts", "image_size", "patch_size", "channels", "mean", "std",
                 "normalize", "masking", "recipe", "step", "library"):
        assert name in values


def test_a_damaged_run_is_not_exported(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    step_number = checkpointer.newest_step(copy / "checkpoints")
    folder = copy / "checkpoints" / str(step_number) / "variables"
    largest = max(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    with pytest.raises(checkpointer.RestoreError):
        convert.export_weights(copy, tmp_path / "out", format="timm")


def test_help_names_the_three_actions(capsys):
    with pytest.raises(SystemExit):
        _main("--help")
    text = capsys.readouterr().out
    for action in ("inspect", "import", "export"):
        assert f"convert {action}" in text
