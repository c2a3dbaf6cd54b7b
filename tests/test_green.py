"""GreenMIM: a Swin of visible units, masks that images share, a decoder without class
token."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossmae_jax
from benchmarks import windows as windows_benchmark
from configs import common
from crossmae_jax import train
from crossmae_jax.convert import spellings
from crossmae_jax.objectives.pretrain import Pretrain
from tests import drawn, tiny
from tests.test_configs import ROOT, load
from tests.test_models import make_config
from tests.test_swin import compare_initial_values

PRMIM = dict(
    masking__throw_ratio=0.5, masking__retain="furthest",
    model__aggregator__kind="conv",
)


def green(**changes):
    """Returns a small config of 4 x 8 units of 8 pixels; `a__b=c` sets config.a.b."""
    config = make_config()
    config.model = common.green("W8-D2.2.1-H1.2.2/2", window=4)
    config.model.update(dtype="float32", remat="none")
    config.model.decoder.update(dim=16, num_heads=2)
    config.masking = common.masking(pred_ratio=0.75) | dict(noise="shared", together=4)
    config.data.image_size = (32, 64)
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def _batch(num, first=0):
    pixels = np.random.default_rng(0).integers(0, 256, (num, 32, 64, 3), np.uint8)
    samples = first + jnp.arange(num, dtype=jnp.uint32)
    return {"image": jnp.asarray(pixels), "sample": samples}


def test_images_of_a_device_share_a_mask_that_their_numbers_decide():
    objective = Pretrain(green())
    assert objective.counts == (8, 24, 0)
    key = jax.random.key(5)
    keep = np.asarray(objective.sample(key, _batch(8)).keep)
    assert (keep[:4] == keep[:1]).all() and (keep[4:] == keep[4:5]).all()
    assert (keep[0] != keep[4]).any()
    # A micro-batch, or what comes after a restart: the numbers are the same.
    again = np.asarray(objective.sample(key, _batch(4, first=4)).keep)
    np.testing.assert_array_equal(again, keep[4:])
    other = np.asarray(objective.sample(key, _batch(4, first=8)).keep)
    assert (other != keep[:4]).any()


@pytest.mark.parametrize("changes", [{}, PRMIM], ids=["plain", "prmim"])
def test_a_loss_does_not_depend_on_who_shares_a_mask_with_whom(changes):
    objective, alone = (
        Pretrain(green(**changes, masking__noise=noise, masking__together=together))
        for noise, together in (("shared", 4), ("uniform", 1))
    )
    variables = drawn.variables(objective.init)
    batch = _batch(8)
    images, ids = objective.normalize(batch), objective.sample(jax.random.key(1), batch)

    def grad(each):
        return jax.jit(jax.value_and_grad(
            lambda p: each.masked_loss({**variables, "params": p}, images, ids)[0]
        ))(variables["params"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
        grad(objective), grad(alone),
    )


def test_the_decoder_has_no_class_token_and_each_unit_its_own_position():
    objective = Pretrain(green())
    variables = drawn.variables(objective.init)
    assert "cls_token" not in variables["params"]["encoder"]
    batch = _batch(4)
    images, ids = objective.normalize(batch), objective.sample(jax.random.key(1), batch)
    apply = jax.jit(objective.model.apply)
    before = apply(variables, images, ids)["pixels"]
    assert before.num == 24 and not before.has_cls
    # The order in which visible units come says nothing.
    other = ids._replace(keep=ids.keep[:, ::-1])
    np.testing.assert_allclose(
        before.values, apply(variables, images, other)["pixels"].values, atol=1e-5
    )
    hidden = jnp.zeros((4, 32), bool).at[jnp.arange(4)[:, None], ids.pred].set(True)
    hidden = jnp.repeat(
        jnp.repeat(hidden.reshape(4, 4, 8), 8, axis=1), 8, axis=2
    )[..., None]
    np.testing.assert_array_equal(
        before.values, apply(variables, jnp.where(hidden, 0, images), ids)[
            "pixels"
        ].values,
    )


def test_initial_values_follow_greenmims_code():
    golden = Path(__file__).parent / "golden" / "init_schemes.json"
    expected = json.loads(golden.read_text())["greenmim_swin"]
    shapes = {name: scheme["shape"] for name, scheme in expected.items()}
    dim, channels, patch, _ = shapes["encoder.patch_embed.proj.weight"]
    tables = sorted(
        (name, shape) for name, shape in shapes.items() if name.endswith("bias_table")
    )
    stages = [name.split(".")[2] for name, _ in tables]
    depths = [stages.count(stage) for stage in sorted(set(stages))]
    heads = [dict(zip(stages, tables))[stage][1][1] for stage in sorted(set(stages))]
    wide = shapes["mask_token"][-1]
    grid = round(shapes["decoder_pos_embed"][1] ** 0.5)
    side = patch << len(depths) - 1
    size = "W{}-D{}-H{}/{}".format(
        dim, *(".".join(map(str, part)) for part in (depths, heads)), patch
    )
    hidden = shapes["encoder.layers.0.blocks.0.mlp.fc1.bias"][0]
    config = green(
        model__encoder__size=size, model__encoder__mlp_ratio=hidden / dim,
        model__encoder__window=(round(tables[0][1][0] ** 0.5) + 1) // 2,
        model__decoder__dim=wide, data__image_size=(grid * side,) * 2,
        model__decoder__mlp_ratio=shapes["decoder_blocks.0.mlp.fc1.bias"][0] / wide,
        model__decoder__depth=sum(n.endswith("norm1.bias") and n.startswith("decoder")
                                  for n in shapes),
    )
    table = spellings.simmim_swin(tuple(depths))[:-2] + tuple(
        row for row in spellings.MAE if row.ours.startswith("decoder/")
    )
    compare_initial_values(config, expected, table)


def test_the_recipes_are_its_codes():
    expected = {  # epochs, peak rate, window, together, counts
        "swinb_green": (200, 2.4e-3, 7, 512, (12, 37, 0)),
        "swinb_green_prmim": (100, 2.4e-3, 7, 512, (12, 13, 24)),
        "swinl_green": (800, 8e-4, 14, 256, (12, 37, 0)),
    }
    for name, (epochs, rate, window, together, counts) in expected.items():
        config = load(ROOT / "configs" / f"{name}.py")
        peak = config.optim.base_lr * config.data.batch_size / 256
        assert (config.epochs, config.model.encoder.window) == (epochs, window)
        assert peak == pytest.approx(rate) and config.optim.warmup_epochs == 40
        assert config.masking.together == together
        assert (config.optim.decay_tokens, config.optim.b2) == (False, 0.95)
        objective = Pretrain(config)
        assert objective.counts == counts and objective.patch_size == 32
        assert bool(objective.model.aggregators) == bool(counts[2])
        decoder = objective.model.decoder
        assert (decoder.dim, decoder.depth, decoder.num_heads) == (512, 1, 16)
    tuned = load(ROOT / "configs" / "finetune_swinb_green.py")
    assert (tuned.data.batch_size, tuned.optim.layer_decay) == (768, 0.9)


def test_a_run_on_several_devices_is_evaluated_and_looked_at(digits_dir, tmp_path):
    config = tiny.config(
        digits_dir, dict(
            knn=common.knn(every_epochs=0.0, pools=("mean",))["knn"],
            reconstruction=dict(every_epochs=0.0, num_images=4),
        ),
        data__image_size=(24, 24),
    )
    config.model = common.green("W8-D2.1-H1.2/2", window=3)
    config.model.update(dtype="float32", remat="selective")
    config.model.decoder.update(dim=16, num_heads=2)
    config.masking = common.masking(pred_ratio=0.75) | dict(
        noise="shared", together=96 // jax.device_count()
    )
    config.optim.lr_scale = "none"
    train.run(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 < results["eval/knn/top1"] <= 1 and results["eval/reconstruction/psnr"] > 0
    model = crossmae_jax.load(tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 1), np.uint8)
    assert model.encode(images).shape == (2, 16)
    pictures = model.reconstruct(images)
    assert pictures.mask.sum(1).tolist() == [27] * 2
    maps = model.attention_maps(images)
    assert maps.weights.shape == (1, 2, 2, 36, 36) and (maps.queries >= 0).all()
    magnitudes = model.attention_magnitudes(images)
    assert (magnitudes.num_visible, magnitudes.num_masked) == (9, 27)
    np.testing.assert_allclose(
        magnitudes.share, maps.weights[:, :, :, 9:, :9].sum(-1).mean((2, 3)).T,
        atol=1e-5,
    )
    blind = model.reconstruct(images, without="visible")
    assert np.abs(blind.prediction - pictures.prediction).max() > 1e-4
    assert len(model.after_each_block(images)) == 2
    assert model.predict(images[:1], np.flatnonzero(pictures.mask[0])[:3]).shape == (
        1, 3, 16
    )


def test_a_batch_that_masks_do_not_divide_is_refused():
    objective = Pretrain(green(masking__together=3))
    with pytest.raises(ValueError, match="masking.together=3 does not divide a batch"):
        objective.sample(jax.random.key(0), _batch(8))


def test_groups_take_fewer_products_than_one_masked_attention(capsys):
    windows_benchmark.main(["--size=W8-D1.1.1.1-H1.1.1.1/4", "--images=2"])
    first = capsys.readouterr().out.splitlines()[2].split("|")
    assert first[1].strip() == "1" and "31 of 49, kept" in first[5]
    assert float(first[6]) < float(first[3]) and float(first[7]) < float(first[4])
