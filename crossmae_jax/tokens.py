"""Vectors that know their places, and the patch vectors of images.

The places are the cells of a grid, in an image's case its patches, numbered in raster
order. A patch vector lists its pixels row by row, column by column, channel fastest,
the layout of MAE (arXiv 2111.06377).
"""

from typing import Any, NamedTuple

import einops
import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

CLASS_TOKEN = -1  # where it stands in place of the number of a place


@flax.struct.dataclass
class Tokens:
    """A vector at each of some places of a grid, and perhaps a class token.

    What a block of a transformer works on, what a decoder predicts and what a target
    asks for. The class token lies before the others in one array, so that attention
    takes them without a copy; nothing outside of this class counts on that order.

    Attributes:
      sequence: f[b s d], what attention runs over: the class token, if there is one,
        and the vectors of the places.
      ids: i32[b k], the place of each vector; None: all places, in raster order.
      grid: rows and columns of the places.
      has_cls: whether there is a class token.
    """

    sequence: Any  # an array, or what stands for one in a tree; likewise `ids`
    ids: Any
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    has_cls: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def num(self) -> int:
        """How many places have a vector."""
        return self.sequence.shape[1] - self.has_cls

    @property
    def values(self) -> Shaped[Array, "b k d"]:
        """The vectors of the places."""
        return self.sequence[:, 1:] if self.has_cls else self.sequence

    @property
    def cls(self) -> Shaped[Array, "b 1 d"] | None:
        """The class token."""
        return self.sequence[:, :1] if self.has_cls else None

    @property
    def places(self) -> Int[Array, "b s"]:
        """The place of each vector of `sequence`, `CLASS_TOKEN` of the class token."""
        ids = self.ids
        if ids is None:
            ids = jnp.arange(self.num)
            ids = jnp.broadcast_to(ids[None], (len(self.sequence), self.num))
        if not self.has_cls:
            return ids
        return jnp.concatenate([jnp.full_like(ids[:, :1], CLASS_TOKEN), ids], axis=1)

    def mean(self) -> Float[Array, "b d"]:
        """Returns the mean over the places, in float32: a feature of the image."""
        return self.values.astype(jnp.float32).mean(1)

    def at(self, ids: Int[Array, "b q"] | None) -> Shaped[Array, "b q d"]:
        """Returns the vectors of these places, zeros where there is none.

        Args:
          ids: None for all places.
        """
        values = self.values
        if self.ids is not None:
            values = einops.rearrange(self.laid_out(), "b row col d -> b (row col) d")
        return values if ids is None else take_tokens(values, ids)

    def laid_out(self) -> Shaped[Array, "b row col d"]:
        """Returns the vectors at their places, zeros where there is none."""
        values = self.values
        if self.ids is not None:
            empty = jnp.zeros(
                (len(values), self.grid[0] * self.grid[1], values.shape[2]),
                values.dtype,
            )
            values = put_tokens(empty, self.ids, values)
        return values.reshape(-1, *self.grid, values.shape[2])

    def with_values(self, values: Shaped[Array, "b k e"]) -> "Tokens":
        """Returns other vectors at the same places, and no class token."""
        return Tokens(values, self.ids, self.grid)

    def behind(self, num: int) -> "Tokens":
        """Returns the places behind the first `num`, and no class token."""
        ids = self.ids if num == 0 else self.ids[:, num:]
        return Tokens(self.sequence[:, self.has_cls + num :], ids, self.grid)


class Encoded(NamedTuple):
    """What an encoder makes of its visible patches.

    Attributes:
      last: output of the last block, after the final norm if there is one.
      maps: the input of the first block, positions included, then the output of each
        block, before any norm.
    """

    last: Tokens
    maps: tuple[Tokens, ...]

    def trained(self, used_maps: tuple[int, ...] | None) -> Tokens:
        """Returns the last output of a block that a decoder was trained on.

        Args:
          used_maps: positions in `maps` of those that it sees: blocks behind the last
            of them are not trained. None for a decoder that sees `last`.
        """
        return self.last if used_maps is None else self.maps[used_maps[-1]]


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


def spread(
    values: Shaped[Array, "b row col"], *, of: tuple[int, int]
) -> Shaped[Array, "b row2 col2"]:
    """Returns what lies on a grid as it is on another, with cells of the same image.

    Repeated where its cells are smaller, the mean where they hold several.

    Args:
      of: rows and columns of the other; multiples or divisors of those of `values`.

    Raises:
      ValueError: if the grids do not fit.
    """
    grid = values.shape[1:]
    for axis, (num, wanted) in enumerate(zip(grid, of, strict=True), start=1):
        if wanted % num and num % wanted:
            raise ValueError(
                f"Cells in {of[0]}x{of[1]} do not fit patches in {grid[0]}x{grid[1]}: "
                "each side must be a multiple or a divisor of the other grid's."
            )
        if wanted >= num:
            values = jnp.repeat(values, wanted // num, axis=axis)
        else:
            parts = (*values.shape[:axis], wanted, -1, *values.shape[axis + 1 :])
            values = values.reshape(parts).mean(axis + 1)
    return values
