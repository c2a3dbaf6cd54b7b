"""The effective rank of features, from matrices whose singular values are known."""

import math

import numpy as np
import pytest

from crossmae_jax.evals import rank

F64_RTOL = 1e-9


def with_singular_values(values, *, rows=40, width=12, seed=0):
    """Features f64[rows width] that have these singular values once centred."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(rows, len(values)))
    left, _ = np.linalg.qr(noise - noise.mean(axis=0))
    right, _ = np.linalg.qr(random.normal(size=(width, len(values))))
    return (left * values) @ right.T + random.normal(size=width)


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_k_equal_singular_values_have_effective_rank_k(k):
    features = with_singular_values(np.full(k, 3.0))
    assert rank.effective_rank(features) == pytest.approx(k, rel=F64_RTOL)


def test_unequal_singular_values_count_by_their_entropy():
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    features = with_singular_values(np.array([3.0, 1.0]))
    found = rank.effective_rank(features)
    assert found == pytest.approx(math.exp(entropy), rel=F64_RTOL)


def test_rows_on_one_line_have_rank_one_and_equal_rows_none():
    line = np.arange(5.0)[:, None] * np.array([1.0, -2.0, 0.5]) + 7
    assert rank.effective_rank(line) == pytest.approx(1.0, rel=1e-6)
    same = np.tile(np.float32([0.1, 0.7, -3.3]), (9, 1))
    assert rank.effective_rank(same) == 0.0


def test_rotation_scale_and_a_common_shift_do_not_matter():
    random = np.random.default_rng(1)
    features = random.normal(size=(50, 8)) * np.arange(1, 9)
    rotation, _ = np.linalg.qr(random.normal(size=(8, 8)))
    expected = rank.effective_rank(features)
    for changed in (features @ rotation, 1e-3 * features, features + 5):
        found = rank.effective_rank(changed)
        assert found == pytest.approx(expected, rel=F64_RTOL)


@pytest.mark.parametrize("n, d", [(5, 30), (200, 6)])
def test_it_stays_below_its_bound(n, d):
    features = np.random.default_rng(2).normal(size=(n, d))
    assert 1 < rank.effective_rank(features) <= min(n - 1, d) + 1e-9


def test_what_has_no_effective_rank_is_refused():
    with pytest.raises(ValueError, match="of 1 rows of features; give at least 2"):
        rank.effective_rank(np.ones((1, 4)))
    with pytest.raises(ValueError, match="not finite; the weights have diverged"):
        rank.effective_rank(np.array([[1.0, np.nan], [0.0, 1.0]]))
