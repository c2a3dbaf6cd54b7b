"""Settings of older versions: read in today's form, and named where they are given."""

import json
import re
import runpy
from pathlib import Path

import pytest
from flax import linen as nn
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import digits_cross, finetune_digits
from crossmae_jax import kinds, objectives
from crossmae_jax.commands import flags
from crossmae_jax.models import decoders
from crossmae_jax.runs import settings, workdir

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)

# As they lay side by side in files and in config.json.
FLAT = dict(
    size="W16-D2-H2/4", mlp_ratio=2.0, fusion="inter_block", fusion_maps=None,
    fusion_input=True, decoder="cross", decoder_dim=16, decoder_depth=1,
    decoder_heads=2, decoder_self_attention=True, remat="selective", dtype="float32",
    aggregator=dict(
        kind="conv", kernel_size=3, visible="encoder", rewrites_retained=False
    ),
)
GROUPED = dict(
    encoder=dict(kind="vit", size="W16-D2-H2/4", mlp_ratio=2.0),
    fusion=dict(kind="inter_block", maps=None, input=True),
    decoder=dict(
        kind="cross", dim=16, depth=1, num_heads=2, mlp_ratio=2.0, self_attention=True
    ),
    aggregator=FLAT["aggregator"], remat="selective", dtype="float32",
)


def test_settings_that_lay_side_by_side_are_grouped_by_parts():
    stored = dict(seed=3, model=FLAT)
    config, old = settings.grouped(stored)
    assert config == dict(seed=3, model=GROUPED)
    assert set(old) == set(settings.RENAMED) - {"model.drop_path"}
    assert stored["model"] is FLAT and "size" in FLAT  # a copy was made
    assert settings.grouped(config) == (config, [])


def test_a_classifier_has_an_encoder_and_no_other_part():
    flat = dict(size="B/16", mlp_ratio=4.0, drop_path=0.1, pool="mean")
    config, _ = settings.grouped(dict(model=flat))
    assert config["model"] == dict(
        encoder=dict(kind="vit", size="B/16", mlp_ratio=4.0, drop_path=0.1),
        pool="mean",
    )


@pytest.mark.parametrize("changes, part", [
    (dict(fusion="last", fusion_maps=[0], fusion_input=False), "fusion"),
    (dict(aggregator=dict(kind="transformer", kernel_size=3)), "aggregator"),
])
def test_what_an_old_run_did_not_look_at_does_not_stop_it_now(changes, part):
    group = settings.grouped(dict(model=FLAT | changes))[0]["model"][part]
    assert all(
        group[name] == value for name, value in
        {"maps": None, "input": True, "kernel_size": 7}.items() if name in group
    )


@pytest.mark.parametrize("decoder, visible", [("mae", "decoder"), ("cross", "encoder")])
def test_settings_that_did_not_exist_are_what_runs_did_then(decoder, visible):
    flat = {name: FLAT[name] for name in FLAT if name not in ("aggregator", "remat")}
    config = settings.completed(dict(model=flat | dict(decoder=decoder)))
    assert config["model"]["aggregator"] == dict(
        kind="none", kernel_size=7, visible=visible, rewrites_retained=False
    )
    assert config["model"]["remat"] == "none" and config["init_from"] == ""
    for stored in (config, settings.completed(dict(objective="classify"))):
        assert stored["data"]["transform"] == "classification"
        assert stored["mesh"] == dict(fsdp=0)


@pytest.mark.parametrize("unit, thrown", [(1, "patch"), (2, "unit")])
def test_old_runs_threw_what_they_masked_as_one(unit, thrown):
    stored = settings.completed(dict(masking=dict(unit=unit)))
    assert stored["masking"]["throw_by"] == thrown


def test_old_classifiers_have_the_trust_coefficient_that_lars_had():
    stored = dict(objective="classify", optim=dict(name="lars"))
    assert settings.completed(stored)["optim"]["trust_coefficient"] == 0.001


def test_the_settings_of_a_shipped_run_are_those_of_its_config():
    stored = json.loads(
        (ROOT / "crossmae_jax/runs/references/digits_cross/config.json").read_text()
    )
    assert "decoder_dim" in stored["model"]  # it is that old
    ours = json.loads(digits_cross.get_config().to_json())
    assert workdir.differing(settings.completed(stored), ours) == {}


def test_a_run_may_go_on_with_other_limits_of_bad_and_skipped_images():
    ours = digits_cross.get_config()
    other = digits_cross.get_config()
    other.data.update(max_pixels=1, max_bad_share=0.5, max_skipped_share=1.0)
    assert workdir.differing(ours.to_dict(), other.to_dict()) == {}
    other.data.flip = not ours.data.flip
    assert list(workdir.differing(ours.to_dict(), other.to_dict())) == ["data.flip"]


def test_the_file_of_an_experiment_may_be_old_in_all_or_in_part():
    old = ConfigDict(dict(
        model=FLAT | dict(fusion_maps=placeholder(tuple)),
        optim=dict(clip_norm=placeholder(float)),
    ))
    config, names = settings.of_file(old)
    assert config.to_dict()["model"] == GROUPED and "model.decoder_dim" in names
    # What was unset is unset still, and can be set.
    config.model.fusion.maps, config.optim.clip_norm = (0,), 1.0
    with pytest.raises(TypeError):
        config.optim.clip_norm = "much"
    # A setting by its old name, on top of today's recipe.
    config = digits_cross.get_config()
    config.model.decoder_depth, config.model.mlp_ratio = 7, 3.0
    config, names = settings.of_file(config)
    assert names == ["model.mlp_ratio", "model.decoder_depth"]
    assert config.model.decoder.depth == 7
    assert config.model.encoder.mlp_ratio == config.model.decoder.mlp_ratio == 3.0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_of_today_is_taken_as_it_is(path):
    config = runpy.run_path(str(path))["get_config"]()
    same, names = settings.of_file(config)
    assert same is config and not names


def test_an_old_name_is_answered_with_the_new_one():
    config = digits_cross.get_config()
    for old, new in settings.RENAMED.items():
        if old != "model.drop_path":
            assert settings.moved(old, config).startswith(f"{old} is now {new[0]}")
    both = "model.encoder.mlp_ratio and model.decoder.mlp_ratio"
    assert settings.moved("model.mlp_ratio", config).endswith(both)
    classifier = finetune_digits.get_config()
    assert settings.moved("model.mlp_ratio", classifier) == (
        "model.mlp_ratio is now model.encoder.mlp_ratio"
    )
    assert not settings.moved("model.decoder_dim", classifier)
    assert not settings.moved("model.deccoder", config)


@pytest.mark.parametrize("config, message", [
    (digits_cross, "Unknown setting model.decoder_dim=8. model.decoder_dim is now "
     "model.decoder.dim."),
    (finetune_digits, "Unknown setting model.decoder_dim=8. There are: encoder, pool"),
])
def test_an_old_name_that_is_set_in_python_is_not_overlooked(config, message):
    config = config.get_config()
    config.model.decoder_dim, config.data.num_classes = 8, 10
    with pytest.raises(ValueError, match=re.escape(message)):
        objectives.make(config)


def test_a_file_that_sets_a_group_to_a_name_is_told_where(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import digits_cross\n\n\ndef get_config():\n"
        "    config = digits_cross.get_config()\n"
        "    config.model.fusion = 'last'\n    return config\n"
    )
    with pytest.raises(SystemExit):
        flags.load_config(path)
    said = capsys.readouterr().err
    assert said.startswith(f"{path}, line 6: Could not override field 'fusion'")
    assert "docs/configs.md" in said


def _model(name, *changes):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    config.lock().update_from_flattened_dict(dict(changes))
    return objectives.make(config).model


THROWN = ("masking.throw_ratio", 0.5)
LAST = ("model.fusion.kind", "last")


@pytest.mark.parametrize("name, changes", [
    ("vitb_cross", [LAST]), ("vitb_cross", [LAST, ("model.decoder.kind", "mae")]),
    ("vitb_mae", [("model.decoder.kind", "cross")]),
    ("vitb_mae", [
        ("model.decoder.kind", "cross"), ("model.fusion.kind", "inter_block")
    ]),
    *(
        (name, [("model.aggregator.kind", kind), THROWN])
        for name in ("vitb_mae", "vitb_cross75")
        for kind in ("conv", "convnext", "pool", "transformer")
    ),
    *(
        (name, [("model.aggregator.kind", "none")])
        for name in ("vitb_mae_prmim", "vitb_cross_prmim")
    ),
], ids=str)
def test_a_kind_can_be_changed_by_itself(name, changes):
    before, after = _model(name), _model(name, *changes)
    assert after != before
    # And what the other kinds have is there when one goes back.
    back = [
        (option, runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]())
        for option, _ in changes
    ]
    back = [(option, _get(config, option)) for option, config in back]
    assert _model(name, *changes, *back) == before


def _get(config, name):
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("name, changes, message", [
    ("vitb_cross", [LAST, ("model.fusion.maps", (0,))],
     "fusion.maps=(0,) is an option of fusion.kind='inter_block' or 'multi_level' or "
     "'taps', "
     "and does nothing with fusion.kind='last'; leave it at None."),
    ("vitb_cross", [LAST, ("model.fusion.input", False)], "leave it at True."),
    ("vitb_mae", [("model.decoder.self_attention", True)],
     "decoder.self_attention=True is an option of decoder.kind='cross'"),
    ("vitb_mae", [
        ("model.aggregator.kind", "transformer"), ("model.aggregator.kernel_size", 3),
     ], "aggregator.kernel_size=3 is an option of aggregator.kind='conv' or 'convnext' "
     "or 'pool', and does nothing with aggregator.kind='transformer'; leave it at 7."),
])
def test_an_option_that_was_meant_for_something_is_not_left_aside(
    name, changes, message
):
    with pytest.raises(ValueError) as error:
        _model(name, *changes)
    assert message in str(error.value)


@pytest.mark.parametrize("option, value, message", [
    ("depht", 3, "Unknown option decoder.depht=3. Known: depth, dim, mlp_ratio, norm, "
     "num_heads, self_attention."),
    ("grid", (1, 1), "decoder.grid=(1, 1) is no option: it follows from the rest"),
    ("dim", None, "decoder.kind='cross' needs dim; set config.model.decoder.dim."),
])
def test_a_group_of_a_config_file_has_known_options(option, value, message):
    config = digits_cross.get_config()
    config.model.decoder = ConfigDict(config.model.decoder.to_dict() | {option: value})
    with pytest.raises(ValueError) as error:
        objectives.make(config)
    assert message in str(error.value)


def test_what_other_kinds_must_have_is_left_aside():
    class Linear(nn.Module):
        dim: int

    group = dict(kind="linear", dim=8, depth=3, num_heads=2, self_attention=False)
    table = decoders.DECODERS | {"linear": Linear}
    assert kinds.make("decoder", table, group, grid=(2, 2)) == Linear(dim=8)
    with pytest.raises(ValueError, match="self_attention=True is an option of"):
        kinds.make("decoder", table, group | dict(self_attention=True))
