"""Target of pixels, standardised in each patch or raw; or in cells of several sizes.

Standardised pixels (MAE, arXiv 2111.06377, section 4.2), for a patch with T values x:

    y = (x - mean x) / sqrt(var x + 1e-6),   var x = sum (x - mean x)^2 / (T - 1)

The variance is the unbiased one, as `torch.Tensor.var` computes it, and the epsilon
lies inside the root. Everything here is float32. Values are centred twice: on a nearly
constant patch the rounding of its mean, divided by a tiny deviation, would otherwise
show in the target.

LocalMIM (arXiv 2303.05251) predicts pixels, too, a scale at each of several blocks of
the encoder. Whether it standardises them could not be established; here each cell is
standardised by its own values, as MAE's patches are, or none is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Key

from crossmae_jax.targets import cells as of_cells
from crossmae_jax.targets.shown import Shown
from crossmae_jax.tokens import Tokens, grid_size, patchify

_EPSILON = 1e-6


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch, with the epsilon inside the root."""

    mean: Float[Array, "b n 1"]
    std: Float[Array, "b n 1"]


def _centre(values: Float[Array, "b n t"]) -> Float[Array, "b n t"]:
    values = values - values.mean(-1, keepdims=True)
    return values - values.mean(-1, keepdims=True)


def patch_statistics(values: Float[Array, "b n t"]) -> PatchStatistics:
    """Returns the statistics that standardise each patch.

    Raises:
      ValueError: if a patch has one value only: its variance does not exist.
    """
    if values.shape[-1] < 2:
        raise ValueError(
            "A patch of 1 value cannot be standardised (unbiased variance of one "
            "number); use a larger patch or config.target.normalize=False."
        )
    mean = values.mean(-1, keepdims=True)
    variance = (_centre(values) ** 2).sum(-1, keepdims=True) / (values.shape[-1] - 1)
    return PatchStatistics(mean=mean, std=jnp.sqrt(variance + _EPSILON))


def standardised(values: Float[Array, "b n t"]) -> Float[Array, "b n t"]:
    """Returns patch vectors of mean 0 and variance 1."""
    return _centre(values) / patch_statistics(values).std


def caption(*, normalize: bool) -> str:
    """Returns what a viewer of a panel must know, for standardised or raw targets."""
    if normalize:
        return (
            "Patch mean and standard deviation come from the true image (targets are "
            "standardised per patch): colours and contrast are not evidence of "
            "learning."
        )
    return (
        "Hidden patches are shown as predicted. In the last column the visible patches "
        "are copied from the input."
    )


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The patch vectors of an image, under the name "pixels"; see `targets.Target`.

    Attributes:
      patch_size: side of a patch in pixels.
      normalize: whether each patch is standardised.
      cells: sides in pixels of what takes the place of patches, "pixels_4" of cells of
        4 pixels and so on. Of these, those nearest to a patch are looked at.

    Raises:
      ValueError: if the image has no whole number of patches, or of cells.
    """

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    normalize: bool
    cells: tuple[int, ...] = ()

    groups = starts = FrozenDict()

    def __post_init__(self):
        grid_size(self.image_size, self.patch_size)
        self._sides()

    def _shown(self):
        return of_cells.shown(self._sides(), patch_size=self.patch_size)

    def _sides(self):
        if not self.cells:
            return {"pixels": self.patch_size}
        return of_cells.named("pixels", self.cells, image_size=self.image_size)

    @property
    def widths(self) -> dict[str, int]:
        """How many values a patch or a cell has."""
        return {name: side**2 * self.channels for name, side in self._sides().items()}

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the patches or cells."""
        return {
            name: grid_size(self.image_size, side)
            for name, side in self._sides().items()
        }

    @property
    def caption(self) -> str:
        """What a viewer of its pictures must know."""
        said = caption(normalize=self.normalize)
        if not self.cells:
            return said
        return f"{said} {of_cells.caption(self._sides(), self._shown())}"

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Returns nothing: pixels need no variables."""
        return {}

    def __call__(
        self, variables: dict[str, Any], images: Float[Array, "b height width c"]
    ) -> dict[str, Tokens]:
        """Returns the target of every patch or cell."""
        found = {name: self._values(images, name) for name in self._sides()}
        if self.normalize:
            found = {
                name: tokens.with_values(standardised(tokens.values))
                for name, tokens in found.items()
            }
        return found

    def pixels(
        self, predicted: dict[str, Tokens], images: Float[Array, "b height width c"]
    ) -> Shown:
        """Returns the predictions as pixels.

        With standardised targets a prediction is turned back with the mean and standard
        deviation of the TRUE patch: colours and contrast then come from the image, not
        from the model.
        """
        name = self._shown()
        pred = predicted[name]
        values = pred.values.astype(jnp.float32)
        if self.normalize:
            mean, std = patch_statistics(self._values(images, name).at(pred.ids))
            values = values * std + mean
        return Shown(name, pred.with_values(values), of_image=True)

    def _values(self, images, name):
        side = self._sides()[name]
        grid = grid_size(self.image_size, side)
        return Tokens(patchify(images, patch_size=side), None, grid)
