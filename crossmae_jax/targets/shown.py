"""What a target gives of predictions to be looked at."""

from typing import NamedTuple

from crossmae_jax.tokens import Tokens


class Shown(NamedTuple):
    """Pictures of one of a target's parts, as patch vectors.

    Attributes:
      name: of the part.
      pictures: of normalised images; or grey drawings in 0..1, of as many dots as they
        need.
      of_image: whether they are of images, so that a perfect prediction is the image;
        or else drawings of something else.
    """

    name: str
    pictures: Tokens
    of_image: bool
