"""Classification on the train loop: fine-tuning, partial tuning, linear probing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossmae_jax
from configs import digits_cross, finetune_digits
from crossmae_jax import convert, errors, train, train_step
from crossmae_jax.convert.names import without_collections
from crossmae_jax.evals import of_checkpoint
from crossmae_jax.objectives.classify import Classify
from crossmae_jax.optim import optimizers
from crossmae_jax.runs.workdir import read_config
from tests import drawn, image_files

TINY = {
    "epochs": 2.0, "log_every_steps": 4, "model.encoder.size": "W16-D2-H2/4",
    "optim.warmup_epochs": 0.2, "data.batch_size": 96, "data.image_size": (16, 16),
    "checkpoint.every_epochs": 0.4,
}
PROBE = {
    "model.pool": "cls", "model.head_norm": "batch", "model.head_std": 0.01,
    "tune_blocks": 0.0, "optim.name": "lars", "optim.layer_decay": 1.0,
    "optim.weight_decay": 0.0, "optim.base_lr": 60.0, "augment.label_smoothing": 0.0,
    "augment.erasing": 0.0,
}


def make_config(digits_dir=None, **changes):
    config = finetune_digits.get_config()
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(TINY | {"data.data_dir": digits_dir} | changes)
    return config


def make_pretraining(digits_dir):
    """Returns the config of a short pre-training, evaluated as the digits are."""
    config = digits_cross.get_config()
    config.update_from_flattened_dict(TINY | {
        "data.data_dir": digits_dir, "baselines": False, "model.decoder.dim": 16,
        "model.decoder.depth": 1, "model.decoder.num_heads": 2, "epochs": 1.0,
    })
    return config


@pytest.fixture(scope="module")
def pretrained(digits_dir, tmp_path_factory):
    """A run of pre-training."""
    config = make_pretraining(digits_dir)
    config.evals = {}
    directory = tmp_path_factory.mktemp("runs") / "pretrained"
    train.run(config, directory)
    return directory


def weights_of(directory, **kwargs):
    return without_collections(crossmae_jax.load(directory, **kwargs).variables)


def test_from_pre_training_to_a_classifier_in_one_line(
    digits_dir, pretrained, tmp_path, capsys
):
    config = make_config(
        digits_dir, init_from=str(pretrained), augment__mixup=0.8, augment__cutmix=1.0,
        data__randaug_ops=2,
    )
    run = tmp_path / "run"
    found = train.run(config, run)
    output = capsys.readouterr().out
    assert "loaded   encoder" in output
    assert "new      fc_norm (2 tensors), head (2 tensors); drawn at random" in output
    assert "unused   fusion" in output
    assert "(355/355 images)" in output
    assert found["eval/accuracy/top1"] <= found["best/eval/accuracy/top1"]
    assert read_config(run).data.num_classes == 10

    page = (run / "report.html").read_text()
    assert "Fine-tuning of W16-D2-H2/4, digits" in page and "<img" not in page
    assert f"{100 * found['eval/accuracy/top1']:.1f} %" in page
    assert f"{100 * found['best/eval/accuracy/top1']:.1f} %" in page

    best = json.loads((run / "best" / "best.json").read_text())
    assert best["value"] == found["best/eval/accuracy/top1"]
    encoder = crossmae_jax.load(run / "best")
    assert encoder.card.step == best["step"]
    assert encoder.logits(np.zeros((2, 16, 16, 1), np.uint8)).shape == (2, 10)

    # Without its last checkpoint the run goes on, and ends with the same bits.
    weights = weights_of(run)
    last = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    last.rename(tmp_path / "gone")
    again = train.run(config, run)
    assert "RESUMED at step" in capsys.readouterr().out
    assert again["best/eval/accuracy/top1"] == found["best/eval/accuracy/top1"]
    for name, value in weights_of(run).items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


def test_a_linear_probe_trains_its_head_and_nothing_else(
    digits_dir, pretrained, tmp_path
):
    changes = {name.replace(".", "__"): value for name, value in PROBE.items()}
    config = make_config(
        digits_dir, init_from=str(pretrained), epochs=8.0,
        checkpoint__every_epochs=0.0, **changes
    )
    config.evals.accuracy.every_epochs = 8.0
    found = train.run(config, tmp_path / "run")
    assert found["eval/accuracy/top1"] > 0.2  # a tenth by chance
    made = of_checkpoint.open_checkpoint(
        tmp_path / "run", read_config(tmp_path / "run")
    )
    again = of_checkpoint.run(made, ["accuracy"], tmp_path / "report").metrics
    assert again["accuracy/top1"] == found["eval/accuracy/top1"]
    after = weights_of(tmp_path / "run")
    before = weights_of(pretrained)
    encoder = [name for name in before if name.startswith("encoder/")]
    assert len(encoder) > 20
    for name in encoder:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert np.abs(after["batch_norm/mean"]).max() > 0.01

    # Other libraries have no such norm: the exported head does its work.
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
    logits = crossmae_jax.load(tmp_path / "run").logits(images)
    for format, to in (("timm", "timm"), ("mae", "probe.pth")):
        convert.export_weights(tmp_path / "run", tmp_path / to, format=format)
        exported = crossmae_jax.load(tmp_path / to, mean=(0.305,), std=(0.376,))
        assert exported.card.model.get("head_norm", "none") == "none"
        np.testing.assert_allclose(exported.logits(images), logits, atol=2e-4)


@pytest.mark.parametrize("tune_blocks, tuned", [
    (0.5, ("blocks_1/mlp", "blocks_1/norm2", "norm/")),
    (1.0, ("blocks_1/", "norm/")),
    (2.0, ("blocks", "norm/", "patch_embed", "cls_token", "pos_embed")),
])
def test_a_step_changes_the_tuned_blocks_and_no_others(tune_blocks, tuned):
    objective, config = objective_of(
        tune_blocks=tune_blocks, model__pool="cls", model__head_std=0.1
    )
    tx = optimizers.make_optimizer(config, lambda step: 1e-2)
    step = jax.jit(train_step.make_train_step(
        objective, tx, schedule=lambda step: 1e-2, key=jax.random.key(0)
    ))
    before = train_step.init_state(objective, tx, jax.random.key(1))
    after, _ = step(before, batch_of(16, config))
    before, after = (
        without_collections(state.variables) for state in (before, after)
    )
    changed = {
        name.removeprefix("encoder/") for name, value in before.items()
        if not np.array_equal(value, after[name])
    }
    assert changed == {
        name for name in (path.removeprefix("encoder/") for path in before)
        if name.startswith((*tuned, "head/"))
    }


def batch_of(num, config):
    rng = np.random.default_rng(0)
    shape = (num, *config.data.image_size, config.data.channels)
    return {
        "image": jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
        "label": jnp.asarray(rng.integers(0, 10, num), jnp.int32),
        "sample": jnp.arange(40, 40 + num, dtype=jnp.uint32),
    }


def objective_of(**changes):
    config = make_config(data__num_classes=10, **changes)
    return Classify(config), config


def test_training_erases_mixes_and_smooths_and_evaluation_does_not():
    objective, config = objective_of(
        augment__erasing=1.0, augment__mixup=0.8, augment__cutmix=1.0,
        augment__mixed_together=8, augment__label_smoothing=0.2,
    )
    batch, key = batch_of(96, config), jax.random.key(0)
    images, targets = objective.augmented(batch, key)
    np.testing.assert_allclose(targets.sum(-1), 1.0, rtol=1e-6)
    assert np.asarray(targets).min() == pytest.approx(0.02)
    plain = objective.normalize(batch)
    assert (np.abs(np.asarray(images - plain)).reshape(96, -1).max(1) > 0).all()
    again = objective.augmented(batch, key)[0]
    np.testing.assert_array_equal(images, again)

    off, _ = objective_of(
        augment__erasing=0.0, augment__mixup=0.0, augment__cutmix=0.0,
        augment__label_smoothing=0.0,
    )
    images, targets = off.augmented(batch, key)
    np.testing.assert_array_equal(images, plain)
    np.testing.assert_array_equal(targets, jax.nn.one_hot(batch["label"], 10))


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0)])
def test_one_way_of_mixing_can_be_had_alone(mixup, cutmix):
    objective, config = objective_of(
        augment__erasing=0.0, augment__mixup=mixup, augment__cutmix=cutmix,
        augment__mixed_together=2,
    )
    batch = batch_of(96, config)
    images, _ = objective.augmented(batch, jax.random.key(1))
    plain = np.asarray(objective.normalize(batch))
    partner = plain.reshape(-1, 2, *plain.shape[1:])[:, ::-1].reshape(plain.shape)
    pasted = np.isclose(images, plain) | np.isclose(images, partner)
    assert pasted.all() == (cutmix > 0)


def test_blocks_are_left_out_in_training_only():
    objective, config = objective_of(
        model__encoder__drop_path=0.9, augment__erasing=0.0, model__head_std=1.0
    )
    variables = drawn.variables(objective.init)
    batch = batch_of(96, config)
    first, second = (
        jax.jit(objective.loss)(variables, batch, jax.random.key(seed))[0]
        for seed in (0, 1)
    )
    assert first != second
    predicted = [objective.outputs["logits"](variables, batch) for _ in range(2)]
    np.testing.assert_array_equal(*predicted)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_class_token_is_told_beside_what_the_head_sees(pool):
    objective, config = objective_of(model__pool=pool)
    batch, variables = batch_of(8, config), drawn.variables(objective.init)
    found = objective.outputs.together(objective.outputs)(variables, batch)
    tokens = objective.model.apply(variables, objective.normalize(batch)).tokens
    np.testing.assert_array_equal(found["class_token"], tokens.cls[:, 0])
    same = np.array_equal(found["class_token"], found["features"])
    assert same == (pool == "cls")


def folders(directory, classes, images=6):
    for number, name in enumerate(classes):
        for image in range(images):
            pixels = image_files.pixels(10 * number + image, 20, 24)
            content = image_files.encode(pixels, "JPEG")
            image_files.write(directory / name / f"{image}.jpg", content)
    return str(directory)


def folder_config(train_dir, eval_dir, **changes):
    return make_config(
        data__source="folder", data__dir=train_dir, data__eval_dir=eval_dir,
        data__channels=3, data__mean=(0.5,) * 3, data__std=(0.25,) * 3,
        data__batch_size=8, **changes,
    )


def test_a_persons_own_class_folders(tmp_path):
    data = folders(tmp_path / "train", ["ant", "bee", "cat"])
    test = folders(tmp_path / "test", ["ant", "cat"])
    found = train.run(folder_config(data, test), tmp_path / "run")
    assert found["eval/accuracy/images"] == 12
    assert read_config(tmp_path / "run").data.num_classes == 3


def refused(config, directory):
    with pytest.raises(errors.UserError) as error:
        train.run(config, directory)
    return str(error.value)


def test_class_folders_that_training_lacks_are_refused(tmp_path):
    data = folders(tmp_path / "train", ["ant", "bee"])
    test = folders(tmp_path / "test", ["ant", "dog"])
    message = refused(folder_config(data, test), tmp_path / "run")
    assert "has 2 classes, of which 'dog' is none of the 2 that" in message
    assert "of those it lacks 'bee'" in message


def test_images_without_labels_are_refused(tmp_path):
    data = folders(tmp_path / "train", ["all"])
    message = refused(folder_config(data, data), tmp_path / "run")
    assert "needs labels, but the training data has none" in message


def test_images_to_test_on_without_labels_are_refused(tmp_path):
    data = folders(tmp_path / "train", ["ant", "bee"])
    test = folders(tmp_path / "test", ["all"])
    message = refused(folder_config(data, test), tmp_path / "run")
    assert "accuracy needs labels, but a split has none (FolderSource(" in message


@pytest.mark.parametrize("changes, message", [
    (dict(data__std=(95.88,)), "divided by 255: give std=(0.376,)"),
    (dict(data__num_classes=7), "The training data has 10 classes, but the head is"),
    (dict(augment__mixup=0.8, augment__mixed_together=5), "do not make equal groups"),
    (dict(augment__cutmix=1.0, data__batch_size=95), "do not make equal groups"),
    (dict(augment__mixup=-1.0), "augment.mixup=-1.0 is a parameter of a beta"),
    (dict(augment__erasing=1.5), "augment.erasing=1.5 must lie between 0 and 1"),
    (dict(model__pool="max"), "Unknown model.pool 'max'. Known: cls, mean, no"),
    (dict(model__head_norm="layer"), "Unknown model.head_norm 'layer'"),
    (dict(model__remat="some"), "Unknown model.remat 'some'"),
    (dict(tune_blocks=3.0), "tune_blocks=3.0; expected 0, 0.5"),
    (dict(checkpoint__best="eval/knn/top1"), "config.checkpoint.best='eval/knn/top1'"),
    (dict(checkpoint__best="top1"), "config.checkpoint.best='top1'"),
    (dict(data__crop="center"), "Unknown data.crop"),
    (dict(model__pool="cls", evals__knn=dict(
        every_epochs=0.0, k=5, temperature=0.07, pools=("mean", "cls")
     )), "what it pools is the class token alone; set evals.knn.pools=('cls',)"),
])
def test_settings_that_contradict_themselves(digits_dir, tmp_path, changes, message):
    assert message in refused(make_config(digits_dir, **changes), tmp_path / "run")


def test_an_encoder_of_another_size_is_refused(digits_dir, pretrained, tmp_path):
    config = make_config(
        digits_dir, init_from=str(pretrained), model__encoder__size="W32-D2-H2/4"
    )
    message = refused(config, tmp_path / "run")
    assert "file is width 16" in message and "model is width 32" in message


def test_accuracy_is_for_classifiers_and_panels_for_pre_training(digits_dir, tmp_path):
    config = make_config(digits_dir)
    config.evals = dict(reconstruction=dict(every_epochs=1.0, num_images=4))
    config.checkpoint.best = ""
    message = refused(config, tmp_path / "run")
    assert "config.evals.reconstruction needs the output reconstruction" in message
