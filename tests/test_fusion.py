"""Multi-level fusion: a closed form, its settings, and PR-MIM on it by settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import crossmae_jax
from crossmae_jax import __main__ as front_door
from crossmae_jax import convert, visualize
from crossmae_jax.models import fusion
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.tokens import Encoded, Tokens
from tests import drawn
from tests.saved_runs import save_run
from tests.test_models import make_config

MFF = dict(
    model__decoder__kind="mae", model__fusion__kind="multi_level",
    model__fusion__maps=(0, 2), masking__pred_ratio=0.75,
)


def test_shallow_blocks_are_projected_and_weighted_into_the_last():
    rng = np.random.default_rng(0)
    maps = [jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32) for _ in range(4)]
    tokens = tuple(Tokens(x, None, (2, 2), has_cls=True) for x in maps)
    module = fusion.MultiLevel(encoder_depth=3, maps=(-1, 0))
    assert module.used_maps == (1, 3)
    variables = module.init(jax.random.key(0), Encoded(tokens[-1], tokens))
    params = variables["params"]
    assert np.all(params["weights"] == 1)  # so the shares are equal at first
    params["weights"] = jnp.log(jnp.asarray([3.0, 1.0])).reshape(2, 1, 1, 1)
    (context,) = module.apply(variables, Encoded(tokens[-1], tokens))
    projected = maps[1] @ params["proj_0"]["kernel"]  # its bias is 0
    mixture = 0.75 * projected + 0.25 * maps[3]
    centred = mixture - mixture.mean(-1, keepdims=True)
    expected = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(context.sequence, expected, atol=1e-5)
    assert context.has_cls and context.grid == (2, 2)


def test_the_blocks_are_a_choice_that_nobody_makes_in_silence():
    changes = MFF | dict(model__fusion__maps=None)
    with pytest.raises(ValueError, match=r"set config\.model\.fusion\.maps, for ViT-B"):
        Pretrain(make_config(**changes))


@pytest.mark.parametrize("changes", [
    {}, dict(
        masking__throw_ratio=0.5, masking__retain="furthest",
        model__aggregator__kind="conv", model__aggregator__kernel_size=3,
        model__aggregator__visible="decoder",
    ),
], ids=["MFF", "PR-MIM on MFF"])
def test_every_part_that_it_trains_learns(changes):
    objective = Pretrain(make_config(**(MFF | changes)))
    variables = drawn.variables(objective.init)
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    batch = {"image": jnp.asarray(image), "sample": jnp.arange(2, dtype=jnp.uint32)}

    def loss(params):
        variables_of_step = {**variables, "params": params}
        return objective.loss(variables_of_step, batch, jax.random.key(1))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert np.isfinite(value)
    for part in ("encoder", "fusion", "decoder", *(["aggregator"] if changes else [])):
        for leaf in jax.tree.leaves(gradients[part]):
            assert np.abs(leaf).max() > 0, part
    weights = gradients["fusion"]["weights"]
    assert abs(float(weights.sum())) < 1e-6  # shares sum to one, whatever the weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(
        tmp_path_factory.mktemp("runs") / "mff", "vitb_mff",
        "model.encoder.size=W16-D4-H2/16", "model.fusion.maps=(0, 2, 3)",
    )


def test_its_shares_can_be_looked_at(run, tmp_path):
    model = crossmae_jax.load(run)
    shares = model.inter_block_weights()
    np.testing.assert_allclose(shares, np.full((1, 3), 1 / 3))
    assert model.mixed_maps() == (1, 3, 4)
    picture = visualize.inter_block_weights(
        {"at first": shares}, tmp_path / "shares.png", maps=model.mixed_maps(),
        blocks=("all",),
    )
    assert picture.exists()


def test_attention_of_its_decoder_is_measured(run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (230, 230, 3), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "one.png")
    assert not front_door.main([
        "attention", f"--checkpoint={run}", f"--dir={tmp_path / 'images'}",
        f"--to={tmp_path / 'found'}",
    ])
    assert "| without visible |" in capsys.readouterr().out


def test_only_our_file_holds_it_whole(run, tmp_path, capsys):
    model = crossmae_jax.load(run)
    assert front_door.main([
        "convert", "export", str(run), "--format=mae", f"--to={tmp_path / 'all.pth'}"
    ]) == 1
    said = capsys.readouterr().err
    for name in ("norm/bias", "norm/scale", "proj_0/kernel", "proj_1/bias", "weights"):
        assert f"fusion/{name}" in said
    assert "with parts='encoder', or everything with format 'safetensors'" in said
    convert.export_weights(run, tmp_path / "part.pth", format="mae", parts="encoder")
    done = convert.export_weights(
        run, tmp_path / "hf", format="huggingface", fresh_norm=True, check=False
    )
    assert "left out: fusion, decoder (huggingface has no place for them)" in done.lines
    convert.export_weights(run, tmp_path / "all.safetensors", format="safetensors")
    image = np.zeros((1, 224, 224, 3), np.uint8)
    whole = crossmae_jax.load(tmp_path / "all.safetensors")
    np.testing.assert_array_equal(whole(image), model(image))
