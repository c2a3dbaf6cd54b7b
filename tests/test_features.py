"""Features: every image once, in order, finite; and data to make features of."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets

from crossmae_jax.evals import features

F32_ATOL = 1e-5


def batches(images, labels, batch_size):
    """Yields padded batches; the padding repeats image 0, as if it were real."""
    for start in range(0, len(images), batch_size):
        sample = np.arange(start, start + batch_size)
        valid = sample < len(images)
        sample = np.where(valid, sample, 0)
        yield {
            "image": images[sample],
            "label": labels[sample],
            "valid": valid,
            "sample": sample.astype(np.uint32),
        }


def placer(num_devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return lambda batch: jax.device_put(batch, spread)


def images_of(num, *, height=2, width=10, channels=2):
    rng = np.random.default_rng(num)
    images = rng.integers(0, 256, (num, height, width, channels), np.uint8)
    return images, rng.integers(0, 4, num).astype(np.int32)


PIXELS = features.raw_pixels(mean=(0.5, 0.4), std=(0.2, 0.3))


def blobs(num, *, num_classes=30, seed=0, noise=0.05):
    """Points around distant directions, one per class."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num) % num_classes).astype(np.int32)
    centres = np.eye(num_classes, 40, dtype=np.float32)
    noise = noise * rng.standard_normal((num, 40), np.float32)
    return features.Features(centres[labels] + noise, labels)


@functools.cache
def digits():
    """The real digits, (train, test); pixels in -1..1."""
    values, labels = sklearn.datasets.load_digits(return_X_y=True)
    values = np.tanh(values.astype(np.float32) / 8 - 1)
    labels = labels.astype(np.int32)
    return (
        features.Features(values[:1437], labels[:1437]),
        features.Features(values[1437:], labels[1437:]),
    )


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("num", [5, 16, 21])
def test_every_image_counts_once_whatever_the_tail(num, num_devices):
    images, labels = images_of(num)
    extracted = features.extract(
        PIXELS, batches(images, labels, 8), placer(num_devices), num_images=num
    )["features"]
    expected = (images / 255 - [0.5, 0.4]) / [0.2, 0.3]
    np.testing.assert_allclose(
        extracted.values, expected.reshape(num, -1), atol=F32_ATOL
    )
    np.testing.assert_array_equal(extracted.labels, labels)
    assert extracted.values.dtype == np.float32 and extracted.labels.dtype == np.int32


def test_features_keep_the_order_of_the_data_set_when_batches_do_not():
    images, labels = images_of(24)
    in_order = list(batches(images, labels, 8))
    extracted, turned = (
        features.extract(PIXELS, each, placer(1), num_images=24)["features"]
        for each in (in_order, in_order[::-1])
    )
    np.testing.assert_array_equal(extracted.values, turned.values)
    np.testing.assert_array_equal(extracted.labels, turned.labels)


def test_every_output_that_is_asked_for_is_kept_of_one_pass():
    images, labels = images_of(21)
    calls = []

    def predict(batch):
        calls.append(batch)
        mean = batch["image"].astype(jnp.float32).mean((1, 2))
        return {"mean": mean, "sum": 20 * mean, "other": mean}

    found = features.extract(
        predict, batches(images, labels, 8), placer(8), num_images=21,
        outputs=("sum", "mean"),
    )
    assert len(calls) == 3 and set(found) == {"mean", "sum"}
    for name, expected in (("mean", images.mean((1, 2))), ("sum", images.sum((1, 2)))):
        np.testing.assert_allclose(found[name].values, expected, rtol=1e-5)
        np.testing.assert_array_equal(found[name].labels, labels)
    with pytest.raises(ValueError, match="No output logits .* has mean, other, sum"):
        features.extract(
            predict, batches(images, labels, 8), placer(8), num_images=21,
            outputs=("mean", "logits"),
        )


@pytest.mark.parametrize("turn", [1, -1])
def test_the_features_of_a_split_are_never_held_twice(turn):
    """Whatever the order of their batches; samples are those of a part of a split."""
    num, width = 16_000, 300
    spread = jnp.linspace(0.5, 2.0, width)[None]

    @jax.jit
    def predict(batch):
        return {"features": batch["sample"][:, None] * spread}

    def parts():
        for start in range(0, num, 500)[::turn]:
            sample = 3 * np.arange(start, start + 500, dtype=np.uint32)
            yield {
                "image": np.zeros((500, 1, 1, 1), np.uint8), "sample": sample,
                "label": sample.astype(np.int32), "valid": np.ones(500, bool),
            }

    tracemalloc.start()
    found = features.extract(predict, parts(), placer(1), num_images=num)["features"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(found.labels, 3 * np.arange(num))
    expected = found.labels[:, None] * np.linspace(0.5, 2.0, width)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    assert found.values.nbytes < peak < 1.25 * found.values.nbytes


def test_a_missing_or_repeated_image_is_an_error():
    images, labels = images_of(21)
    every = list(batches(images, labels, 8))
    with pytest.raises(ValueError, match="Extracted 16 images, 16 .* num_images=21"):
        features.extract(PIXELS, every[:2], placer(1), num_images=21)
    with pytest.raises(ValueError, match="Extracted 29 images, 21 .* num_images=21"):
        features.extract(PIXELS, [*every, every[0]], placer(1), num_images=21)
    with pytest.raises(ValueError, match="Extracted 21 images, 16 of them different"):
        features.extract(
            PIXELS, [every[0], every[1], {**every[2], "sample": np.arange(8)}],
            placer(1), num_images=21,
        )
    with pytest.raises(ValueError, match="num_images=21"):
        features.extract(PIXELS, [], placer(1), num_images=21)


def test_features_that_are_not_finite_name_the_first_image():
    images, labels = images_of(10)
    images[6] = 0

    @jax.jit
    def predict(batch):
        values = batch["image"].reshape(8, -1).astype(jnp.float32)
        return {"features": values / values.sum(-1, keepdims=True)}

    with pytest.raises(ValueError, match="1 of 10 images .* first sample=6"):
        features.extract(predict, batches(images, labels, 8), placer(1), num_images=10)
