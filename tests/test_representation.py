"""The effective rank of features, from matrices whose singular values are known."""

import math

import numpy as np
import pytest

from crossmae_jax.evals import representation

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
    assert representation.effective_rank(features) == pytest.approx(k, rel=F64_RTOL)


def test_unequal_singular_values_count_by_their_entropy():
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    features = with_singular_values(np.array([3.0, 1.0]))
    found = representation.effective_rank(features)
    assert found == pytest.approx(math.exp(entropy), rel=F64_RTOL)


def test_rows_on_one_line_have_rank_one_and_equal_rows_none():
    line = np.arange(5.0)[:, None] * np.array([1.0, -2.0, 0.5]) + 7
    assert representation.effective_rank(line) == pytest.approx(1.0, rel=1e-6)
    same = np.tile(np.float32([0.1, 0.7, -3.3]), (9, 1))
    assert representation.effective_rank(same) == 0.0


def test_rotation_scale_and_a_common_shift_do_not_matter():
    random = np.random.default_rng(1)
    features = random.normal(size=(50, 8)) * np.arange(1, 9)
    rotation, _ = np.linalg.qr(random.normal(size=(8, 8)))
    expected = representation.effective_rank(features)
    for changed in (features @ rotation, 1e-3 * features, features + 5):
        found = representation.effective_rank(changed)
        assert found == pytest.approx(expected, rel=F64_RTOL)


@pytest.mark.parametrize("n, d", [(5, 30), (200, 6)])
def test_it_stays_below_its_bound(n, d):
    features = np.random.default_rng(2).normal(size=(n, d))
    assert 1 < representation.effective_rank(features) <= min(n - 1, d) + 1e-9


def test_what_has_no_effective_rank_is_refused():
    with pytest.raises(ValueError, match="of 1 rows of features; give at least 2"):
        representation.effective_rank(np.ones((1, 4)))
    with pytest.raises(ValueError, match="not finite; the weights have diverged"):
        representation.effective_rank(np.array([[1.0, np.nan], [0.0, 1.0]]))


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@pytest.mark.parametrize("num", [6, 200])  # by n x n, and by d x e
def test_cka_knows_rotated_and_scaled_features_again(num):
    x = np.random.default_rng(0).normal(size=(num, 8))
    assert representation.cka(x, 3 * x @ orthogonal(8) + 5) == pytest.approx(1)
    stretched = x * np.array([100, *[1] * 7])
    assert representation.cka(x, stretched) < 0.8


def test_cka_is_the_share_of_what_two_have_in_common():
    """Orthonormal columns: of two, one is shared, so |Y'X|^2 = 1, |X'X| = sqrt 2."""
    columns = orthogonal(12)[:, :4]
    columns = np.linalg.qr(columns - columns.mean(0))[0]
    found = representation.cka(columns[:, :2], columns[:, 1:3])
    assert found == pytest.approx(1 / 2)
    assert representation.cka(columns[:, :2], columns[:, 2:]) == pytest.approx(0)
    matrix = representation.cka_matrix(
        [columns[:, :2], columns[:, 2:]], [columns[:, :2], columns[:, 1:3]]
    )
    np.testing.assert_allclose(matrix, [[1, 0.5], [0, 0.5]], atol=1e-12)


def test_cka_is_the_same_by_either_matrix():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(9, 9)), random.normal(size=(9, 9))
    wide = np.concatenate([x, np.zeros((9, 1))], axis=1)  # by n x n
    assert representation.cka(x, y) == pytest.approx(representation.cka(wide, y))


def test_cka_needs_the_same_images_and_something_to_compare():
    x = np.random.default_rng(0).normal(size=(5, 3))
    with pytest.raises(ValueError, match="5 and 4 images"):
        representation.cka(x, x[:4])
    with pytest.raises(ValueError, match="equal: there is nothing"):
        representation.cka(x, np.ones((5, 3)))


def test_colours_are_the_main_components_of_all_images_together():
    random = np.random.default_rng(0)
    values = random.normal(size=(2, 600, 3)) * np.array([9, 3, 1])
    tokens = np.concatenate([values, np.zeros((2, 600, 2))], axis=2) @ orthogonal(5)
    found = representation.principal_colours(tokens, grid=(20, 30))
    assert found.shape == (2, 20, 30, 3) and found.min() == 0 and found.max() == 1
    for i in range(3):
        exact = abs(np.corrcoef(found[..., i].ravel(), values[..., i].ravel())[0, 1])
        assert exact > 0.9, i  # the components of the sample, and ends cut off
    with pytest.raises(ValueError, match="without the class token"):
        representation.principal_colours(tokens, grid=(2, 2))


def test_neighbours_are_the_nearest_by_angle():
    bank = np.array([[1.0, 0.0], [10.0, 10.0], [0.0, 2.0], [-1.0, 0.0]])
    found = representation.neighbours(np.array([[0.1, 5.0], [3.0, 0.1]]), bank, k=3)
    np.testing.assert_array_equal(found, [[2, 1, 0], [0, 1, 2]])
    with pytest.raises(ValueError, match="k=5 neighbours out of 4"):
        representation.neighbours(bank, bank, k=5)
