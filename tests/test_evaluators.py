"""Evaluators: every image once, the exact neighbours, the exact regression."""

import logging
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.linear_model

from crossmae_jax import evaluators
from crossmae_jax.evaluators import features, knn, linear

F32_ATOL = 1e-5
PROBABILITY_ATOL = 1e-3  # both solvers stop at a small gradient, not at the minimum


class Pictures(NamedTuple):
    image: jax.Array
    masked: jax.Array
    prediction: jax.Array
    pasted: jax.Array
    mask: jax.Array
    mse: jax.Array


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


@pytest.fixture(scope="module")
def digits():
    values, labels = sklearn.datasets.load_digits(return_X_y=True)
    values = np.tanh(values.astype(np.float32) / 8 - 1)
    labels = labels.astype(np.int32)
    return (
        features.Features(values[:1437], labels[:1437]),
        features.Features(values[1437:], labels[1437:]),
    )


# Features


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("num", [5, 16, 21])
def test_every_image_counts_once_whatever_the_tail(num, num_devices):
    images, labels = images_of(num)
    extracted = features.extract(
        PIXELS, batches(images, labels, 8), placer(num_devices), num_images=num
    )
    expected = (images / 255 - [0.5, 0.4]) / [0.2, 0.3]
    np.testing.assert_allclose(
        extracted.values, expected.reshape(num, -1), atol=F32_ATOL
    )
    np.testing.assert_array_equal(extracted.labels, labels)
    assert extracted.values.dtype == np.float32 and extracted.labels.dtype == np.int32


def test_features_keep_the_order_of_the_data_set_when_batches_do_not():
    images, labels = images_of(24)
    in_order = list(batches(images, labels, 8))
    extracted = features.extract(PIXELS, in_order, placer(1), num_images=24)
    turned = features.extract(PIXELS, in_order[::-1], placer(1), num_images=24)
    np.testing.assert_array_equal(extracted.values, turned.values)
    np.testing.assert_array_equal(extracted.labels, turned.labels)


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


# k nearest neighbours


def brute_force(train, test, *, k, temperature):
    """The definition, one test image at a time, in float64."""
    unit = [
        values / np.linalg.norm(values, axis=1, keepdims=True)
        for values in (train.values.astype(np.float64), test.values.astype(np.float64))
    ]
    hits = [0, 0]
    for query, label in zip(unit[1], test.labels):
        similarity = unit[0] @ query
        votes = np.zeros(train.labels.max() + 1)
        for i in np.argsort(-similarity, kind="stable")[:k]:
            votes[train.labels[i]] += np.exp(similarity[i] / temperature)
        guesses = np.argsort(-votes, kind="stable")
        hits[0] += guesses[0] == label
        hits[1] += label in guesses[:5] and votes[label] > 0
    return [hit / len(test.labels) for hit in hits]


@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_equals_brute_force(k):
    train, test = blobs(333, noise=0.35), blobs(101, seed=1, noise=0.35)
    top1, top5 = brute_force(train, test, k=k, temperature=0.07)
    assert 0.2 < top1 < 0.95  # hard enough to tell implementations apart
    assert knn.evaluate(train, test, k=k, temperature=0.07) == {
        "top1": pytest.approx(top1), "top5": pytest.approx(top5),
    }


def test_knn_on_raw_digits_equals_brute_force_and_has_no_top5(digits):
    train, test = digits
    top1, _ = brute_force(train, test, k=20, temperature=0.07)
    assert knn.evaluate(train, test, k=20, temperature=0.07) == {
        "top1": pytest.approx(top1)
    }
    assert top1 > 0.9


def test_knn_classifies_separable_blobs_without_an_error():
    metrics = knn.evaluate(blobs(600), blobs(90, seed=1), k=20, temperature=0.07)
    assert metrics == {"top1": 1.0, "top5": 1.0}


@pytest.mark.parametrize(
    "query_block, bank_block", [(1, 7), (32, 64), (1000, 1000), (13, 200)]
)
def test_neighbours_do_not_depend_on_the_blocks(query_block, bank_block):
    rng = np.random.default_rng(0)
    # Small integers repeat themselves: many similarities are equal, the order is not.
    bank = rng.integers(-2, 3, (200, 4)).astype(np.float32)
    queries = rng.integers(-2, 3, (33, 4)).astype(np.float32)
    similarity, index = knn.neighbours(
        bank, queries, k=9, query_block=query_block, bank_block=bank_block
    )
    unit = [
        values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        for values in (bank, queries)
    ]
    every = unit[1] @ unit[0].T
    expected = -np.sort(-every, axis=1)[:, :9]
    np.testing.assert_allclose(similarity, expected, atol=F32_ATOL)
    rows = np.take_along_axis(every, index, axis=1)
    np.testing.assert_allclose(rows, expected, atol=F32_ATOL)
    assert all(len(set(row)) == 9 for row in index)


def test_equally_similar_neighbours_come_in_the_order_of_the_bank():
    bank = np.ones((20, 3), np.float32)
    _, index = knn.neighbours(bank, bank[:2], k=6, query_block=1, bank_block=4)
    # A short bank block still has to hold k rows, hence blocks of 6.
    np.testing.assert_array_equal(index, np.tile(np.arange(6), (2, 1)))


def test_one_close_neighbour_outvotes_two_distant_ones():
    train = features.Features(
        np.float32([[1, 0], [0.6, 0.8], [0.6, -0.8]]), np.int32([1, 0, 0])
    )
    test = features.Features(np.float32([[1, 0]]), np.int32([1]))
    # Weights exp(1 / t) against 2 exp(.6 / t): equal at t = .4 / log 2 = .58.
    assert knn.evaluate(train, test, k=3, temperature=0.5)["top1"] == 1.0
    assert knn.evaluate(train, test, k=3, temperature=0.7)["top1"] == 0.0
    assert knn.evaluate(train, test, k=3, temperature=1e-4)["top1"] == 1.0


def test_knn_holds_one_tile_of_similarities_at_the_size_of_imagenet():
    f32, num_queries = jnp.float32, 50 * 1024
    compiled = knn._merge_block.lower(
        (
            jax.ShapeDtypeStruct((50, 1024, 20), f32),
            jax.ShapeDtypeStruct((50, 1024, 20), jnp.int32),
        ),
        jax.ShapeDtypeStruct((50, 1024, 768), f32),
        jax.ShapeDtypeStruct((8192, 768), f32),
        0,
        1_281_167,
    ).compile()
    tile, all_pairs = 1024 * 8192 * 4, num_queries * 8192 * 4
    assert tile < compiled.memory_analysis().temp_size_in_bytes < all_pairs / 5


def test_a_class_the_train_set_lacks_is_wrong_not_an_error():
    train, test = blobs(120, num_classes=4), blobs(40, num_classes=5, seed=1)
    assert knn.evaluate(train, test, k=5, temperature=0.07)["top1"] == 0.8
    assert linear.evaluate(train, test, l2s=(0.01,))["top1"] == 0.8


@pytest.mark.parametrize("change, message", [
    (dict(k=0), "k=0 neighbours of 60 train images"),
    (dict(k=61), "choose 1 <= k <= 60"),
    (dict(temperature=0.0), "temperature=0.0"),
    (dict(test_labels=-1), "30 of 30 test images have no label"),
    (dict(train_labels=-1), "60 of 60 train images have no label"),
    (dict(width=39), "40 dimensions, test features 39"),
    (dict(num_test=0), "test set holds no images"),
])
def test_knn_says_what_is_wrong_with_its_input(change, message):
    train, test = blobs(60), blobs(30)
    if "test_labels" in change:
        test = test._replace(labels=np.full(30, -1, np.int32))
    if "train_labels" in change:
        train = train._replace(labels=np.full(60, -1, np.int32))
    test = test._replace(values=test.values[:, : change.get("width", 40)])
    test = features.Features(*(array[: change.get("num_test", 30)] for array in test))
    options = {"k": change.get("k", 5), "temperature": change.get("temperature", 0.07)}
    with pytest.raises(ValueError, match=message):
        knn.evaluate(train, test, **options)


# Linear probe


def probabilities(classifier, values):
    logits = values @ np.asarray(classifier.kernel) + np.asarray(classifier.bias)[None]
    return np.asarray(jax.nn.softmax(logits))


def standardised(digits):
    train, test = digits
    standardise = linear._standardiser(train.values)
    return tuple(
        data._replace(values=standardise(data.values)) for data in (train, test)
    )


@pytest.mark.parametrize("l2", [1e-1, 1e-2, 1e-3, 1e-4])
def test_probe_equals_scikit_learn_at_the_same_regularisation(digits, l2):
    train, test = standardised(digits)
    ours = probabilities(linear.fit(train, num_classes=10, l2=l2), test.values)
    theirs = sklearn.linear_model.LogisticRegression(
        C=1 / (l2 * len(train.labels)), tol=1e-6, max_iter=5000
    ).fit(train.values.astype(np.float64), train.labels)
    expected = theirs.predict_proba(test.values.astype(np.float64))
    np.testing.assert_allclose(ours, expected, atol=PROBABILITY_ATOL)
    np.testing.assert_array_equal(ours.argmax(1), expected.argmax(1))
    whole = linear.evaluate(*digits, l2s=(l2,))
    assert whole == {"top1": np.mean(expected.argmax(1) == test.labels), "l2": l2}


def test_probe_is_deterministic_and_never_looks_at_the_test_labels(digits):
    train, test = digits
    first = linear.evaluate(train, test)
    assert linear.evaluate(train, test) == first
    assert first["top1"] > 0.85
    elsewhere = linear.evaluate(train, test._replace(labels=(test.labels + 1) % 10))
    assert elsewhere["l2"] == first["l2"] and elsewhere["top1"] < 0.1


def test_probe_regularises_where_most_dimensions_are_noise():
    rng = np.random.default_rng(0)

    def noisy(num):
        labels = rng.integers(0, 2, num).astype(np.int32)
        values = rng.standard_normal((num, 300), np.float32)
        values[:, :5] += (2 * labels - 1)[:, None] * 0.5
        return features.Features(values, labels)

    train, test = noisy(400), noisy(2000)
    chosen = linear.evaluate(train, test)
    weakest = linear.evaluate(train, test, l2s=(1e-5,))
    assert chosen["l2"] == 1e-1
    assert chosen["top1"] > weakest["top1"] + 0.015


def test_an_example_of_weight_zero_has_no_say(digits):
    train, _ = standardised(digits)
    kept = (np.arange(len(train.labels)) % 3 > 0).astype(np.float32)
    options = dict(num_classes=10, l2=1e-2)
    first = linear.fit(train, weights=kept, **options)
    wrong = train._replace(labels=np.where(kept, train.labels, 0).astype(np.int32))
    np.testing.assert_array_equal(
        linear.fit(wrong, weights=kept, **options).kernel, first.kernel
    )
    all_count = linear.fit(wrong, **options)
    assert np.abs(all_count.kernel - first.kernel).max() > 0.1


def test_working_in_blocks_does_not_change_the_solution(digits, monkeypatch):
    train, _ = standardised(digits)
    whole = linear.fit(train, num_classes=10, l2=1e-2)
    monkeypatch.setattr(linear, "_BLOCK_ELEMENTS", 10 * 100)  # 100 rows of 10 classes
    assert linear._blocks(train, 10).labels.shape == (15, 100)
    blocked = linear.fit(train, num_classes=10, l2=1e-2)
    np.testing.assert_allclose(blocked.kernel, whole.kernel, atol=1e-4)


def test_a_constant_dimension_changes_nothing(digits):
    assert np.ptp(digits[0].values[:, 0]) == np.ptp(digits[1].values[:, 0]) == 0
    shifted = [data._replace(values=data.values.copy()) for data in digits]
    for data in shifted:
        data.values[:, 0] = 1e4 / 3
    # Were it divided by its deviation of rounding errors, it would be a huge noise.
    scaled = linear._standardiser(shifted[0].values)(shifted[0].values)
    assert np.abs(scaled[:, 0]).max() < 1e-3
    options = dict(l2s=(0.01,))
    assert linear.evaluate(*shifted, **options) == linear.evaluate(*digits, **options)


def test_a_fit_that_does_not_converge_says_so(digits, caplog):
    train, _ = standardised(digits)
    with caplog.at_level(logging.WARNING):
        linear.fit(train, num_classes=10, l2=1e-2)
        assert not caplog.records
        linear.fit(train, num_classes=10, l2=1e-2, max_iterations=3)
    assert "stopped after max_iterations=3 at gradient" in caplog.text


def test_probe_says_what_is_wrong_with_its_input():
    train, test = blobs(60), blobs(30)
    with pytest.raises(ValueError, match="have no label"):
        linear.evaluate(train, test._replace(labels=np.full(30, -1, np.int32)))
    with pytest.raises(ValueError, match="positive regularisations"):
        linear.evaluate(train, test, l2s=(0.1, 0.0))
    with pytest.raises(ValueError, match="4 train images cannot be split"):
        linear.evaluate(features.Features(*(array[:4] for array in train)), test)


# All of them together


def evaluation_of(images, labels, tmp_path, *, splits=("train", "eval"), log=None):
    """An Evaluation of two splits of the same images, with pictures made by hand."""
    log = [] if log is None else log

    def split_batches(split, num_images):
        log.append((split, num_images))
        return batches(images[:num_images], labels[:num_images], 8)

    @jax.jit
    def reconstruct(batch):
        image = batch["image"] / 255.0
        mask = jnp.ones((8, 5), bool).at[:, 0].set(False)  # 2 x 2 pixels a patch
        mse = batch["sample"].astype(jnp.float32)
        return Pictures(image, image, image, image, mask, mse)

    return evaluators.Evaluation(
        batches=split_batches,
        num_images=dict.fromkeys(splits, len(images)),
        place=placer(8),
        predict=PIXELS,
        reconstruct=reconstruct,
        panel=tmp_path / "panels" / "step_00000007.png",
        caption="made by hand",
    )


def test_knn_and_linear_share_the_features_of_both_splits(tmp_path):
    log = []
    evaluation = evaluation_of(*images_of(120), tmp_path, log=log)
    knn_result = evaluators.run(
        "knn", evaluation, dict(every_epochs=5.0, k=1, temperature=0.07)
    )
    linear_result = evaluators.run(
        "linear", evaluation, dict(every_epochs=0.0, l2s=(0.01,))
    )
    assert sorted(log) == [("eval", None), ("train", None)]
    assert knn_result == evaluators.Result({"top1": 1.0})  # its own nearest neighbour
    assert set(linear_result.metrics) == {"top1", "l2"}


def test_fewer_train_images_are_asked_for_not_thrown_away(tmp_path):
    log = []
    evaluation = evaluation_of(*images_of(50), tmp_path, log=log)
    options = dict(k=1, temperature=0.07)
    evaluators.run("knn", evaluation, dict(options, max_train_images=20))
    assert log == [("train", 20), ("eval", None)]
    evaluators.run("knn", evaluation, dict(options, max_train_images=10**6))
    assert log == [("train", 20), ("eval", None), ("train", None)]


@pytest.mark.parametrize(
    "splits, shown", [(("train", "eval"), "eval"), (("train",), "train")]
)
def test_reconstruction_writes_a_panel_and_ignores_the_padding(
    tmp_path, splits, shown
):
    log = []
    evaluation = evaluation_of(*images_of(30), tmp_path, splits=splits, log=log)
    result = evaluators.run(
        "reconstruction", evaluation, dict(every_epochs=10.0, num_images=11)
    )
    assert log == [(shown, 11)]
    assert result.metrics == {"mse": np.mean(np.arange(11))}
    assert result.files == (tmp_path / "panels" / "step_00000007.png",)
    assert pathlib.Path(result.files[0]).read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_evaluated_is_known_before_the_training():
    both = {"train": 100, "eval": 20}
    evaluators.check(evaluators.EVALUATORS, num_images=both, num_classes=10)
    evaluators.check(["reconstruction"], num_images={"train": 100}, num_classes=0)
    with pytest.raises(ValueError, match="Unknown evaluator 'knm'.*Known: knn, linear"):
        evaluators.check(["knm"], num_images=both, num_classes=10)
    with pytest.raises(ValueError, match="evals.linear needs labels"):
        evaluators.check(["linear"], num_images=both, num_classes=0)
    with pytest.raises(ValueError, match="no evaluation split. Set data.eval_split"):
        evaluators.check(["knn"], num_images={"train": 100}, num_classes=10)


def test_the_table_is_aligned_and_shows_what_was_not_evaluated():
    table = evaluators.table({
        "raw pixels": {"knn/top1": 0.98125, "linear/top1": 1.0, "linear/l2": 0.1},
        "pre-trained": {"knn/top1": 0.5},
    })
    assert table.splitlines() == [
        "| features    | k-NN top-1 | linear top-1 |",
        "|-------------|-----------:|-------------:|",
        "| raw pixels  |     98.1 % |      100.0 % |",
        "| pre-trained |     50.0 % |            - |",
    ]
