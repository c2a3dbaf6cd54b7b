"""What other models keep apart is computed into our tensors: the model is the same."""

import json

import numpy as np
import pytest
import safetensors.torch

import crossmae_jax
from crossmae_jax import convert
from crossmae_jax.convert import starting
from crossmae_jax.convert.names import ConversionError
from tests import interop
from tests.interop import timm, torch
from tests.test_assumed import _plan

HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TOLERANCE = 3e-5  # of the largest value
CHECKED = "check: 2 random images through timm"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def _outputs(model):
    """Returns what PyTorch makes of the images: tokens and logits."""
    inputs = torch.tensor((IMAGES / 127.5 - 1).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        return model.forward_features(inputs).numpy(), model(inputs).numpy()


def _agree(ours, theirs):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * scale)


def _probe(pool="token"):
    """A model as MAE's script for linear probes leaves it, trained statistics."""
    arguments = interop.SMALL | dict(img_size=32, num_classes=5, global_pool=pool)
    model = timm.models.vision_transformer.VisionTransformer(**arguments)
    norm = torch.nn.BatchNorm1d(32, affine=False, eps=1e-6)
    model.head = torch.nn.Sequential(norm, model.head)
    interop._randomise(model)
    random = torch.Generator().manual_seed(1)
    norm.running_mean.copy_(torch.randn(32, generator=random))
    # Some close to 0, where the epsilon of 1e-6 and no other gives the logits.
    norm.running_var.copy_(10 ** torch.linspace(-6, 1, 32))
    norm.num_batches_tracked.fill_(7)
    return model


@pytest.mark.parametrize("pool", ("token", "avg"))
def test_the_batch_norm_of_a_linear_probe_is_folded_into_its_head(tmp_path, pool):
    model = _probe(pool)
    path = tmp_path / "checkpoint-89.pth"
    torch.save({"model": model.state_dict(), "epoch": 89}, path)
    loaded = crossmae_jax.load(path, num_heads=2, **HALF)
    tokens, logits = _outputs(model)
    _agree(loaded.tokens(IMAGES), tokens)
    _agree(loaded.logits(IMAGES), logits)
    assert "batch_stats" not in loaded.variables
    done = convert.import_weights(path, tmp_path / "in", num_heads=2)
    assert "folded: the head's batch norm, into the head" in done.lines
    assert any(line.startswith(CHECKED) and "logits" in line for line in done.lines)
    assert "head_norm" not in done.card.model


def test_a_batch_norm_that_is_cut_or_has_a_scale_is_listed(tmp_path):
    state, path = _probe().state_dict(), tmp_path / "probe.pth"
    scaled = {**state, "head.0.weight": torch.ones(32)}
    torch.save({"model": scaled}, path)
    with pytest.raises(ConversionError, match=r"only in the file \(1\):\s+head.0.wei"):
        convert.open_weights(path, num_heads=2)
    del state["head.0.running_var"]
    torch.save({"model": state}, path)
    with pytest.raises(ConversionError, match="head.0.running_mean"):
        convert.open_weights(path, num_heads=2)


def _deit3(**changes):
    arguments = interop.SMALL | dict(
        img_size=32, num_classes=5, no_embed_class=True, init_values=0.1
    )
    return interop._randomise(
        timm.models.vision_transformer.VisionTransformer(**arguments | changes)
    )


def _by_their_authors(state):
    """DeiT's own names of the layer scale."""
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in state.items()
    }


@pytest.mark.parametrize("renamed", (False, True))
def test_deit_iii_is_held_whole(tmp_path, renamed):
    model, path = _deit3(), tmp_path / "deit_3.pth"
    state = model.state_dict()
    assert state["pos_embed"].shape[1] == 16  # and none for the class token
    torch.save({"model": _by_their_authors(state) if renamed else state}, path)
    facts = dict(num_heads=2, image_size=(32, 32))
    with pytest.raises(ConversionError, match="15 positions.*--image_size=32,32"):
        convert.open_weights(path, num_heads=2)
    loaded = crossmae_jax.load(path, **facts, **HALF)
    tokens, logits = _outputs(model)
    _agree(loaded.tokens(IMAGES), tokens)
    _agree(loaded.logits(IMAGES), logits)
    lines = convert.import_weights(path, tmp_path / "in", **facts).lines
    assert any("16 rows, none of them for the class token" in line for line in lines)
    assert any("the layer scale at 4 places" in line for line in lines)
    assert any(line.startswith(CHECKED) for line in lines)


def test_a_row_for_the_class_token_is_not_taken_for_one_that_lacks(tmp_path):
    """16 rows: of 4 x 4 patches, or of 3 x 5 and the class token."""
    model, path = _deit3(no_embed_class=False, img_size=(24, 40)), tmp_path / "vit.pth"
    torch.save({"model": model.state_dict()}, path)
    weights = convert.open_weights(path, num_heads=2, image_size=(24, 40))
    assert weights.card.encoder.grid == (3, 5)
    np.testing.assert_array_equal(
        weights.tensors["encoder/pos_embed"].read(),
        model.pos_embed.detach().numpy()[0],
    )


def test_a_size_to_work_at_tells_nothing_of_a_table_that_is_whole(tmp_path):
    """10 rows: of 3 x 3 patches and the class token, not of the 2 x 5 that are wanted.
    """
    model, path = _deit3(no_embed_class=False, img_size=24), tmp_path / "vit.pth"
    torch.save(model.state_dict(), path)
    loaded = crossmae_jax.load(path, num_heads=2, image_size=(16, 40), **HALF)
    table = np.asarray(loaded.variables["params"]["encoder"]["pos_embed"]).squeeze()
    theirs = model.pos_embed.detach().numpy()[0]
    assert table.shape == (11, 32)
    np.testing.assert_allclose(table[0], theirs[0], atol=1e-6)


def test_timms_folder_of_a_deit_iii_is_read(tmp_path):
    model = _deit3()
    (tmp_path / "config.json").write_text(json.dumps(dict(
        architecture="vit_tiny_patch16_224", num_classes=5,
        model_args=interop.SMALL | dict(
            img_size=32, no_embed_class=True, init_values=0.1, qkv_bias=True,
            drop_path_rate=0.1, num_classes=5,
        ),
        pretrained_cfg=dict(input_size=None) | {k: list(v) for k, v in HALF.items()},
    )))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = crossmae_jax.load(tmp_path)
    _agree(loaded.logits(IMAGES), _outputs(model)[1])


def test_training_starts_from_a_table_without_a_class_row(tmp_path):
    path = tmp_path / "deit_3.pth"
    model = _deit3(num_classes=0)
    torch.save(model.state_dict(), path)
    size = ["model.encoder.size=W32-D2-H2/8", "data.image_size=(32, 32)"]
    plan = _plan(path, "digits_mae", *size)
    assert isinstance(plan, starting.Start)
    table = plan.tensors["encoder/pos_embed"].read()
    np.testing.assert_array_equal(table[0], 0)
    np.testing.assert_array_equal(table[1:], model.pos_embed.detach().numpy()[0])
    notes = [line.split("note")[1].strip() for line in plan.report if "note" in line]
    assert [line.split(":")[0] for line in notes] == ["folded", "positions"]
