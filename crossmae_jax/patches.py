"""Geometry of patches: between images and raster-ordered patch vectors.

A patch vector lists its pixels row by row, column by column, channel fastest, the
layout of MAE (arXiv 2111.06377). Patches are numbered in raster order.
"""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def grid_size(image_size: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """Returns the number of patches along height and width.

    Raises:
      ValueError: if there are not two sides, or one is not a multiple of the patch;
        names the nearest sizes.
    """
    if len(image_size) != 2:
        raise ValueError(
            f"Image size {image_size} must be height and width, such as (224, 224)."
        )
    height, width = image_size
    if height % patch_size or width % patch_size:
        nearest = [
            sorted({max(side // patch_size, 1), -(-side // patch_size)})
            for side in (height, width)
        ]
        sizes = ", ".join(
            f"{rows * patch_size}x{columns * patch_size}"
            for rows in nearest[0]
            for columns in nearest[1]
        )
        raise ValueError(
            f"Image size {height}x{width} is not a multiple of patch {patch_size}; "
            f"nearest: {sizes}."
        )
    return height // patch_size, width // patch_size


def patchify(
    images: Shaped[Array, "b height width c"], *, patch_size: int
) -> Shaped[Array, "b n t"]:
    """Cuts images into patch vectors of `patch_size**2 * c` values."""
    grid_size(images.shape[1:3], patch_size)
    return einops.rearrange(
        images, "b (row p) (column q) c -> b (row column) (p q c)",
        p=patch_size, q=patch_size,
    )


def unpatchify(
    patches: Shaped[Array, "b n t"], *, grid: tuple[int, int], patch_size: int
) -> Shaped[Array, "b height width c"]:
    """Puts patch vectors back into images; the inverse of `patchify`."""
    return einops.rearrange(
        patches, "b (row column) (p q c) -> b (row p) (column q) c",
        row=grid[0], column=grid[1], p=patch_size, q=patch_size,
    )


def take_tokens(
    tokens: Shaped[Array, "b n d"], ids: Int[Array, "b k"]
) -> Shaped[Array, "b k d"]:
    """Gathers each sample's own tokens. Ids out of range give NaN, not a neighbour."""
    return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)


def put_tokens(
    tokens: Shaped[Array, "b n d"],
    ids: Int[Array, "b k"],
    values: Shaped[Array, "b k d"],
) -> Shaped[Array, "b n d"]:
    """Replaces each sample's tokens at `ids`; the counterpart of `take_tokens`.

    A sample's ids must differ from each other: gradients count on it.
    """

    def put(tokens, ids, values):
        return tokens.at[ids].set(values, unique_indices=True)

    # Not one scatter with row numbers: across devices that gathers the whole batch.
    return jax.vmap(put)(tokens, ids, values)
