"""How alike features are, and tokens as colours, from matrices made by hand."""

import numpy as np
import pytest

from crossmae_jax.probing import representation


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
