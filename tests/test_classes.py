"""A class is its name: in runs, weights and reports, and from data set to data set."""

import collections
import csv
import json
import os
import shutil

from pathlib import Path

import numpy as np
import pytest
import torch

import crossmae_jax
from crossmae_jax import convert, errors, train
from crossmae_jax.commands import evaluate
from crossmae_jax.convert import cards
from crossmae_jax.data import sources
from crossmae_jax.data.folder_source import FolderSource
from crossmae_jax.data.tfds_source import TfdsSource
from crossmae_jax.report import run_page
from crossmae_jax.runs import confusions, workdir
from tests import image_files
from tests.test_classify import folder_config, folders, make_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on the folders ant, bee and cat, and its config."""
    place = tmp_path_factory.mktemp("trained")
    data = folders(place / "train", ["ant", "bee", "cat"])
    config = folder_config(data, data, epochs=1.0, optim__base_lr=1e-2)
    train.run(config, place / "run")
    return place / "run", config


def evaluated(run, data, directory, *flags):
    arguments = [
        f"--checkpoint={run}", "--suite=accuracy", f"--workdir={directory}",
        f"--config.data.eval_dir={data}", *flags,
    ]
    assert evaluate.main(arguments) == 0
    return json.loads((directory / "evaluation.json").read_text())


def test_names_go_with_the_run_its_weights_and_its_reports(trained, tmp_path):
    run, _ = trained
    names = ("ant", "bee", "cat")
    assert workdir.read_classes(run) == names
    assert crossmae_jax.load(run).classes == names
    for format, to in (("safetensors", "a.safetensors"), ("timm", "timm")):
        convert.export_weights(run, tmp_path / to, format=format)
        assert crossmae_jax.load(tmp_path / to).classes == names
    listed = json.loads((tmp_path / "timm" / "config.json").read_text())["label_names"]
    assert listed == list(names)


def test_images_are_evaluated_by_name_without_the_training_folder(
    trained, tmp_path, monkeypatch
):
    """Other folders come before and behind; one of the classes is missing."""
    run, config = trained
    copied = shutil.copytree(run, tmp_path / "run")
    expected = evaluated(copied, config.data.dir, tmp_path / "all")
    test = tmp_path / "test"
    for name in ("bee", "cat"):
        shutil.copytree(f"{config.data.dir}/{name}", test / name)
    alone = evaluated(
        copied, test, tmp_path / "two", f"--config.data.dir={tmp_path / 'gone'}"
    )
    assert alone["classes"] == expected["classes"] == ["ant", "bee", "cat"]
    model, images, labels = crossmae_jax.load(copied), [], []
    for number, name in ((1, "bee"), (2, "cat")):
        for file in sorted((test / name).iterdir()):
            images.append(str(file))
            labels.append(number)
    right = model.logits(images).argmax(1) == np.array(labels)
    assert alone["metrics"]["accuracy/top1"] == pytest.approx(right.mean())


def taken(run, data):
    """Counts by hand which class a run takes for which: {(class, taken for): images}.
    """
    model = crossmae_jax.load(run)
    files = sorted((data).glob("*/*"))
    first = model.logits([str(file) for file in files]).argmax(1)
    return collections.Counter(
        (file.parent.name, model.classes[number])
        for file, number in zip(files, first, strict=True)
    )


def counted(path):
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header == ["class", "taken_for", "images"]
    return {(name, other): int(images) for name, other, images in rows}


def test_which_classes_are_taken_for_which_is_counted_by_name(
    trained, tmp_path, capsys
):
    """Of a run, on its page, and of other folders in a report and on the screen."""
    run, config = trained
    (path,) = (run / "confusions").iterdir()
    assert counted(path) == taken(run, Path(config.data.dir))
    test = tmp_path / "test"  # of another number of images than any batch has
    for name, number in (("bee", 6), ("cat", 5)):
        shutil.copytree(f"{config.data.dir}/{name}", test / name)
        for file in sorted((test / name).iterdir())[number:]:
            file.unlink()
    capsys.readouterr()
    written = evaluated(run, test, tmp_path / "out")
    found = counted(tmp_path / "out" / "confusions.csv")
    assert found == taken(run, test) and sum(found.values()) == 11
    right = sum(images for (name, other), images in found.items() if name == other)
    assert written["metrics"]["accuracy/top1"] == pytest.approx(right / 11)
    most = max((n, name, x) for (name, x), n in found.items() if name != x)[0]
    name, other, images, of = written["confusions"][0]
    assert images == most == found[name, other] and of == {"bee": 6, "cat": 5}[name]
    line = f"| {name} for {other}"
    out = capsys.readouterr().out
    assert line in out and f"{images}/{of} |" in out
    assert line in (tmp_path / "out" / "evaluation.md").read_text()
    page = run_page.write(shutil.copytree(run, tmp_path / "run")).read_text()
    assert "most often taken for another" in page


def test_names_of_any_kind_are_read_back_from_a_table(tmp_path, caplog):
    names = ("a,b", 'say "a"', "two\nlines", os.fsdecode(b"\xff\xfe"), "ünï")
    labels = np.array([0, 0, 0, 1, 2, 3, 3, 4])
    pairs = confusions.count(labels, np.array([0, 1, 1, 2, 3, 4, 4, 4]), names)
    path = tmp_path / "confusions" / "step_00000002.csv"
    confusions.write(path, pairs)
    confusions.write(path.with_name("step_00000001.csv"), [])
    assert confusions.newest(tmp_path) == path
    assert confusions.read(path) == pairs
    assert pairs[:2] == [("a,b", "a,b", 1), ("a,b", 'say "a"', 2)]
    assert [(n, of) for _, _, n, of in confusions.recalled(path)] == [
        (2, 3), (2, 2), (1, 1), (1, 1)
    ]
    table = confusions.table(confusions.most_frequent(pairs))
    assert table.rows[0] == ('a,b for say "a"', "2/3")
    assert all(text.isprintable() for row in table.rows for text in row)
    path.write_text("class,taken_for,images\na,b\n")
    assert confusions.recalled(path) == []
    assert "is no table of class,taken_for,images" in caplog.text


def test_a_head_without_names_is_said_to_be_taken_by_number(trained, tmp_path, capsys):
    run, config = trained
    bare = tmp_path / "bare.pth"
    convert.export_weights(run, bare, format="mae", check=False)
    content = torch.load(bare, weights_only=True)
    wrapped = {f"module.{name}": x for name, x in content["model"].items()}
    torch.save({"model": wrapped}, bare)  # without our card
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict({workdir.read_config(run).to_dict()!r})\n"
    )
    written = evaluated(
        bare, config.data.dir, tmp_path / "out", f"--config={tmp_path / 'config.py'}"
    )
    said = (
        "the names of the head's classes are not known; taken to be the data's, in "
        "their order: 'ant', 'bee', 'cat'"
    )
    assert said in written["notes"] and written["classes"] is None
    assert any("taken off: module., with" in note for note in written["notes"])
    out = capsys.readouterr().out
    assert f"\n{said}\n" in out and f"* {said}" in out
    assert counted(tmp_path / "out" / "confusions.csv") == taken(
        run, Path(config.data.dir)
    )


def test_other_classes_are_refused_with_the_names_that_differ(trained, tmp_path):
    run, config = trained
    for new, old in zip("zyx", ("ant", "bee", "cat"), strict=True):
        shutil.copytree(f"{config.data.dir}/{old}", tmp_path / "other" / new)
    with pytest.raises(SystemExit) as refused:
        evaluated(run, tmp_path / "other", tmp_path / "out")
    message = str(refused.value)
    assert "'x', 'y', 'z' are none of the 3" in message
    assert "lacks 'ant', 'bee', 'cat'" in message


def test_a_run_does_not_go_on_with_classes_of_other_names(trained, tmp_path):
    run, config = trained
    copied = shutil.copytree(run, tmp_path / "run")
    path = copied / "dataset.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"classes": ["ant", "cat", "bee"]}))
    with pytest.raises(errors.SetupError, match="classes: 3 -> 3; 1 'cat' -> 'bee'"):
        train.run(config, copied)
    del stored["classes"]  # as runs from before names were kept
    path.write_text(json.dumps(stored))
    train.run(config, copied)
    assert workdir.read_classes(copied) == ("ant", "bee", "cat")


def test_a_run_does_not_go_on_with_other_images_of_the_same_names(trained, tmp_path):
    run, config = trained
    copied = shutil.copytree(run, tmp_path / "run")
    images = shutil.copytree(config.data.dir, tmp_path / "images")
    config = config.copy_and_resolve_references()
    config.data.dir = config.data.eval_dir = str(images)
    first, second = sorted(images.glob("*/*"))[3:5]
    first.write_bytes(second.read_bytes())
    with pytest.raises(errors.SetupError, match=f"content: 1 of 18 .*, first {first}"):
        train.run(config, copied)


def test_a_head_for_other_classes_is_not_started_from(trained, tmp_path, capsys):
    run, _ = trained
    data = folders(tmp_path / "train", ["ant", "cat", "dog"])
    config = folder_config(data, data, epochs=1.0, init_from=str(run))
    train.run(config, tmp_path / "next")
    out = capsys.readouterr().out
    assert f"\ntrain: 18 images, 3 classes, in {data}\neval: 18 images" in out
    assert "the head is for other classes, ant, bee, cat, ...; the data has" in out
    assert "new      head" in out


def test_folders_with_numbers_are_numbers_of_their_names(tmp_path):
    names = [str(number) for number in range(12)]
    source = FolderSource(folders(tmp_path / "a", names, images=1))
    assert source.classes[:4] == ("0", "1", "10", "11")
    mapped = FolderSource(str(tmp_path / "a"), classes=tuple(names))
    for index in range(len(mapped)):
        record = mapped[index]
        assert names[record["label"]] == record["name"].split("/")[-2]


def test_a_tfds_set_is_mapped_by_name(digits_dir):
    data = image_files.config(source="digits", data_dir=digits_dir)
    own = sources.make_source(data, "train")
    assert own.classes == tuple("0123456789")
    other = TfdsSource(
        "sklearn_digits", data_dir=digits_dir, split="train", classes=own.classes[::-1]
    )
    for index in range(20):
        assert other[index]["label"] == 9 - own[index]["label"]
    with pytest.raises(errors.SetupError, match="'3' is none of the 9"):
        TfdsSource(
            "sklearn_digits", data_dir=digits_dir, split="train",
            classes=tuple("012456789"),
        )


def test_cards_from_before_names_were_kept_can_be_read(trained):
    card = crossmae_jax.load(trained[0]).card
    values = json.loads(card.to_json())
    del values["classes"]
    assert cards.from_json(json.dumps(values)).classes is None


class _Unlabelled:
    """A source some of whose images have no label, as published test splits."""

    def __init__(self, source, every):
        self.source, self.every = source, every
        self.kinds, self.classes = source.kinds, source.classes
        self.fingerprint = source.fingerprint

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        record = self.source[index]
        return record | {"label": -1} if index % self.every == 0 else record

    def name(self, index):
        return self.source.name(index)


@pytest.fixture
def unlabelled(monkeypatch):
    """Takes the labels of every so many images of a split: unlabelled(eval=7)."""
    make = sources.make_source

    def take(**every):
        def opened(data, split, **kwargs):
            made = make(data, split, **kwargs)
            return _Unlabelled(made, every[split]) if split in every else made

        monkeypatch.setattr(sources, "make_source", opened)

    return take


@pytest.mark.parametrize("every, message", [
    (dict(train=7), "has label -1, which is none of the classes 0 to 9"),
    (dict(train=2), "accuracy needs images that have a label, but 15 of 16 images of "),
    (dict(eval=1), "accuracy needs images that have a label, but 16 of 16 images of "),
])
def test_images_without_a_class_are_refused_before_the_first_step(
    digits_dir, tmp_path, unlabelled, every, message
):
    config = make_config(digits_dir, evals=dict(accuracy=dict(every_epochs=0.0)))
    if every == dict(train=7):
        config.evals, config.checkpoint.best = {}, ""
    unlabelled(**every)
    with pytest.raises(errors.SetupError, match=message):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (
        tmp_path / "run" / "metrics.jsonl").read_text()


def test_single_images_without_a_class_are_left_out_and_counted(
    trained, tmp_path, unlabelled, capsys
):
    """Of 18 images 5, at the end of a run and in a report."""
    run, config = trained
    copied = shutil.copytree(run, tmp_path / "run")
    unlabelled(eval=4)
    found = train.run(config, copied)  # which is finished, and evaluates once more
    said = "5 of 18 images of eval have no label and are left out where labels are"
    assert capsys.readouterr().out.count(said) == 1
    assert found["eval/accuracy/images"] == 13
    assert sum(counted(confusions.newest(copied)).values()) == 13
    assert evaluate.main([
        f"--checkpoint={copied}", "--suite=accuracy,knn", f"--workdir={tmp_path / 'e'}"
    ]) == 0
    written = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert any(note.startswith(said) for note in written["notes"])
    assert written["images"] == {
        "accuracy/eval": [13, 18], "knn/train": [18, 18], "knn/eval": [13, 18]
    }
    right = written["metrics"]["knn/top1"] * 13
    assert right == pytest.approx(round(right)) and right > 0


def test_a_split_of_which_nothing_can_be_decoded_is_refused_first(tmp_path):
    data = folders(tmp_path / "train", ["ant", "bee"])
    for name in ("ant", "bee"):
        image_files.write(tmp_path / "test" / name / "0.jpg", b"no image")
    with pytest.raises(errors.SetupError, match="None of 2 images of .*test"):
        train.run(folder_config(data, str(tmp_path / "test")), tmp_path / "run")


def test_a_full_disk_is_said_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=40_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    data = folders(tmp_path / "train", ["ant", "bee"])
    config = folder_config(data, data)
    with pytest.raises(errors.SetupError) as refused:
        train.run(config, tmp_path / "run")
    assert f"40.00 MB are free on the disk of {tmp_path}/run" in str(refused.value)
    assert "but 5 checkpoints of" in str(refused.value)  # 2 + 1 kept, and 1 + 1 best
    assert not (tmp_path / "run" / "config.json").exists()
