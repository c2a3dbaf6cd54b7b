"""Geometry of patches and targets made of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import augment
from crossmae_jax.targets import pixels
from crossmae_jax.tokens import grid_size, patchify, put_tokens, take_tokens, unpatchify


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


def test_standardised_targets_use_the_unbiased_variance():
    values = _normal(1, 4, 4, 3)
    (target,) = pixels.pixels(values, patch_size=4, normalize=True)[0]
    flat = np.asarray(values, np.float64).reshape(-1)
    expected = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(target, expected, atol=1e-6)


def test_predictions_return_to_pixels_with_the_true_statistics():
    images = _normal(2, 8, 8, 3)
    values = patchify(images, patch_size=4)
    for normalize in (True, False):
        target = pixels.pixels(images, patch_size=4, normalize=normalize)
        back = pixels.to_pixels(target, values, normalize=normalize)
        np.testing.assert_allclose(back, values, atol=1e-5)


def test_one_value_cannot_be_standardised():
    with pytest.raises(ValueError, match="larger patch or config.target.normalize"):
        pixels.pixels(jnp.ones((1, 2, 2, 1)), patch_size=1, normalize=True)


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
