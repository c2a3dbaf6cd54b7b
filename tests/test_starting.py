"""`config.init_from`: what becomes of every part of weights, and what is refused."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from crossmae_jax import convert, train
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.convert import channels, names, opening, starting
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.distributed import parallel
from crossmae_jax.models import posemb
from crossmae_jax.objectives.pretrain import Pretrain
from tests.saved_runs import save_run, tiny_config
from tests.test_convert import GOLDEN, HEADS


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "mae", "digits_mae")


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "cross", "digits_cross")


def _config(name="digits_cross", *overrides, **changes):
    config = tiny_config(name, *overrides)
    config.update(changes)
    return config


def _plan(path, config):
    objective = Pretrain(config)
    like = jax.eval_shape(objective.init, jax.random.key(0))
    return starting.plan(str(path), like, config)


def _report(plan, title):
    (line,) = [x for x in plan.report if re.match(rf" +{title} ", x)]
    return line.split(title, 1)[1].strip()


def _read(path, **facts):
    return {k: v.read() for k, v in opening.open_weights(path, **facts).tensors.items()}


def test_a_run_of_the_same_model_is_loaded_whole(cross):
    plan = _plan(cross, _config())
    expected = _read(cross)
    assert plan.tensors.keys() == expected.keys()
    assert _report(plan, "new") == _report(plan, "unused") == "nothing"
    for name, value in plan.tensors.items():
        np.testing.assert_array_equal(value.read(), expected[name])


def test_a_decoder_of_another_kind_stays_new(mae):
    plan = _plan(mae, _config("digits_cross"))
    assert _report(plan, "loaded").startswith("encoder (")
    assert re.fullmatch(
        r"fusion \(\d+ tensors\), decoder \(\d+ tensors\); drawn at random",
        _report(plan, "new"),
    )
    unused = _report(plan, "unused")
    assert "decoder (" in unused and "the encoder's norm (2 tensors)" in unused
    assert all(name.startswith("encoder/") for name in plan.tensors)


@pytest.mark.parametrize("ours, theirs", [
    ("inter_block", "multi_level"), ("multi_level", "inter_block"),
])
def test_a_fusion_of_another_kind_stays_new(tmp_path, ours, theirs):
    """With the same decoder, which is loaded."""
    common = ["model.encoder.size=W16-D3-H2/4", "model.fusion.input=True"]
    maps = ["model.fusion.maps=(0, 2)"]
    run = save_run(
        tmp_path / "run", "digits_cross", *common, *maps, f"model.fusion.kind={theirs}"
    )
    config = _config("digits_cross", *common, *maps, f"model.fusion.kind={ours}")
    plan = _plan(run, config)
    loaded = _report(plan, "loaded")
    assert "decoder (" in loaded and "fusion" not in loaded
    assert re.fullmatch(
        r"fusion \(\d+ tensors\); drawn at random", _report(plan, "new")
    )
    assert re.fullmatch(r"fusion \(\d+ tensors\)", _report(plan, "unused"))
    same = _plan(run, _config(
        "digits_cross", *common, *maps, f"model.fusion.kind={theirs}"
    ))
    assert _report(same, "new") == _report(same, "unused") == "nothing"


def test_a_norm_that_the_file_lacks_is_new(cross):
    plan = _plan(cross, _config("digits_mae"))
    assert "the encoder's norm (2 tensors)" in _report(plan, "new")


def test_training_starts_from_the_weights_and_says_so(cross, tmp_path, capsys):
    # One step, of the warm-up: its rate is 0, so that the weights stay what they were.
    overrides = [
        f"init_from={cross}", "optim.warmup_epochs=0.05", "epochs=0.1", "seed=5",
    ]
    config = _config("digits_cross", *overrides, baselines=False)
    with config.unlocked():
        config.evals = {}
    train.run(config, tmp_path / "new")
    text = capsys.readouterr().out
    assert "FRESH START" in text and f"weights from {cross}" in text
    assert "loaded   encoder" in text
    after = checkpointer.restore_variables(tmp_path / "new" / "checkpoints")
    before = _read(cross)
    for name, value in names.without_collections(after).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    train.run(config, tmp_path / "new")  # resumed: the file is not asked again
    assert "weights from" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named_when_they_are_read(cross, value):
    def harmed(kernel):
        kernel = np.array(kernel)
        kernel[0, 0] = value
        return kernel

    plan, name = _plan(cross, _config()), "decoder/decoder_pred/kernel"
    harm = plan.tensors | {name: plan.tensors[name].then(harmed)}
    variables = Pretrain(_config()).init(jax.random.key(1))
    plan.apply(variables)
    message = f"{cross}: 1 of [0-9]+ values of {name} are no finite numbers"
    with pytest.raises(ConversionError, match=message):
        dataclasses.replace(plan, tensors=harm).apply(variables)


def test_weights_lie_where_the_state_lies(cross):
    config, mesh = _config(), parallel.make_mesh()
    objective = Pretrain(config)
    init = jax.jit(objective.init, out_shardings=parallel.replicated(mesh))
    variables = init(jax.random.key(1))
    started = _plan(cross, config).apply(variables)
    for old, new in zip(*map(jax.tree.leaves, (variables, started)), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        assert len(new.sharding.device_set) == mesh.size


def test_position_tables_are_resized_to_the_models_grid(cross):
    config = _config("digits_cross", "data.image_size=(24, 16)")
    plan = _plan(cross, config)
    assert _report(plan, "adapted") == "position tables 4 x 4 -> 6 x 4 patches"
    before = _read(cross)
    for name in ("encoder/pos_embed", "decoder/decoder_pos_embed"):
        np.testing.assert_array_equal(
            plan.tensors[name].read(),
            posemb.resize(before[name], grid=(4, 4), new_grid=(6, 4)),
        )


def test_another_size_of_model_is_an_error_with_the_reason(cross):
    with pytest.raises(ConversionError) as error:
        _plan(cross, _config("digits_cross", "model.encoder.size=W32-D1-H2/4"))
    text = str(error.value)
    assert "file is width 16, depth 1, patches of 4, model is width 32" in text
    assert "cls_token: (1, 1, 16), expected (1, 1, 32)" in text


def test_sizes_that_people_know_are_called_by_name(tmp_path):
    """A file of ViT-L's shapes for a model of ViT-B, without gigabytes of zeros."""
    config = _config("vitb_mae", "model.encoder.size=B/16")
    large = _config("vitb_mae", "model.encoder.size=L/16")
    like = jax.eval_shape(Pretrain(large).init, jax.random.key(0))
    card = convert.cards.of_run(large, step=1, origin="x")
    tensors = {
        name: opening.Tensor(leaf.shape, np.dtype(np.float32), lambda: None)
        for name, leaf in names.without_collections(like).items()
    }
    weights = opening.Weights(card, tensors, "safetensors", ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_weights", lambda *_, **__: weights)
        said = "file is ViT-L/16, model is ViT-B/16"
        with pytest.raises(ConversionError, match=said):
            _plan(tmp_path / "large", config)


def test_another_decoder_depth_is_an_error_and_the_encoder_can_be_taken_alone(
    cross, tmp_path
):
    config = _config("digits_cross", "model.decoder.depth=2")
    with pytest.raises(ConversionError, match="file has decoder.depth=1, model 2"):
        _plan(cross, config)
    convert.export_weights(
        cross, tmp_path / "e.safetensors", format="safetensors", parts="encoder"
    )
    plan = _plan(tmp_path / "e.safetensors", config)
    assert _report(plan, "loaded").startswith("encoder (")


@pytest.mark.parametrize("override, said", [
    ("model.encoder.size=W16-D1-H4/4", "heads of the encoder: 2, the model has 4"),
    ("model.decoder.num_heads=4", "decoder.num_heads: 2, the model has 4"),
])
def test_what_shows_in_no_shape_is_compared_too(cross, override, said):
    with pytest.raises(ConversionError, match=said):
        _plan(cross, _config("digits_cross", override))


def test_maps_that_are_mixed_are_compared(tmp_path):
    overrides = ["model.encoder.size=W16-D3-H2/4", "model.fusion.input=False"]
    run = save_run(
        tmp_path / "run", "digits_cross", *overrides, "model.fusion.maps=(0,)"
    )
    with pytest.raises(ConversionError, match=r"mixed: \(1,\), the model has \(3,\)"):
        _plan(run, _config("digits_cross", *overrides, "model.fusion.maps=(2,)"))


@pytest.mark.parametrize("how", channels.ADAPTATIONS)
def test_channels_are_adapted_when_asked(cross, how, tmp_path):
    convert.export_weights(
        cross, tmp_path / "e.safetensors", format="safetensors", parts="encoder"
    )
    overrides = [
        "data.channels=3", "data.mean=(0.5, 0.5, 0.5)", "data.std=(0.5, 0.5, 0.5)",
    ]
    with pytest.raises(ConversionError, match="say how to adapt"):
        _plan(tmp_path / "e.safetensors", _config("digits_cross", *overrides))
    plan = _plan(
        tmp_path / "e.safetensors",
        _config("digits_cross", *overrides, f"init_channels={how}"),
    )
    assert f"1 -> 3 channels by {how}" in _report(plan, "adapted")
    assert plan.tensors["encoder/patch_embed/proj/kernel"].shape == (48, 16)


def test_a_decoder_cannot_be_adapted_to_other_channels(cross):
    config = _config(
        "digits_cross", "data.channels=3", "data.mean=(0.5, 0.5, 0.5)",
        "data.std=(0.5, 0.5, 0.5)", "init_channels=mean",
    )
    with pytest.raises(ConversionError, match="file is for 1 channels, model for 3"):
        _plan(cross, config)


def test_an_unknown_adaptation_is_named(cross):
    with pytest.raises(ConversionError, match="Unknown init_channels='median'"):
        _plan(cross, _config("digits_cross", "init_channels=median"))


def test_adapted_filters_are_those_of_their_definition():
    kernel = np.arange(2 * 3 * 1, dtype=np.float32).reshape(6, 1)  # (pp c) d
    filters = kernel.reshape(2, 3)

    def adapted(how, num_out):
        return channels.adapted(
            kernel, num_in=3, num_out=num_out, how=how
        ).reshape(2, num_out)

    np.testing.assert_array_equal(adapted("sum", 1)[:, 0], filters.sum(1))
    np.testing.assert_array_equal(adapted("mean", 2), filters.mean(1)[:, None] + [0, 0])
    np.testing.assert_array_equal(
        adapted("repeat", 4), filters[:, [0, 1, 2, 0]] * np.float32(0.75)
    )
    # A grey image in all channels projects as before.
    np.testing.assert_allclose(adapted("sum", 5).sum(1), filters.sum(1), rtol=1e-6)


def test_repeat_is_what_timm_does():
    from tests.interop import timm, torch

    kernel = np.random.default_rng(0).normal(size=(3 * 16, 5)).astype(np.float32)
    theirs = timm.models._manipulate.adapt_input_conv(
        7, torch.tensor(kernel.reshape(4, 4, 3, 5).transpose(3, 2, 0, 1))
    ).numpy()
    ours = channels.adapted(kernel, num_in=3, num_out=7, how="repeat")
    np.testing.assert_allclose(
        ours.reshape(4, 4, 7, 5), theirs.transpose(2, 3, 1, 0), rtol=1e-6
    )


@pytest.mark.parametrize("name, loaded", [
    ("ckpt_mae.pth", "encoder"), ("ckpt_encoder_only_legacy.pth", "encoder"),
    ("ckpt_crossmae.pth", "encoder.*fusion.*decoder"),
])
def test_foreign_files_are_taken_as_they_are(name, loaded):
    """Heads come from the model where the file does not tell."""
    overrides = [
        "model.encoder.size=W16-D2-H2/8", "model.encoder.mlp_ratio=2.0",
        "model.decoder.depth=2", "model.decoder.mlp_ratio=2.0",
        "data.image_size=(32, 32)", "data.channels=3",
        "data.mean=(0.485, 0.456, 0.406)", "data.std=(0.229, 0.224, 0.225)",
    ]
    plan = _plan(GOLDEN / name, _config("digits_cross", *overrides))
    assert re.search(loaded, _report(plan, "loaded"))
    facts = HEADS if "encoder_only" not in name else dict(num_heads=2)
    expected = _read(GOLDEN / name, **facts)
    for ours, value in plan.tensors.items():
        np.testing.assert_array_equal(value.read(), expected[ours])


def test_a_wrong_path_ends_training_before_it_begins(tmp_path):
    config = _config("digits_cross", f"init_from={tmp_path / 'absent'}")
    with pytest.raises(ConversionError, match="No weights at"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_targets_are_noted(cross):
    plan = _plan(cross, _config("digits_cross", "target.normalize=False"))
    assert "trained with target.normalize=True" in plan.report[-1]


@pytest.mark.parametrize("form, name", [
    ("mae", "out.pth"), ("timm", "out"), ("huggingface", "out"),
    ("safetensors", "out.safetensors"),
])
def test_every_export_of_a_run_can_be_started_from(mae, tmp_path, form, name):
    convert.export_weights(mae, tmp_path / name, format=form, check=False)
    plan = _plan(tmp_path / name, _config("digits_mae"))
    assert _report(plan, "loaded").startswith("encoder (")
    assert ("decoder" in _report(plan, "new")) == (form == "timm")
    said = "heads of the encoder: 2, the model has 4"
    with pytest.raises(ConversionError, match=said):
        _plan(tmp_path / name, _config("digits_mae", "model.encoder.size=W16-D1-H4/4"))


def test_a_class_row_that_crossmaes_scripts_ignore_is_not_exported(cross, tmp_path):
    weights = opening.open_weights(cross)
    table = weights.tensors["encoder/pos_embed"].then(lambda x: x + np.float32(1))
    changed = dict(weights.tensors) | {"encoder/pos_embed": table}
    path = tmp_path / "c.safetensors"
    convert.exporting.write_safetensors(
        opening.Weights(weights.card, changed, "safetensors", ()), path
    )
    with pytest.raises(ConversionError, match="CrossMAE's scripts do not"):
        convert.export_weights(path, tmp_path / "c.pth", format="mae")
