"""What a masked image model is to predict: `config.target`, by its kind.

A target says by name what is to be predicted, of which width, and makes it of images.
A new one is a class with these methods and a row in `TARGETS`; its fields are the
options of `config.target`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from crossmae_jax import kinds
from crossmae_jax.origins import Origin
from crossmae_jax.targets.hog import HOG
from crossmae_jax.targets.pixels import Pixels
from crossmae_jax.targets.shown import Shown
from crossmae_jax.targets.teacher import Teacher
from crossmae_jax.tokens import Tokens

Variables = dict[str, Any]


@runtime_checkable
class Target(Protocol):
    """What is to be predicted.

    Attributes:
      widths: how many values there are at each place, by name. A model predicts under
        the same names.
      grids: rows and columns of the places, by name.
      groups: by name, into how many equal parts the values at a place fall that a loss
        compares one by one, such as heads of attention; one part where none is named.
      starts: by collection of what `init` draws, the weights that it begins with.
      caption: what a viewer of predictions as pictures must know; None where there are
        no pictures of them.
    """

    widths: Mapping[str, int]
    grids: Mapping[str, tuple[int, int]]
    groups: Mapping[str, int]
    starts: Mapping[str, Origin]
    caption: str | None

    def init(self, key: Key[Array, ""]) -> Variables:
        """Draws what the target itself computes with: {} but for a teacher."""

    def __call__(
        self, variables: Variables, images: Float[Array, "b height width c"]
    ) -> dict[str, Tokens]:
        """Returns what should be predicted, of normalised images.

        At all places of a grid; or where there are `ids`, at these places and nowhere
        else: the model is asked for them, whether they are masked or not.
        """

    def pixels(
        self, predicted: dict[str, Tokens], images: Float[Array, "b height width c"]
    ) -> Shown:
        """Returns predictions, or the target itself, as pictures to look at.

        Never called where there is no `caption`.
        """


TARGETS = {"hog": HOG, "pixels": Pixels, "teacher": Teacher}


def make(config: ConfigDict, *, patch_size: int) -> Target:
    """Returns the target that `config.target` describes, of images of `config.data`.

    Args:
      patch_size: side in pixels of what a decoder predicts at one place.

    Raises:
      ValueError: for an unknown kind, or options that it does not have.
    """
    data = config.data
    return kinds.make(
        "target", TARGETS, config.target, image_size=tuple(data.image_size),
        channels=data.channels, patch_size=patch_size,
        dtype=jnp.dtype(config.get("model", {}).get("dtype", "float32")),
    )
