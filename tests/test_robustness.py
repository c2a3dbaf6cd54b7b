"""Robustness: which classes compete, mCE, and data sets that are whole or refused."""

import importlib.util
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from crossmae_jax.data import pipeline
from crossmae_jax.data.sets import imagenet_variants
from crossmae_jax.evals import accuracy, robustness
from tests.image_files import config, encode, pixels

SETS = {
    "a": (imagenet_variants.imagenet_a, 7_500),
    "r": (imagenet_variants.imagenet_r, 30_000),
    "sketch": (imagenet_variants.imagenet_sketch, 50_889),
}
PAIRS = [
    (name, severity)
    for name in robustness.CORRUPTIONS for severity in robustness.SEVERITIES
]


def true_classes(name):
    """The classes of a set as timm lists them; timm itself is not imported."""
    if name == "sketch":
        return list(range(1000))
    timm = Path(importlib.util.find_spec("timm").origin).parent
    listed = timm / "data" / "_info" / f"imagenet_{name}_indices.txt"
    return [int(line) for line in listed.read_text().split()]


def lay_out(root, classes, num_images, *, channels=3):
    """Spreads links to a few real JPEGs over class folders, like a whole set."""
    ids = imagenet_variants.wordnet_ids()
    root.mkdir(parents=True)
    for k, number in enumerate(classes):
        folder = root / ids[number]
        folder.mkdir()
        original = root.parent / f"{root.name}-{k % 3}.jpg"
        if not original.exists():
            original.write_bytes(encode(pixels(k, 230, 250, channels), "JPEG"))
        for image in range(k, num_images, len(classes)):
            os.link(original, folder / f"{image}.JPEG")
    return str(root)


def test_the_thousand_ids_are_those_of_the_training_set(tmp_path):
    ids = imagenet_variants.wordnet_ids()
    assert len(set(ids)) == 1000 and list(ids) == sorted(ids)
    for name in ("imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet2012"):
        labels = tfds.builder(name, data_dir=tmp_path).info.features["label"]
        assert labels.names == list(ids), name


@pytest.mark.parametrize("name", SETS)
def test_a_whole_set_is_opened_with_the_labels_of_imagenet(name, tmp_path):
    classes = true_classes(name)
    open_set, num_images = SETS[name]
    directory = lay_out(tmp_path / name, classes, num_images)
    (tmp_path / name / "README.txt").write_text("as in the archives")
    source = open_set(directory)
    assert len(source) == num_images and len(source.classes) == 1000
    some = range(0, num_images, num_images // 50)
    for record in map(pickle.loads(pickle.dumps(source)).__getitem__, some):
        folder = Path(record["name"]).parent.name
        assert imagenet_variants.wordnet_ids()[record["label"]] == folder
    labels = [source[k]["label"] for k in range(0, num_images, 20)]
    assert set(labels) <= set(classes) and len(set(labels)) == len(classes)


def test_a_and_r_share_86_classes():
    assert len(set(true_classes("a")) & set(true_classes("r"))) == 86


@pytest.mark.parametrize("damage, message", [
    ("one class less", "199 classes, .*; expected 200 classes, .* the sum 102178"),
    ("another class", r"200 classes, numbers .* with the sum 102179; expected"),
    ("the other set", "numbers 1, 2, 4 to 981, 983, 988 .*; expected .* 6, 11, 13 to"),
    ("one image less", "7,499 images; expected 7,500"),
    ("an image beside", "7,500 images, some of them outside of its classes"),
    ("a level too high", "it holds a. Give the directory right above the class"),
    ("another folder", "named by WordNet id, such as n01498041, .* it holds cats"),
    ("nothing", "it holds no folders"),
    ("no directory", "does not exist; expected a directory of images"),
])
def test_an_incomplete_set_is_refused(damage, message, tmp_path):
    classes, num_images, directory = true_classes("a"), 7_500, tmp_path / "a"
    if damage == "one class less":
        classes.pop(17)
    elif damage == "another class":
        place = next(k for k in range(5, 190) if classes[k] + 1 not in classes)
        classes[place] += 1
    elif damage == "the other set":
        classes = true_classes("r")
    elif damage in ("one image less", "an image beside"):
        num_images -= 1
    elif damage == "nothing":
        classes = []
    if damage in ("one image less", "an image beside"):
        lay_out(directory, classes, num_images)
    elif damage != "no directory":
        lay_out(directory, classes, len(classes))
    if damage == "an image beside":
        os.link(tmp_path / "a-0.jpg", directory / "beside.jpg")
    elif damage == "another folder":
        (directory / "cats").mkdir()
    elif damage == "a level too high":
        directory = tmp_path
    with pytest.raises(ValueError, match=message):
        imagenet_variants.imagenet_a(str(directory))


def test_imagenet_c_reaches_the_model_as_it_is_stored(tmp_path):
    folder = tmp_path / "fog" / "3"
    lay_out(folder, range(1000), 50_000)
    stored = pixels(5, 224, 224)
    first = folder / "n01440764" / "0.JPEG"
    first.unlink()
    first.write_bytes(encode(stored, "PNG"))
    source = imagenet_variants.imagenet_c(str(tmp_path), corruption="fog", severity=3)
    assert (len(source), len(source.classes), source[0]["label"]) == (50_000, 1000, 0)
    data = config(image_size=(224, 224), eval_crop_ratio=1.0, max_bad_share=0.0)
    with pipeline.eval_batches(source, data, batch_size=1, num_images=1) as batches:
        np.testing.assert_array_equal(next(batches)["image"][0], stored)


@pytest.mark.parametrize("corruption, severity, message", [
    ("spatter", 1, "Unknown corruption 'spatter'. Known: gaussian_noise, "),
    ("fog", 0, "severity=0 of fog; expected a whole number from 1 to 5"),
    ("snow", 2, "snow/2 does not exist; .* side by side. Found in .*: fog, weather"),
    ("fog", 1, "2 classes, .* expected 1000 classes, .* 997, 998, 999"),
])
def test_a_part_of_imagenet_c_is_refused(corruption, severity, message, tmp_path):
    lay_out(tmp_path / "fog" / "1", (3, 5), 10)
    (tmp_path / "weather").mkdir()
    with pytest.raises(ValueError, match=message):
        imagenet_variants.imagenet_c(
            str(tmp_path), corruption=corruption, severity=severity
        )


@pytest.mark.parametrize("name", ["a", "r"])
def test_only_the_classes_of_the_set_compete(name):
    rng = np.random.default_rng(0)
    classes = true_classes(name)
    labels = rng.permutation(np.repeat(classes, 3)).astype(np.int32)
    # Whole numbers, so that many logits tie.
    logits = rng.integers(0, 40, (len(labels), 1000)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += 15
    found = robustness.subset_accuracy(logits, labels)
    top = [0, 0]
    for row, label in zip(logits, labels):
        ranked = sorted(classes, key=lambda c: (-row[c], c))
        top[0] += ranked[0] == label
        top[1] += label in ranked[:5]
    assert found == {
        "top1": top[0] / len(labels), "top5": top[1] / len(labels),
        "images": 600.0, "classes": 200.0,
    }
    assert found["top1"] > accuracy.evaluate(logits, labels)["top1"] > 0


@pytest.mark.parametrize("num_classes, label, message", [
    (10, 3, "The head has 10 classes; .* 1000 of ImageNet-1k"),
    (21_841, 3, "The head has 21841 classes"),
    (1000, 1000, "labels outside of the head's 0 to 999, first image 1 with 1000"),
    (1000, -1, "first image 1 with -1"),
])
def test_a_head_of_other_classes_is_refused(num_classes, label, message):
    logits = np.zeros((2, num_classes), np.float32)
    with pytest.raises(ValueError, match=message):
        robustness.subset_accuracy(logits, np.array([0, label], np.int32))


def test_alexnet_has_a_hundred():
    errors = {
        (name, severity): robustness.ALEXNET_ERRORS[name] + 0.01 * (severity - 3)
        for name, severity in PAIRS
    }
    found = robustness.corruption_errors(errors)
    assert found["mce"] == pytest.approx(100, abs=1e-10)
    for name in robustness.CORRUPTIONS:
        assert found[f"ce/{name}"] == pytest.approx(100, abs=1e-10)
    assert found["mean_error"] == pytest.approx(11.834896 / 15)


def test_mce_by_hand():
    errors = dict.fromkeys(PAIRS, 0.0)
    errors |= {("brightness", severity): severity / 10 for severity in range(1, 6)}
    errors["pixelate", 5] = 1.0
    found = robustness.corruption_errors(errors)
    # Means 0.3 and 0.2 over the severities; AlexNet's 0.564592 and 0.717840.
    assert found["ce/brightness"] == pytest.approx(53.135716, abs=1e-5)
    assert found["ce/pixelate"] == pytest.approx(27.861362, abs=1e-5)
    assert found["ce/fog"] == 0
    assert found["mce"] == pytest.approx((53.135716 + 27.861362) / 15, abs=1e-6)
    assert found["mean_error"] == pytest.approx(0.5 / 15)
    assert found["error/brightness"] == pytest.approx(0.3)


def test_without_alexnet_there_is_no_mce():
    found = robustness.mean_errors(dict.fromkeys(PAIRS, 0.25))
    assert found["mean_error"] == 0.25 and len(found) == 16
    assert not any(name.startswith(("mce", "ce/")) for name in found)


@pytest.mark.parametrize("count", [
    robustness.mean_errors, robustness.corruption_errors,
])
def test_every_error_must_be_given_once_and_be_a_share(count):
    errors = dict.fromkeys(PAIRS, 0.5)
    del errors["snow", 2], errors["fog", 5]
    with pytest.raises(ValueError, match=r"2 of 75 .* \(snow 2, fog 5\)"):
        count(errors)
    with pytest.raises(ValueError, match=r"1 not part of the score .* \(spatter 1\)"):
        count(dict.fromkeys(PAIRS, 0.5) | {("spatter", 1): 0.5})
    for wrong in (51.7, float("nan"), -0.1):
        with pytest.raises(ValueError, match="snow 2 is .* from 0 to 1"):
            count(dict.fromkeys(PAIRS, 0.5) | {("snow", 2): wrong})
