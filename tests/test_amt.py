"""AMT: what the model looks at in the training images decides what is hidden."""

import io
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import digits_amt, vitb_simmim_amt
from crossmae_jax import errors, job, masking, sampling, train
from crossmae_jax.checkpoints import checkpointer, space
from crossmae_jax.commands import cost as cost_command
from crossmae_jax.cost import counting
from crossmae_jax.data import order, pipeline, sources, transforms, weights
from crossmae_jax.data.fields import View
from crossmae_jax.evals import attention_maps, features
from crossmae_jax.models import vit, watching
from crossmae_jax.objectives.pretrain import Pretrain
from tests import tiny

# 15 steps: maps are made after the 3rd, 6th, 9th and 12th, of 16 patches an image.
AMT = dict(
    epochs=1.0, masking__mask_ratio=0.85, masking__pred_ratio=0.45,
    masking__noise="weighted", masking__rounding="ceil", data__transform="weighted",
    data__weights_grid=(4, 4), attention_maps__every_epochs=0.2,
    checkpoint__every_epochs=0.46, checkpoint__keep=3, log_every_steps=1,
)


def _config(digits_dir, **changes):
    return tiny.config(digits_dir, **AMT | changes)


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("amt") / "run"
    config = _config(digits_dir)
    train.run(config, workdir)
    return config, workdir


def _file(workdir, step):
    return workdir / "attention_maps" / f"step_{step:08d}.npy"


def test_maps_are_the_last_blocks_attention_in_whole_images(finished):
    config, workdir = finished
    maps = np.load(_file(workdir, 12))
    assert maps.shape == (1442, 4, 4) and maps.dtype == np.float16
    assert maps.min() >= 0 and 0.5 < maps.max() <= 1
    # By hand, of the state, which is saved before they are made.
    objective, source = Pretrain(config), sources.make_source(config.data, "train")
    params = jax.tree.map(jnp.asarray, checkpointer.restore_variables(
        workdir / "checkpoints", step=12
    )["params"])
    whole = View((8, 8), (0.0, 0.0, 8.0, 8.0), False, (16, 16), (16, 16))
    stored = [io.BytesIO(source[number]["image"]) for number in (0, 7, 1441)]
    images = np.stack([whole.pixels((Image.open(file),)) for file in stored])
    tokens = objective.model.apply(
        {"params": params, "constants": objective.init(jax.random.key(0))["constants"]},
        objective.normalize({"image": jnp.asarray(images)}), method="encode",
    ).maps[1].sequence  # the input of the second and last block
    block = params["encoder"]["blocks_1"]
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    normed = normed * block["norm1"]["scale"][None, None]
    normed = normed + block["norm1"]["bias"][None, None]
    qkv = normed @ block["attn"]["qkv"]["kernel"]
    qkv = (qkv + block["attn"]["qkv"]["bias"][None, None]).reshape(3, 17, 3, 2, 8)
    logits = jnp.einsum("bhd,bkhd->bhk", qkv[:, 0, 0], qkv[:, :, 1]) / np.sqrt(8)
    heads = np.asarray(jax.nn.softmax(logits, axis=-1))[:, :, 1:]
    low, high = heads.min(-1, keepdims=True), heads.max(-1, keepdims=True)
    expected = ((heads - low) / (high - low)).mean(1).reshape(3, 4, 4)
    found = maps[[0, 7, 1441]]
    np.testing.assert_allclose(found, expected, atol=1e-3)  # half precision


def test_a_map_takes_a_relative_bias_into_account_whatever_is_computed_again():
    options = dict(size="W8-D2-H2/4", image_size=(8, 8), relative_bias="shared")
    encoder = vit.ViT(**options, remat="full")
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    variables = encoder.init(jax.random.key(1), images)
    table = variables["params"]["relative_bias"]["table"]
    drawn = 3 * jax.random.normal(jax.random.key(2), table.shape)
    variables["params"]["relative_bias"]["table"] = drawn
    found = watching.attention_map(encoder, variables, images)
    with watching.recording() as recorded:
        vit.ViT(**options).apply(variables, images)
    heads = np.asarray(recorded["blocks_1/attn"])[:, :, 0, 1:]
    heads = heads - heads.min(-1, keepdims=True)
    heads = heads / heads.max(-1, keepdims=True)
    np.testing.assert_allclose(found, heads.mean(1), atol=1e-6)
    variables["params"]["blocks_1"]["attn"]["qkv"]["kernel"] *= 0.0
    variables["params"]["relative_bias"]["table"] = 0 * drawn  # all patches alike
    assert (watching.attention_map(encoder, variables, images) == 0).all()


def test_maps_cost_seconds_and_memory_that_are_logged(finished):
    _, workdir = finished
    rows = [row for row in tiny.lines(workdir) if attention_maps.SECONDS in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert all(row["eval/attention_maps/bytes"] == 1442 * 16 * 2 for row in rows)
    assert all(row[attention_maps.SECONDS] > 0 for row in rows)
    spent = json.loads((workdir / "time.json").read_text())["seconds"]
    logged = sum(row[attention_maps.SECONDS] for row in rows)
    assert spent["refresh"] == pytest.approx(logged, rel=0.5)
    steps = [row for row in tiny.lines(workdir) if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 16))


def _names(workdir):
    """Returns the files of maps, each of which has its digest beside it."""
    names = sorted(path.name for path in (workdir / "attention_maps").iterdir())
    assert names[1::2] == [f"{name}.sha256" for name in names[::2]]
    return names[::2]


def test_files_are_removed_that_no_checkpoint_goes_on_from(finished):
    _, workdir = finished
    # When the last was made there were checkpoints of the steps 7, 9 and 12.
    assert _names(workdir) == [_file(workdir, step).name for step in (6, 9, 12)]


def test_room_for_maps_is_looked_for_before_the_first_step(
    finished, tmp_path, monkeypatch
):
    config, workdir = finished
    usage = shutil.disk_usage(tmp_path)._replace(free=40_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(errors.SetupError) as refused:
        train.run(config, tmp_path / "run")
    # Four, for three checkpoints and the run, of 2 bytes a patch.
    size = 2 * 1442 * 4 * 4
    needed = f", attention maps of {space.shown(4 * size)} and pictures need "
    assert needed in str(refused.value)
    with pytest.raises(errors.SetupError) as refused:
        train.run(config, workdir)  # which has three
    assert f", attention maps of {space.shown(size)} and " in str(refused.value)


@pytest.mark.parametrize("stop", ["SIGTERM", "crash"])
def test_a_run_that_ends_while_maps_are_made_goes_on_to_the_same_bits(
    finished, tmp_path, monkeypatch, capsys, stop
):
    config, undisturbed = finished
    to_host, calls, run = features.to_host, [], tmp_path / "run"

    def disturbed(tree):
        calls.append(len(calls))
        if len(calls) == 2 * 16 + 3:  # in the midst of the third pass: 16 batches each
            if stop == "crash":
                raise RuntimeError("the machine fails")
            os.kill(os.getpid(), signal.SIGTERM)
        return to_host(tree)

    monkeypatch.setattr(features, "to_host", disturbed)
    with pytest.raises(SystemExit if stop == "SIGTERM" else RuntimeError) as ended:
        train.run(config, run)
    assert stop == "crash" or ended.value.code == 75
    assert _names(run) == ["step_00000003.npy", "step_00000006.npy"]
    train.run(config, run)
    assert "RESUMED at step 9 of 15" in capsys.readouterr().out
    assert len(calls) == 35 + 2 * 16 and _names(run) == _names(undisturbed)
    np.testing.assert_array_equal(
        *(np.load(_file(directory, 12)) for directory in (run, undisturbed))
    )
    ours, theirs = (tiny.final_state(config, d, 15) for d in (run, undisturbed))
    tiny.assert_same_bits(ours, theirs)


def test_a_run_goes_on_in_the_middle_of_a_leg_by_its_file(finished, tmp_path, capsys):
    config, undisturbed = finished
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / "15")  # the one before is of step 14
    made = _file(run, 12).read_bytes()
    _file(run, 12).unlink()
    with pytest.raises(errors.SetupError, match="be read from .*step_00000012.npy"):
        train.run(config, run)
    _file(run, 12).write_bytes(made[:-1] + bytes([made[-1] ^ 1]))
    with pytest.raises(errors.FileError, match="step_00000012.npy is not as it was wr"):
        train.run(config, run)
    _file(run, 12).write_bytes(made)
    listed = run / "attention_maps" / "step_00000012.npy.sha256"
    written = listed.read_bytes()
    for content in (b"", b"\xff\xfe", None):
        listed.unlink() if content is None else listed.write_bytes(content)
        what = "lacks step_00000012" if content is None else "is not as it was written"
        with pytest.raises(errors.FileError, match=what):
            train.run(config, run)
    listed.write_bytes(written)
    before = _file(run, 12).stat().st_mtime_ns
    capsys.readouterr()
    train.run(config, run)
    assert "RESUMED at step 14 of 15" in capsys.readouterr().out
    assert _file(run, 12).stat().st_mtime_ns == before
    ours, theirs = (tiny.final_state(config, d, 15) for d in (run, undisturbed))
    tiny.assert_same_bits(ours, theirs)


def test_a_file_that_is_gone_or_of_other_images_is_refused(finished, digits_dir):
    config, workdir = finished
    source = sources.make_source(config.data, "train")
    with pytest.raises(ValueError, match="cannot be read from .*step_00000003.npy"):
        weights.WithWeights(source, _file(workdir, 3))
    half = workdir.parent / "half.npy"
    half.write_bytes(_file(workdir, 9).read_bytes()[:-1])
    with pytest.raises(ValueError, match="cannot be read from .*half.npy"):
        weights.WithWeights(source, half)
    np.save(workdir.parent / "few.npy", np.ones((7, 4, 4), np.float16))
    with pytest.raises(ValueError, match=r"shape \(7, 4, 4\), but there are 1442 im"):
        weights.WithWeights(source, workdir.parent / "few.npy")


def test_what_is_heavy_in_a_file_is_masked_in_the_batches(digits_dir, tmp_path):
    """The left half weighs nothing, the right all: the crop decides over a patch."""
    config = _config(digits_dir, data__crop_scale=(0.9, 1.0))
    source, maps = sources.make_source(config.data, "train"), np.zeros((1442, 2, 2))
    maps[:, :, 1] = 1
    np.save(tmp_path / "maps.npy", maps.astype(np.float16))
    weighted = weights.WithWeights(source, tmp_path / "maps.npy")
    assert weighted.kinds == {"label", "weights"} and len(weighted) == len(source)
    with pipeline.train_batches(
        weighted, config.data, seed=0, start_step=0, num_steps=1
    ) as batches:
        batch = next(batches)
    grid = batch["weights"].reshape(-1, 4, 4)
    np.testing.assert_allclose(grid[:, :, 3], 1, atol=1e-6)
    np.testing.assert_allclose(grid[:, :, 0], 0, atol=1e-6)
    sampler = sampling.make(config.masking, grid=(4, 4))
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    ids = sampler.draw(jax.random.key(0), batch)
    assert (ids.keep.shape[1], ids.pred.shape[1]) == (3, 7)
    columns = np.asarray(ids.pred) % 4
    assert (columns >= 2).mean() > 0.95 and (np.asarray(ids.keep) % 4 < 2).all()


def test_weights_are_cut_and_mirrored_by_the_crops_own_box():
    """Pixels that show the weights: what the crop sees of both must agree."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(
        rng.uniform(0, 1, (3, 4)).astype(np.float32)
    ).resize((28, 20), Image.Resampling.BILINEAR))
    picture = np.kron(np.round(255 * smooth), np.ones((8, 8)))
    picture = picture.astype(np.uint8)[..., None]
    config = digits_amt.get_config()
    config.data.update(image_size=(64, 64), crop_scale=(0.1, 0.6), flip=True)
    transform = transforms.make(config.data)
    assert transform.fields["weights"].shape == (64,)
    for sample in range(20):
        seen = transform(
            {"name": "x", "image": picture, "weights": smooth},
            order.draws(sample, seed=1),
        )
        shown = seen["image"].reshape(8, 8, 8, 8).mean((1, 3)) / 255
        np.testing.assert_allclose(seen["weights"].reshape(8, 8), shown, atol=0.02)
    unseen = transform({"name": "x", "image": picture, "weights": smooth}, None)
    assert (unseen["weights"] == 1).all()
    without = transform({"name": "x", "image": picture}, order.draws(0, seed=1))
    assert (without["weights"] == 1).all()


def test_the_whole_image_is_squashed():
    config = digits_amt.get_config()
    config.data.update(transform="squashed", image_size=(4, 4))
    picture = np.zeros((4, 40, 1), np.uint8)
    picture[:, 20:] = 200
    seen = transforms.make(config.data)({"name": "x", "image": picture}, None)
    assert (seen["image"][:, 0] < 10).all() and (seen["image"][:, 3] > 190).all()
    assert "weights" not in seen


def test_patches_without_weight_are_visible_first_in_random_order():
    batch = {
        "sample": jnp.arange(4096, dtype=jnp.uint32),
        "weights": jnp.broadcast_to(jnp.asarray([0.0, 0, 0, 1])[None], (4096, 4)),
    }
    noise = masking.weighted(jax.random.key(0), batch, num=4)
    assert np.isfinite(noise).all()
    ranks = np.argsort(noise, axis=1)
    assert (ranks[:, 3] == 3).all()
    share = np.bincount(ranks[:, 0], minlength=4) / 4096
    np.testing.assert_allclose(share, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.03)


def test_legs_have_the_papers_phases(digits_dir):
    config = _config(digits_dir)
    total, steps_per_epoch = job.duration(config, 1442)
    for every, expected in ((0.2, [3, 6, 9, 12]), (0.34, [5, 10]), (0.5, [8])):
        config.attention_maps.every_epochs = every
        made = attention_maps.steps(
            config, steps_per_epoch=steps_per_epoch, total=total
        )
        assert made == expected  # and none after the last step
    before = attention_maps.before(digits_amt.get_config())
    counts = Pretrain(before).counts
    assert counts == (16, 48, 0) and before.masking.noise == "uniform"
    assert Pretrain(digits_amt.get_config()).counts == (10, 28, 0)  # 26 thrown


@pytest.mark.parametrize("changes, said", [
    ({"masking__noise": "uniform"}, "noise='uniform'.*every_epochs=0.2: AMT needs"),
    ({"data__transform": "classification"}, "transform='classification', attention"),
    ({"attention_maps__every_epochs": 0.0}, "attention_maps.every_epochs=0: AMT needs"),
    ({"attention_maps__every_epochs": 1.0}, "=1 in a run of 1 epochs: none would ever"),
    ({"attention_maps__every_epochs": 0.05}, "=0.05 is less than one of 15.02.* steps"),
    ({"attention_maps__every_epochs": -1.0}, "attention_maps.every_epochs=-1.0"),
    ({"data__weights_grid": (8, 8)}, "has 64 numbers for each sample, but 16 patches"),
    ({"data__weights_grid": (4,)}, r"weights_grid=\(4,\) with data.transform='weight"),
    ({"attention_maps__before": dict(
        mask_ratio=0.5, pred_ratio=0.6, throw_ratio=0.0)}, "pred_ratio=0.6 predicts 9"),
])
def test_what_contradicts_itself_is_said_before_the_first_step(
    digits_dir, tmp_path, changes, said
):
    config = _config(digits_dir, **changes)
    with pytest.raises(errors.SetupError, match=said):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists() or not any(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


def test_units_of_simmim_are_masked_by_their_weights():
    config = ConfigDict(vitb_simmim_amt.get_config())
    assert Pretrain(config).counts == (14 * 4, 22 * 4, 13 * 4)
    config.model.encoder.size, config.model.dtype = "W16-D1-H2/8", "float32"
    config.data.update(image_size=(48, 48), weights_grid=(3, 3))
    objective = Pretrain(config)
    heavy = np.zeros((2, 9), np.float32)
    heavy[:, [0, 4]] = 1
    batch = {
        "image": jnp.zeros((2, 48, 48, 3), jnp.uint8), "weights": jnp.asarray(heavy),
        "sample": jnp.arange(2, dtype=jnp.uint32),
    }
    ids = objective.sample(jax.random.key(0), batch)
    masked = np.asarray(masking.mask_of(ids.pred, num_patches=36)).reshape(2, 6, 6)
    assert masked[:, :2, :2].all() and masked[:, 2:4, 2:4].all()
    variables = objective.init(jax.random.key(1))
    loss, _ = objective.loss(variables, batch, jax.random.key(0))
    assert np.isfinite(loss)


def test_the_extra_passes_are_in_the_cost():
    counted = counting.count(digits_amt.get_config())
    assert counted.refresh[1:] == (3, 52.0)
    said = cost_command.report(counted).split("\n\n")[-1]
    assert said.startswith("Attention maps take 3 passes over all training images")
    assert "in 52 epochs, 0.0577\nan epoch, of 0.0150 GMACs an image: 4.4% of" in said
