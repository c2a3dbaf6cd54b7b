"""Target of oriented gradients at several scales (LocalMIM, arXiv 2303.05251).

Of each colour channel of the normalised image, with 3 x 3 Sobel filters (the image
reflected at its border), u the difference from left to right and v that from top to
bottom as the released code orders them:

    bin       floor(bins * atan2(u, v) / pi) modulo bins      one of `bins` orientations
    cell      mean over c x c pixels of sqrt(u^2 + v^2), in the bin of each pixel

and each cell is divided by its length over the bins (HOG, Dalal and Triggs 2005,
without blocks of cells and without sharing a pixel between bins). What is predicted at
a place lists the bins of its channels, channels slowest.

The released code of ViT-L has filters with a bias that is drawn and never trained;
`bias` is that, off unless it is asked for.
"""

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Key

from crossmae_jax import glyphs, ranges
from crossmae_jax.targets import cells as of_cells
from crossmae_jax.targets.shown import Shown
from crossmae_jax.tokens import Tokens, grid_size

_COLLECTION = "hog"  # of the biases, if there are any
_EPSILON = 1e-12  # least length that a cell is divided by
_DOTS = 24  # along a side of a cell, where it is drawn


@dataclasses.dataclass(frozen=True)
class HOG:
    """Histograms of oriented gradients, "hog_4" of cells of 4 pixels and so on.

    Attributes:
      patch_size: side of a patch in pixels; of the cells, those nearest to it are
        looked at.
      bins: orientations between 0 and 180 degrees.
      cells: sides of the cells in pixels.
      bias: adds two numbers, drawn once for each scale, to the gradients.

    Raises:
      ValueError: if the image has no whole number of cells, or options cannot be.
    """

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    bins: int = 9
    cells: tuple[int, ...] = (4, 8, 16, 32)
    bias: bool = False

    groups = starts = FrozenDict()

    def __post_init__(self):
        ranges.check("target.bins", self.bins, least=1)
        self._sides()

    def _shown(self):
        return of_cells.shown(self._sides(), patch_size=self.patch_size)

    def _sides(self):
        return of_cells.named("hog", self.cells, image_size=self.image_size)

    @property
    def widths(self) -> dict[str, int]:
        """How many values a cell has, at each scale."""
        return dict.fromkeys(self._sides(), self.bins * self.channels)

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the cells, at each scale."""
        return {
            name: grid_size(self.image_size, side)
            for name, side in self._sides().items()
        }

    @property
    def caption(self) -> str:
        """What a viewer of its pictures must know."""
        of_channels = ", the mean of the channels" if self.channels > 1 else ""
        return (
            "Oriented gradients: lines run along edges, as bright as their share of a "
            f"cell's gradients{of_channels}. How strong these are is not predicted. "
            f"{of_cells.caption(self._sides(), self._shown())}"
        )

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Draws the biases as PyTorch draws those of a filter of nine values."""
        if not self.bias:
            return {}
        drawn = jax.random.uniform(
            key, (len(self.cells), 2), minval=-1 / 3, maxval=1 / 3
        )
        return {_COLLECTION: {"hog": {"bias": drawn}}}

    def __call__(
        self, variables: dict[str, Any], images: Float[Array, "b height width c"]
    ) -> dict[str, Tokens]:
        """Returns the target of every cell, at each scale."""
        biases = [None] * len(self.cells)
        if self.bias:
            biases = variables[_COLLECTION]["hog"]["bias"]
        gradients = _sobel(images.astype(jnp.float32))
        found = {}
        for (name, grid), bias in zip(self.grids.items(), biases, strict=True):
            values = self._normed(self._means(gradients, bias, grid))
            values = einops.rearrange(
                values, "b row col c bins -> b (row col) (c bins)"
            )
            found[name] = Tokens(values, None, grid)
        return found

    def pixels(
        self, predicted: dict[str, Tokens], images: Float[Array, "b height width c"]
    ) -> Shown:
        """Returns the cells of one scale as drawings, see `glyphs`."""
        name = self._shown()
        cells = predicted[name]
        values = cells.values.astype(jnp.float32)
        drawn = glyphs.drawn(values, bins=self.bins, side=_DOTS)
        return Shown(name, cells.with_values(drawn), of_image=False)

    def _means(self, gradients, bias, grid):
        """Returns the mean length of gradients in each bin, of each cell."""
        u, v = gradients
        if bias is not None:
            u, v = u + bias[0], v + bias[1]
        turn = jnp.floor(jnp.arctan2(u, v) / jnp.pi * self.bins)
        bins = jnp.mod(turn.astype(jnp.int32), self.bins)
        lengths = jnp.sqrt(u * u + v * v)
        histogram = jax.nn.one_hot(bins, self.bins) * lengths[..., None]
        return einops.reduce(
            histogram, "b (row p) (col q) c bins -> b row col c bins", "mean",
            row=grid[0], col=grid[1],
        )

    def _normed(self, histogram):
        length = jnp.sqrt((histogram**2).sum(-1, keepdims=True))
        return histogram / jnp.maximum(length, _EPSILON)


def _sobel(images):
    """Returns differences to the right and downwards, [b height width c] each."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    right = padded[:, :, :-2] - padded[:, :, 2:]
    down = padded[:, :-2] - padded[:, 2:]
    return (
        right[:, :-2] + 2 * right[:, 1:-1] + right[:, 2:],
        down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:],
    )
