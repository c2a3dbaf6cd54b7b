"""k nearest neighbours: exact, whatever the blocks, and in a bounded memory."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax.evals import features, knn
from tests.test_features import blobs, digits

F32_ATOL = 1e-5


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


def test_several_numbers_of_neighbours_are_counted_on_one_search(monkeypatch):
    train, test = blobs(333, noise=0.35), blobs(101, seed=1, noise=0.35)
    searches, search = [], knn.neighbours
    monkeypatch.setattr(
        knn, "neighbours",
        lambda *arrays, k: (searches.append(k), search(*arrays, k=k))[1],
    )
    found = knn.evaluate(train, test, k=(20, 10, 200, 100), temperature=0.07)
    assert searches == [200]
    assert list(found)[:3] == ["k20/top1", "k20/top5", "k10/top1"]
    for k in (10, 20, 100, 200):
        top1, top5 = brute_force(train, test, k=k, temperature=0.07)
        assert found[f"k{k}/top1"] == pytest.approx(top1)
        assert found[f"k{k}/top5"] == pytest.approx(top5)
    assert len({found[f"k{k}/top1"] for k in (10, 20, 100, 200)}) > 1


def test_knn_on_raw_digits_equals_brute_force_and_has_no_top5():
    train, test = digits()
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
        bank, queries, k=9, query_block=query_block, bank_block=bank_block, group=26
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
    f32, rows, columns = jnp.float32, knn._QUERY_BLOCK, knn._BANK_BLOCK
    num_blocks = -(-50_000 // rows)
    compiled = knn._merge_block.lower(
        (
            jax.ShapeDtypeStruct((num_blocks, rows, 200), f32),
            jax.ShapeDtypeStruct((num_blocks, rows, 200), jnp.int32),
        ),
        jax.ShapeDtypeStruct((num_blocks, rows, 768), f32),
        jax.ShapeDtypeStruct((columns, 768), f32),
        0,
        1_281_167,
    ).compile()
    tile, all_pairs = rows * columns * 4, 50_000 * columns * 4
    assert tile < compiled.memory_analysis().temp_size_in_bytes < all_pairs / 5


@pytest.mark.parametrize("num_bank, num_queries", [(100_000, 10), (10, 100_000)])
def test_neither_set_is_copied_whole(num_bank, num_queries):
    rng = np.random.default_rng(0)
    bank, queries = (
        rng.standard_normal((num, 48), np.float32) for num in (num_bank, num_queries)
    )
    tracemalloc.start()
    similarity, index = knn.neighbours(
        bank, queries, k=2, query_block=1000, bank_block=1000, group=10_000
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    larger = max(bank.nbytes, queries.nbytes)
    assert peak - similarity.nbytes - index.nbytes < larger / 4


def test_a_class_the_train_set_lacks_is_wrong_not_an_error():
    train, test = blobs(120, num_classes=4), blobs(40, num_classes=5, seed=1)
    assert knn.evaluate(train, test, k=5, temperature=0.07)["top1"] == 0.8


@pytest.mark.parametrize("change, message", [
    (dict(k=0), "k=0 neighbours of 60 train images"),
    (dict(k=61), "choose 1 <= k <= 60"),
    (dict(k=(5, 61, 20)), "k=61 neighbours of 60 train images"),
    (dict(k=(5, 5)), r"k=\(5, 5\); give a whole number of neighbours, or several dif"),
    (dict(k=()), r"k=\(\); give a whole number"),
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
