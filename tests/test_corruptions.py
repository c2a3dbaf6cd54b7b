"""Corrupted images: the same for any workers, worse with severity, clear refusals."""

import concurrent.futures
import pickle
import sys

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from crossmae_jax.data import decoding, pipeline, sources, transforms
from crossmae_jax.data.sets import corruptions
from tests.image_files import config, encode, pixels, write

SIZE = (64, 64)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Four cuts of scikit-learn's two photographs, as JPEGs in two classes."""
    root = tmp_path_factory.mktemp("photographs")
    for k, photograph in enumerate(load_sample_images().images):
        for part in range(2):
            cut = photograph[40 * part : 40 * part + 240, 90 * part : 90 * part + 330]
            write(root / f"class{k}" / f"{part}.jpg", encode(cut, "JPEG", quality=95))
    return sources.FolderSource(str(root))


def corrupted(source, name="gaussian_noise", severity=2, seed=0, **changes):
    data = config(**dict(image_size=SIZE) | changes)
    return corruptions.Corrupted(
        source, data, corruption=name, severity=severity, seed=seed
    )


def images(source):
    return np.stack([source[k]["image"] for k in range(len(source))])


def clean(source):
    return np.stack([
        transforms.eval_image(
            source[k]["image"], image_size=SIZE, channels=3, crop_ratio=0.875, name=""
        )
        for k in range(len(source))
    ])


def test_images_of_too_many_pixels_are_bad_images_here_too(photographs):
    allowed = corrupted(photographs)
    refusing = corrupted(photographs, max_pixels=10)
    with pytest.raises(decoding.BadImage, match="data.max_pixels=10 is the most"):
        refusing[0]
    assert allowed[0]["image"].shape == (*SIZE, 3)
    assert refusing.fingerprint == allowed.fingerprint  # it changes no image


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_a_higher_severity_is_farther_from_the_clean_image(name, photographs):
    target = clean(photographs).astype(float)
    # Glass blur is compiled again for severity 3, which takes seconds.
    severities = (1, 2, 4, 5) if name == "glass_blur" else corruptions.SEVERITIES
    distances = [
        np.sqrt(np.mean((images(corrupted(photographs, name, severity)) - target) ** 2))
        for severity in severities
    ]
    assert distances[0] > 1, "even the least severity changes the image"
    assert distances[-1] > 1.1 * distances[0], distances
    assert np.corrcoef(distances, severities)[0, 1] > 0.8, distances


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_an_image_is_a_function_of_its_number(name, photographs):
    source = corrupted(photographs, name)
    np.random.seed(7)
    state = np.random.get_state()[1].copy()
    alone = source[2]
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    source[0], np.random.random(3)
    np.testing.assert_array_equal(source[2]["image"], alone["image"])
    assert alone["image"].dtype == np.uint8 and alone["image"].shape == (*SIZE, 3)
    assert (alone["label"], alone["name"]) == (1, photographs.name(2))


@pytest.mark.parametrize("name", [
    "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur",
    "snow", "frost", "fog", "elastic_transform",
])
def test_seed_image_and_severity_draw_different_noise(name, tmp_path):
    for k in range(2):
        write(tmp_path / f"{k}.png", encode(pixels(0, *SIZE)))
    source = sources.FolderSource(str(tmp_path))
    first, second = images(corrupted(source, name))
    assert (first != second).any()
    assert (corrupted(source, name, seed=1)[0]["image"] != first).any()


def test_threads_do_not_draw_from_each_other(photographs):
    source = corrupted(photographs, "fog")  # draws a dozen times for an image
    alone = images(source)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: source[k % 4]["image"], range(200)))
    np.testing.assert_array_equal(found, np.tile(alone, (50, 1, 1, 1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_passes_them_on_unchanged(workers, photographs):
    source = corrupted(photographs, "fog")
    data = config(image_size=SIZE, eval_crop_ratio=1.0, workers=workers)
    with pipeline.eval_batches(source, data, batch_size=3) as batches:
        batches = list(batches)
    found = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(found[:4], images(source))
    assert not found[4:].any()
    labels = np.concatenate([batch["label"] for batch in batches])
    assert list(labels) == [0, 0, 1, 1, -1, -1]


def test_a_pickled_source_is_the_same_source(photographs):
    source = corrupted(photographs, "snow")
    assert isinstance(source, sources.Source)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[2]["image"], source[2]["image"])
    assert again.fingerprint == source.fingerprint
    assert (len(again), len(again.classes)) == (4, 2)
    assert again.name(3) == photographs.name(3)


def test_the_fingerprint_tells_everything_apart(photographs):
    variants = [
        corrupted(photographs), corrupted(photographs, "fog"),
        corrupted(photographs, severity=4), corrupted(photographs, seed=1),
        corrupted(photographs, image_size=(64, 96)),
        corrupted(photographs, eval_crop_ratio=1.0),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (40, 48)])
def test_grey_and_the_smallest_images_work(name, size, tmp_path):
    grey = pixels(1, *size, channels=1)
    write(tmp_path / "a.png", encode(grey))
    source = sources.FolderSource(str(tmp_path))
    found = corrupted(source, name, 5, image_size=size, channels=1)[0]["image"]
    assert found.shape == (*size, 1) and found.dtype == np.uint8
    assert (found != grey).mean() > 0.1


def test_a_damaged_file_is_a_bad_image(tmp_path):
    write(tmp_path / "a.jpg", b"no image")
    source = corrupted(sources.FolderSource(str(tmp_path)))
    with pytest.raises(decoding.BadImage, match="a.jpg"):
        source[0]


@pytest.mark.parametrize("changes, message", [
    (dict(name="blur"), r"Unknown corruption 'blur'\. Known: gaussian_noise, shot_"),
    (dict(severity=0), "severity=0 of gaussian_noise; .* from 1 to 5"),
    (dict(severity=6), "severity=6"),
    (dict(seed=-1), "seed=-1"),
    (dict(image_size=(16, 16)), r"\(16, 16\) is too small .* 32 x 32 pixels or more"),
    (dict(channels=4), "data.channels=4 .* 1 channel .* or 3"),
])
def test_what_cannot_be_is_refused(changes, message, photographs):
    with pytest.raises(ValueError, match=message):
        corrupted(photographs, **changes)


def test_the_error_names_the_extra(monkeypatch, photographs):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ImportError, match=r"is not installed: .*jax\[robustness\]'"):
        corrupted(photographs)


def test_a_library_without_opencv_says_what_it_needs(monkeypatch, photographs):
    for name in ("imagecorruptions", "imagecorruptions.corruptions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"does not import \(.*cv2.*libgl1"):
        corrupted(photographs)
