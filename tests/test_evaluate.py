"""The command that evaluates a checkpoint in several ways."""

import json

import jax
import numpy as np
import pytest

from configs import digits_cross
from crossmae_jax import digests, evaluate, train, workdir
from crossmae_jax.commands import convert
from crossmae_jax.commands import evaluate as command
from crossmae_jax.data import corruptions, imagenet_variants, sources
from crossmae_jax.evaluators import robustness
from tests.test_classify import TINY, make_config
from tests.test_robustness import lay_out, true_classes


@pytest.fixture(scope="module")
def pretrained(digits_dir, tmp_path_factory):
    """A run of pre-training, and what its own evaluations found at its end."""
    config = digits_cross.get_config()
    config.update_from_flattened_dict(TINY | {
        "data.data_dir": digits_dir, "baselines": False, "model.decoder_dim": 16,
        "model.decoder_depth": 1, "model.decoder_heads": 2, "epochs": 1.0,
    })
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
        if name.startswith("eval/"):
            assert written["metrics"][name.removeprefix("eval/")] == value, name
    step = written["checkpoint"]["step"]
    listed = run / "checkpoints" / str(step) / digests.LIST
    assert directory.name == f"step_{step:08d}"
    assert written["checkpoint"]["sha256"] == digests.of(listed)
    assert written["config"]["seed"] == 0
    assert written["images"] == {"train": [1442, 1442], "eval": [355, 355]}
    table = (directory / "evaluation.md").read_text()
    assert table in said and "* train: 1 442/1 442 images" in table
    assert f"| linear/top1 | {found['eval/linear/top1']:.4f} |" in table


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
    assert written["images"]["train"] == [144, 144]
    assert written["config"]["evals"]["knn"]["k"] == [7]
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
        f"--checkpoint={export}", "--suite=linear", f"--workdir={tmp_path}",
    ]
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "is no run; name the --config=FILE" in capsys.readouterr().err
    arguments += [
        "--config=configs/digits_cross.py", f"--config.data.data_dir={digits_dir}",
        "--config.model.decoder_dim=16", "--config.model.decoder_depth=1",
        "--config.model.decoder_heads=2", *settings,
    ]
    assert command.main(arguments) == 0
    written = report(tmp_path)
    assert written["metrics"]["linear/top1"] == found["eval/linear/top1"]
    assert written["checkpoint"]["sha256"] == digests.of(export)
    arguments[0] = f"--checkpoint={tmp_path / 'encoder.safetensors'}"
    assert not convert.main([
        "export", str(run), "--format=safetensors", "--parts=encoder",
        f"--to={tmp_path / 'encoder.safetensors'}",
    ])
    assert command.main(arguments) == 0
    assert report(tmp_path)["metrics"] == written["metrics"]
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
    assert written["images"] == {"eval": [355, 355]}
    assert "* eval: 355/355 images" in capsys.readouterr().out
    # Of its features, too: the mean of the patches, and the class token.
    arguments[-1] = "--suite=knn"
    assert command.main([*arguments, "--config.data.split=train[:10%]"]) == 0
    written = report(tmp_path)
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

    monkeypatch.setattr(corruptions, "Corrupted", corrupted)
    config = workdir.read_config(run)
    config.data.eval_split = "test[:20%]"
    config.data.eval_crop_ratio = 1.0  # corrupted images are cropped already
    made = evaluate.open_checkpoint(run, config)
    metrics = evaluate.run(made, ["accuracy", "robustness"], tmp_path).metrics
    clean = [metrics.pop(f"accuracy/{name}") for name in ("top1", "top5", "images")]
    assert len(opened) == 75 and len({tuple(one.items()) for one in opened}) == 75
    np.testing.assert_allclose(list(metrics.values()), 1 - clean[0], rtol=1e-6)
    assert set(metrics) == {"corrupted/mean_error"} | {
        f"corrupted/error/{name}" for name in corruptions.CORRUPTIONS
    }


@pytest.mark.parametrize("flags, message", [
    ([], "--checkpoint is missing"),
    (["--checkpoint"], "no run"),
    (["--checkpoint=nowhere", "--suite=knn"], "nowhere is no run; name the --config"),
])
def test_flags_that_are_missing_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(flags)
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


def test_random_weights_stay_on_all_devices(pretrained):
    run, _ = pretrained
    made = evaluate.open_checkpoint(run, workdir.read_config(run))
    leaf = jax.tree.leaves(made.variables)[0]
    assert len(leaf.sharding.device_set) == jax.device_count() == 8


def test_the_sets_of_imagenet_are_evaluated_by_a_head_of_their_classes(
    digits_dir, tmp_path, monkeypatch, classifier
):
    small = imagenet_variants._A._replace(num_images=400)
    monkeypatch.setattr(imagenet_variants, "_A", small)
    folder = lay_out(tmp_path / "imagenet-a", true_classes("a"), 400, channels=1)
    config = make_config(
        digits_dir, data__num_classes=1000, data__image_size=(32, 32), epochs=0.1,
        optim__warmup_epochs=0.0, checkpoint__best="",
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
        (tmp_path / "run" / "config.json").read_text().replace(digits_dir, "/nowhere")
    )
    arguments = ["--suite=robustness", f"--imagenet_a={folder}", "--imagenet_c=C"]
    assert command.main([f"--checkpoint={tmp_path / 'run'}", *arguments]) == 0
    (directory,) = (tmp_path / "run" / "evaluations").iterdir()
    written = report(directory)
    metrics = written["metrics"]
    assert metrics["imagenet_a/classes"] == 200
    assert metrics["imagenet_a/images"] == 400
    assert 0 < metrics["imagenet_a/top5"] < 0.2  # the head knows nothing
    assert opened == [
        ("C", name, severity)
        for name in corruptions.CORRUPTIONS for severity in corruptions.SEVERITIES
    ]
    alexnet = np.array(list(robustness.ALEXNET_ERRORS.values()))
    np.testing.assert_allclose(
        metrics["imagenet_c/mce"],
        np.mean(100 * metrics["imagenet_c/mean_error"] / alexnet),
    )
    run, _ = classifier
    with pytest.raises(SystemExit, match="The head has 10 classes"):
        command.main([
            f"--checkpoint={run}", "--suite=robustness", f"--imagenet_a={folder}",
        ])


class Part:
    """The first images of a source: enough where only what becomes of them counts."""

    def __init__(self, source):
        self._source, self.num_classes = source, source.num_classes
        self.fingerprint = f"part of {source.fingerprint}"

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self._source[index]

    def name(self, index):
        return self._source.name(index)
