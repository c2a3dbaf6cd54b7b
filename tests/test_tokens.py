"""Tokens and their places, and the geometry of patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import augment
from crossmae_jax.tokens import (
    Tokens,
    grid_size,
    patchify,
    put_tokens,
    take_tokens,
    unpatchify,
)


def _normal(*shape):
    values = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def test_patch_vectors_list_rows_then_columns_then_channels():
    images = jnp.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    values = patchify(images, patch_size=2)
    assert values.shape == (1, 6, 8)
    second = np.asarray(images)[0, :2, 2:4].reshape(-1)
    np.testing.assert_array_equal(values[0, 1], second)


def test_unpatchify_undoes_patchify_for_any_shape_and_channels():
    images = _normal(2, 6, 12, 5)
    values = patchify(images, patch_size=3)
    back = unpatchify(values, grid=(2, 4), patch_size=3)
    np.testing.assert_array_equal(back, images)


def test_put_tokens_writes_where_take_tokens_reads():
    tokens = jnp.zeros((2, 5, 3))
    ids = jnp.array([[4, 0], [1, 2]])
    values = jnp.arange(12.0).reshape(2, 2, 3)
    written = put_tokens(tokens, ids, values)
    np.testing.assert_array_equal(take_tokens(written, ids), values)
    assert (written == 0).sum() == 2 * 5 * 3 - 11


def test_a_wrong_id_is_loud():
    taken = take_tokens(jnp.ones((1, 3, 2)), jnp.array([[3]]))
    assert jnp.isnan(taken).all()


def test_image_size_not_a_multiple_names_the_nearest():
    message = "250x224 is not a multiple of patch 16; nearest: 240x224, 256x224"
    with pytest.raises(ValueError, match=message):
        grid_size((250, 224), 16)
    with pytest.raises(ValueError, match="nearest: 16x16"):
        grid_size((8, 16), 16)


def _tokens(has_cls=False):
    """Two samples of 3 tokens each at places of a 2 x 3 grid."""
    sequence = _normal(2, 3 + has_cls, 5)
    ids = jnp.array([[4, 0, 2], [1, 5, 3]])
    return Tokens(sequence, ids, (2, 3), has_cls)


@pytest.mark.parametrize("has_cls", [True, False])
def test_tokens_lie_at_their_places_and_zeros_elsewhere(has_cls):
    tokens = _tokens(has_cls)
    grid = np.zeros((2, 6, 5), np.float32)
    for sample in range(2):
        grid[sample, tokens.ids[sample]] = tokens.sequence[sample, has_cls:]
    found = tokens.laid_out()
    np.testing.assert_array_equal(found, grid.reshape(2, 2, 3, 5))
    wanted = jnp.array([[0, 1], [3, 3]])
    expected = grid[jnp.arange(2)[:, None], wanted]
    np.testing.assert_array_equal(tokens.at(wanted), expected)
    np.testing.assert_array_equal(tokens.at(None), grid)
    everywhere = Tokens(found.reshape(2, 6, 5), None, (2, 3))
    np.testing.assert_array_equal(everywhere.at(wanted), expected)
    np.testing.assert_array_equal(everywhere.laid_out(), found)


def test_the_class_token_belongs_to_no_place():
    tokens = _tokens(has_cls=True)
    np.testing.assert_array_equal(tokens.cls, tokens.sequence[:, :1])
    np.testing.assert_array_equal(tokens.values, tokens.sequence[:, 1:])
    assert _tokens().cls is None
    for num in (0, 2):
        rest = tokens.behind(num)
        np.testing.assert_array_equal(rest.values, tokens.values[:, num:])
        np.testing.assert_array_equal(rest.ids, tokens.ids[:, num:])
        assert rest.cls is None
    other = tokens.with_values(tokens.values + 1)
    assert other.ids is tokens.ids and other.cls is None


def test_tokens_go_through_transformations():
    tokens = _tokens(has_cls=True)
    shapes = jax.eval_shape(lambda x: x.behind(1), tokens)
    assert shapes.sequence.shape == (2, 2, 5) and shapes.grid == (2, 3)
    gradient = jax.jit(jax.grad(lambda x: x.laid_out().sum(), allow_int=True))(tokens)
    np.testing.assert_array_equal(gradient.cls, jnp.zeros((2, 1, 5)))
    np.testing.assert_array_equal(gradient.values, jnp.ones((2, 3, 5)))


def test_normalisation_is_undone_and_checked():
    images = jnp.asarray(
        np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    )
    statistics = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    normal = augment.normalize(images, **statistics)
    pixel = np.asarray(images[0, 0, 0]) / 255
    expected = (pixel - statistics["mean"]) / statistics["std"]
    np.testing.assert_allclose(normal[0, 0, 0], expected, atol=1e-6)
    back = augment.unnormalize(normal, **statistics)
    np.testing.assert_allclose(back, images / 255, atol=1e-6)
    with pytest.raises(ValueError, match="config.data.mean has 2 values"):
        augment.normalize(images, mean=(0.5, 0.5), std=(1.0, 1.0, 1.0))
