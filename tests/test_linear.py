"""Linear probe: the exact regression, chosen without a look at the test set."""

import logging

import jax
import numpy as np
import pytest
import sklearn.linear_model

from crossmae_jax.evals import features, linear
from tests import test_features

PROBABILITY_ATOL = 1e-3  # both solvers stop at a small gradient, not at the minimum


@pytest.fixture(autouse=True)
def compiled_with_optimisation(monkeypatch):
    """As users compile it, not as tests do: unoptimised sums of float32 are coarser."""
    monkeypatch.setattr(linear, "_minimise", jax.jit(
        linear._minimise.__wrapped__,
        compiler_options={"xla_backend_optimization_level": 3},
    ))


@pytest.fixture(scope="module")
def digits():
    return test_features.digits()


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


def test_a_class_the_train_set_lacks_is_wrong_not_an_error():
    train = test_features.blobs(120, num_classes=4)
    test = test_features.blobs(40, num_classes=5, seed=1)
    assert linear.evaluate(train, test, l2s=(0.01,))["top1"] == 0.8


def test_probe_says_what_is_wrong_with_its_input():
    train, test = test_features.blobs(60), test_features.blobs(30)
    with pytest.raises(ValueError, match="have no label"):
        linear.evaluate(train, test._replace(labels=np.full(30, -1, np.int32)))
    with pytest.raises(ValueError, match="positive regularisations"):
        linear.evaluate(train, test, l2s=(0.1, 0.0))
    with pytest.raises(ValueError, match="4 train images cannot be split"):
        linear.evaluate(features.Features(*(array[:4] for array in train)), test)
