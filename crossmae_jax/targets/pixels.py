"""Target of pixels, standardised in each patch or raw.

Standardised pixels (MAE, arXiv 2111.06377, section 4.2), for a patch with T values x:

    y = (x - mean x) / sqrt(var x + 1e-6),   var x = sum (x - mean x)^2 / (T - 1)

The variance is the unbiased one, as `torch.Tensor.var` computes it, and the epsilon
lies inside the root. Everything here is float32. Values are centred twice: on a nearly
constant patch the rounding of its mean, divided by a tiny deviation, would otherwise
show in the target.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

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

    Raises:
      ValueError: if the image has no whole number of patches.
    """

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    normalize: bool

    def __post_init__(self):
        grid_size(self.image_size, self.patch_size)

    @property
    def widths(self) -> dict[str, int]:
        """How many values a patch has."""
        return {"pixels": self.patch_size**2 * self.channels}

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the patches."""
        return {"pixels": grid_size(self.image_size, self.patch_size)}

    @property
    def caption(self) -> str:
        """What a viewer of its pictures must know."""
        return caption(normalize=self.normalize)

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Returns nothing: pixels need no variables."""
        return {}

    def __call__(
        self, variables: dict[str, Any], images: Float[Array, "b height width c"]
    ) -> dict[str, Tokens]:
        """Returns the target of every patch."""
        values = self._values(images)
        if self.normalize:
            values = values.with_values(standardised(values.values))
        return {"pixels": values}

    def pixels(
        self, predicted: dict[str, Tokens], images: Float[Array, "b height width c"]
    ) -> Tokens:
        """Returns the predictions as pixels.

        With standardised targets a prediction is turned back with the mean and standard
        deviation of the TRUE patch: colours and contrast then come from the image, not
        from the model.
        """
        pred = predicted["pixels"]
        values = pred.values.astype(jnp.float32)
        if self.normalize:
            mean, std = patch_statistics(self._values(images).at(pred.ids))
            values = values * std + mean
        return pred.with_values(values)

    def _values(self, images):
        grid = grid_size(self.image_size, self.patch_size)
        return Tokens(patchify(images, patch_size=self.patch_size), None, grid)
