"""The command that evaluates a checkpoint in several ways."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from crossmae_jax import errors, train
from crossmae_jax.checkpoints import digests
from crossmae_jax.commands import convert
from crossmae_jax.commands import evaluate as command
from crossmae_jax.data import sources
from crossmae_jax.data.sets import corruptions, imagenet_variants
from crossmae_jax.evals import of_checkpoint, robustness, while_training
from crossmae_jax.runs import workdir
from tests import image_files
from tests.test_classify import TINY, make_config, make_pretraining
from tests.test_robustness import lay_out, true_classes


@pytest.fixture(scope="module")
def pretrained(digits_dir, tmp_path_factory):
    """A run of pre-training, and what its own evaluations found at its end."""
    config = make_pretraining(digits_dir)
    del config.evals["reconstruction"]
    directory = tmp_path_factory.mktemp("runs") / "pretrained"
    return directory, train.run(config, directory)


@pytest.fixture(scope="module")
def classifier(digits_dir, tmp_path_factory):
    """A run of a classifier of 32 pixels, and its accuracy."""
    directory = tmp_path_factory.mktemp("runs") / "classifier"
    config = make_config(digits_dir, data__image_size=(32, 32), epochs=1.0)
    return directory, train.run(config, directory)


def report(directory):
    return json.loads((directory / "evaluation.json").read_text())


def test_a_run_is_evaluated_as_it_evaluated_itself(pretrained, capsys):
    run, found = pretrained
    assert command.main([f"--checkpoint={run}", "--suite=linear,knn"]) == 0
    said = capsys.readouterr().out
    (directory,) = (run / "evaluations").iterdir()
    written = report(directory)
    assert list(written["metrics"])[0] == "linear/top1"
    for name, value in found.items():
        # The run's first number of neighbours is 20, the suite's 10.
        if name.startswith(("eval/knn/", "eval/linear/")) and (
            name not in ("eval/knn/top1", "eval/knn/top5")
        ):
            assert written["metrics"][name.removeprefix("eval/")] == value, name
    step = written["checkpoint"]["step"]
    listed = run / "checkpoints" / str(step) / digests.LIST
    assert directory.name == f"step_{step:08d}"
    assert written["checkpoint"]["sha256"] == digests.of(listed)
    assert written["config"]["seed"] == 0
    assert written["images"] == {
        f"{name}/{split}": [count, count] for name in ("linear", "knn")
        for split, count in (("train", 1442), ("eval", 355))
    }
    table = (directory / "evaluation.md").read_text()
    assert table in said and "* linear/train: 1 442/1 442 images" in table
    assert "* knn: k=(10, 20, 100, 200), temperature=0.07, pools=" in table
    value = found["eval/linear/top1"]
    assert re.search(rf"\| linear/top1 +\| +{value:.6g} \|", table)


def test_suites_of_one_configuration_share_a_report(pretrained, tmp_path):
    run, found = pretrained
    arguments = [f"--checkpoint={run}", f"--workdir={tmp_path}"]
    linear = "--config.evals.linear.l2s=(0.1,)"
    assert command.main([*arguments, "--suite=knn", linear]) == 0
    assert command.main([*arguments, "--suite=linear", linear]) == 0
    metrics = report(tmp_path)["metrics"]
    assert metrics["knn/mean/k20/top1"] == found["eval/knn/top1"]
    assert metrics["linear/l2"] == 0.1
    with pytest.raises(SystemExit, match="holds the report of another configuration"):
        command.main([*arguments, "--suite=linear", "--config.data.split=train[:50%]"])
    assert report(tmp_path)["metrics"] == metrics


def test_settings_of_the_run_can_be_changed_but_not_misspelt(
    pretrained, tmp_path, capsys
):
    run, _ = pretrained
    arguments = [
        f"--checkpoint={run}", "--suite=knn", f"--workdir={tmp_path}",
        "--config.data.split=train[:10%]", "--config.evals.knn.k=7",
    ]
    assert command.main(arguments) == 0
    written = report(tmp_path)
    assert written["images"]["knn/train"] == [144, 144]
    assert written["options"]["knn"]["k"] == [7]
    with pytest.raises(SystemExit):
        command.main([*arguments, "--config.evals.knn.n=7"])
    assert "Unknown setting --config.evals.knn.n" in capsys.readouterr().err


def test_exported_weights_need_a_config_and_give_the_same(
    pretrained, digits_dir, tmp_path, capsys
):
    run, found = pretrained
    export = tmp_path / "model.safetensors"
    assert not convert.main(
        ["export", str(run), "--format=safetensors", f"--to={export}"]
    )
    settings = [
        f"--config.{name}={value}" for name, value in TINY.items()
        if name.startswith(("model", "data.batch"))
    ]
    arguments = [
        f"--checkpoint={export}", "--suite=linear", f"--workdir={tmp_path / 'report'}",
    ]
    with pytest.raises(SystemExit):
        command.main(arguments)
    said = capsys.readouterr().err
    assert "is no run with checkpoints; name the --config=FILE" in said
    arguments += [
        "--config=configs/digits_cross.py", f"--config.data.data_dir={digits_dir}",
        "--config.model.decoder.dim=16", "--config.model.decoder.depth=1",
        "--config.model.decoder.num_heads=2", *settings,
    ]
    assert command.main(arguments) == 0
    written = report(tmp_path / "report")
    assert written["metrics"]["linear/top1"] == found["eval/linear/top1"]
    assert written["checkpoint"]["sha256"] == digests.of(export)
    arguments[0] = f"--checkpoint={tmp_path / 'encoder.safetensors'}"
    assert not convert.main([
        "export", str(run), "--format=safetensors", "--parts=encoder",
        f"--to={tmp_path / 'encoder.safetensors'}",
    ])
    (tmp_path / "report" / "evaluation.json").unlink()
    assert command.main(arguments) == 0
    assert report(tmp_path / "report")["metrics"] == written["metrics"]
    notes = report(tmp_path / "report")["notes"]
    (loaded,) = (note for note in notes if note.startswith("loaded"))
    assert "encoder" in loaded and "decoder" not in loaded
    # A classifier's head would be random numbers.
    settings[0:0] = ["--config=configs/finetune_digits.py"]
    with pytest.raises(SystemExit, match="lacks fc_norm, head, which would be random"):
        command.main([
            *arguments[:3], *settings, f"--config.data.data_dir={digits_dir}"
        ])


def test_every_image_is_counted_of_a_classifier(classifier, tmp_path, capsys):
    run, found = classifier
    arguments = [f"--checkpoint={run}", f"--workdir={tmp_path}", "--suite=accuracy"]
    assert command.main(arguments) == 0
    written = report(tmp_path)
    assert written["metrics"]["accuracy/top1"] == found["eval/accuracy/top1"]
    assert written["images"] == {"accuracy/eval": [355, 355]}
    assert "* accuracy/eval: 355/355 images" in capsys.readouterr().out
    # Of its features, too: the mean of the patches, and the class token.
    arguments[1:] = [f"--workdir={tmp_path / 'knn'}", "--suite=knn"]
    assert command.main([*arguments, "--config.data.split=train[:10%]"]) == 0
    written = report(tmp_path / "knn")
    assert {name.rpartition("/")[0] for name in written["metrics"]} == {
        "knn", "knn/mean/k10", "knn/mean/k20", "knn/mean/k100",
        "knn/cls/k10", "knn/cls/k20", "knn/cls/k100",
    }
    assert written["notes"] == ["k-NN without k = 200: 144 training images"]


def test_robustness_is_the_mean_over_corruptions_and_severities(
    classifier, tmp_path, monkeypatch
):
    run, _ = classifier
    opened = []

    def corrupted(source, data, **which):
        opened.append(which)
        return source  # as it is: corruptions have tests of their own

    def of_sources(opened, data, *args, **kwargs):
        ratios.append(data.eval_crop_ratio)
        return whole(opened, data, *args, **kwargs)

    ratios, whole = [], while_training.of_sources
    monkeypatch.setattr(while_training, "of_sources", of_sources)

    monkeypatch.setattr(corruptions, "Corrupted", corrupted)
    config = workdir.read_config(run)
    config.data.eval_split = "test[:20%]"
    made = of_checkpoint.open_checkpoint(run, config)
    found = of_checkpoint.run(made, ["robustness"], tmp_path / "robustness")
    metrics = found.metrics
    assert found.images == {"corrupted/all": [75 * 71, 75 * 71]}
    assert len({tuple(one.items()) for one in opened}) == 75
    # Corrupted images are cropped already.
    assert ratios == [0.875] + [1.0] * 75
    config.data.eval_crop_ratio = 1.0
    made = of_checkpoint.open_checkpoint(run, config)
    whole_images = of_checkpoint.run(made, ["accuracy"], tmp_path / "accuracy").metrics
    error = 1 - whole_images["accuracy/top1"]
    np.testing.assert_allclose(list(metrics.values()), error, rtol=1e-6)
    assert set(metrics) == {"corrupted/mean_error"} | {
        f"corrupted/error/{name}" for name in corruptions.CORRUPTIONS
    }


@pytest.mark.parametrize("flags, message", [
    ([], "--checkpoint is missing"),
    (["--checkpoint"], "Missing value for flag --checkpoint"),
    (["--checkpoint=nowhere", "--suite=knn"], "nowhere is no run with checkpoints;"),
    (["--checkpoint=RUN"], "--suite is missing: accuracy, knn, linear, robustness"),
    (["--checkpoint=RUN", "--suite=knn", "--imagenet_a=A"],
     "--imagenet_a is for --suite=robustness, which is not asked for"),
    (["--checkpoint=RUN", "--suite=robustness", "--imagenet_c="],
     "--imagenet_c is empty"),
])
def test_flags_that_are_missing_or_wrong_are_named(
    flags, message, capsys, pretrained
):
    run, _ = pretrained
    with pytest.raises(SystemExit) as stopped:
        command.main([flag.replace("RUN", str(run)) for flag in flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suite, message", [
    ("knm", "Unknown suite 'knm'. Known: accuracy, knn, linear, robustness"),
    ("accuracy", "accuracy need a classifier, but .* objective='pretrain'"),
    ("robustness", "robustness need a classifier"),
])
def test_suites_that_the_checkpoint_cannot_give_are_refused(
    pretrained, suite, message
):
    run, _ = pretrained
    with pytest.raises(SystemExit, match=message):
        command.main([f"--checkpoint={run}", f"--suite={suite}"])
    with pytest.raises(SystemExit, match="No step 7 in"):
        command.main([f"--checkpoint={run}", "--suite=knn", "--step=7"])


def test_data_of_other_classes_and_images_too_small_to_corrupt_are_refused(
    classifier, digits_dir, tmp_path
):
    run, _ = classifier
    folder = image_files.write_folder(tmp_path / "images", 9)
    config = workdir.read_config(run)
    config.data.update(source="folder", dir=folder, eval_dir=folder)
    made = of_checkpoint.open_checkpoint(run, config)
    with pytest.raises(errors.SetupError, match="3 classes, of which 'class0', "):
        of_checkpoint.run(made, ["accuracy"], tmp_path / "report")
    unnamed = dataclasses.replace(made, classes=None)  # as most files of others are
    with pytest.raises(errors.SetupError, match="3 classes, the head 10"):
        of_checkpoint.run(unnamed, ["accuracy"], tmp_path / "report")
    tiny = make_config(digits_dir, epochs=0.1, optim__warmup_epochs=0.0)
    tiny.evals, tiny.checkpoint.best = {}, ""
    train.run(tiny, tmp_path / "tiny")
    with pytest.raises(SystemExit, match="32"):
        command.main([f"--checkpoint={tmp_path / 'tiny'}", "--suite=robustness"])


def test_an_image_that_cannot_be_decoded_is_in_the_report(classifier, tmp_path, capsys):
    run, _ = classifier
    folder = tmp_path / "images"
    for number in range(20):
        content = image_files.encode(image_files.pixels(number, 32, 32, 1))
        image_files.write(folder / str(number // 2) / f"{number}.png", content)
    (folder / "3" / "7.png").write_bytes(b"no image")
    config = workdir.read_config(run)
    config.data.update(
        source="folder", dir=str(folder), eval_dir=str(folder), max_bad_share=0.5
    )
    made = of_checkpoint.open_checkpoint(run, config)
    (note,) = of_checkpoint.run(made, ["accuracy"], tmp_path / "report").notes
    assert note.startswith("1 images of eval could not be decoded")
    assert f"eval: 20 images, 10 classes, in {folder}\n" in capsys.readouterr().out
    (line,) = (tmp_path / "report" / "bad_images.jsonl").read_text().splitlines()
    assert "3/7.png" in line


def test_weights_lie_on_all_devices(pretrained):
    run, _ = pretrained
    made = of_checkpoint.open_checkpoint(run, workdir.read_config(run))
    leaf = jax.tree.leaves(made.variables)[0]
    assert len(leaf.sharding.device_set) == jax.device_count() == 8


def test_the_sets_of_imagenet_are_evaluated_by_a_head_of_their_classes(
    tmp_path, monkeypatch, classifier
):
    small = imagenet_variants._A._replace(num_images=400)
    monkeypatch.setattr(imagenet_variants, "_A", small)
    folder = lay_out(tmp_path / "imagenet-a", true_classes("a"), 400, channels=1)
    trained_on = lay_out(tmp_path / "imagenet", range(1000), 1000, channels=1)
    config = make_config(
        data__source="folder", data__dir=trained_on, data__image_size=(32, 32),
        epochs=0.1, optim__warmup_epochs=0.0, checkpoint__best="",
    )
    config.evals = {}
    train.run(config, tmp_path / "run")
    opened = []

    def one_of_75(directory, **which):
        opened.append((directory, *which.values()))
        source = sources.FolderSource(folder, classes=imagenet_variants.wordnet_ids())
        return Part(source)

    monkeypatch.setattr(imagenet_variants, "imagenet_c", one_of_75)
    (tmp_path / "run" / "config.json").write_text(  # the run's own images are not here
        (tmp_path / "run" / "config.json").read_text().replace(trained_on, "/nowhere")
    )
    stored = tmp_path / "imagenet-c"
    arguments = [
        "--suite=robustness", f"--imagenet_a={folder}", f"--imagenet_c={stored}"
    ]
    with pytest.raises(SystemExit, match="lacks 75 of the 75 folders"):
        command.main([f"--checkpoint={tmp_path / 'run'}", *arguments])
    for name in corruptions.CORRUPTIONS:
        for severity in corruptions.SEVERITIES:
            (stored / name / str(severity)).mkdir(parents=True)
    assert command.main([f"--checkpoint={tmp_path / 'run'}", *arguments]) == 0
    (directory,) = (tmp_path / "run" / "evaluations").iterdir()
    written = report(directory)
    metrics = written["metrics"]
    assert metrics["imagenet_a/classes"] == 200
    assert written["images"]["imagenet_a/all"] == [400, 400]
    assert written["images"]["imagenet_c/all"] == [75 * 16, 75 * 16]
    assert 0 < metrics["imagenet_a/top5"] < 0.2  # the head knows nothing
    assert opened == [
        (str(stored), name, severity)
        for name in corruptions.CORRUPTIONS for severity in corruptions.SEVERITIES
    ]
    alexnet = np.array(list(robustness.ALEXNET_ERRORS.values()))
    np.testing.assert_allclose(
        metrics["imagenet_c/mce"],
        np.mean(100 * metrics["imagenet_c/mean_error"] / alexnet),
    )
    run, _ = classifier
    with pytest.raises(SystemExit, match="The head has 10 classes; ImageNet-A"):
        command.main([
            f"--checkpoint={run}", "--suite=robustness", f"--imagenet_a={folder}",
        ])


class Part:
    """The first images of a source: enough where only what becomes of them counts."""

    def __init__(self, source):
        self._source = source
        self.kinds, self.classes = source.kinds, source.classes
        self.fingerprint = f"part of {source.fingerprint}"

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self._source[index]

    def name(self, index):
        return self._source.name(index)
