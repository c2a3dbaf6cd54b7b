"""RandAugment: a few random operations on the pixels of a training image.

What timm's string `rand-m9-mstd0.5-inc1` stands for, which MAE fine-tunes with
(arXiv:2111.06377, appendix A.1; RandAugment: arXiv:1909.13719). Of 15 operations
`num_ops` are drawn, uniformly and with replacement, and

    applied    with probability 1/2, each
    magnitude  m ~ normal(magnitude, std), clipped to 0..10
    strength   grows with m / 10 (timm's "increasing" operations):

    auto_contrast  equalize  invert     no strength
    rotate                              30 degrees
    shear_x        shear_y              0.3
    translate_x    translate_y          45 % of the side
    color  contrast  brightness  sharpness    factor 1 +- 0.9, at least 0.1
    posterize                           keeps 4 bits less 4 (10: a black image)
    solarize                            inverts from 256 less 256 on
    solarize_add                        adds 110 to pixels below 128

Geometric operations and factors take either sign. Uncovered pixels get the mean colour;
the interpolation is bicubic, as timm's transform for MAE sets it. The paper applies
every drawn operation and draws no magnitudes: those two are timm's.

On one channel the operations are those of a grey image, and `color` changes nothing.
"""

import dataclasses
import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

_LARGEST = 10.0  # the magnitude at which an operation is as strong as the table says
_PROBABILITY = 0.5


def _transform(image, fill, *matrix):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
        fillcolor=fill,
    )


def _point(image, table):
    return image.point(table * len(image.getbands()))


def _rotate(image, level, sign, fill):
    return image.rotate(
        sign * (level * 30.0), Image.Resampling.BICUBIC, fillcolor=fill
    )


def _shear_x(image, level, sign, fill):
    return _transform(image, fill, 1, sign * (level * 0.3), 0, 0, 1, 0)


def _shear_y(image, level, sign, fill):
    return _transform(image, fill, 1, 0, 0, sign * (level * 0.3), 1, 0)


def _translate_x(image, level, sign, fill):
    return _transform(image, fill, 1, 0, sign * (level * 0.45) * image.width, 0, 1, 0)


def _translate_y(image, level, sign, fill):
    return _transform(image, fill, 1, 0, 0, 0, 1, sign * (level * 0.45) * image.height)


def _posterize(image, level, sign, fill):
    # ImageOps.posterize refuses 0 bits from Pillow 13 on; before, they were black.
    dropped = 4 + int(level * 4)
    return _point(image, [x >> dropped << dropped for x in range(256)])


def _solarize(image, level, sign, fill):
    return ImageOps.solarize(image, 256 - int(level * 256))


def _solarize_add(image, level, sign, fill):
    add = int(level * 110)
    return _point(image, [min(255, x + add) if x < 128 else x for x in range(256)])


def _enhance(kind):
    def operation(image, level, sign, fill):
        return kind(image).enhance(max(0.1, 1.0 + sign * (level * 0.9)))

    return operation


# (image, level in 0..1, sign, fill colour) -> image
_OPERATIONS = {
    "auto_contrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
OPERATIONS = tuple(_OPERATIONS)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Changes images at random: `RandAugment(...)(image, rng) -> image`.

    Attributes:
      num_ops: operations drawn for an image.
      magnitude: mean of their magnitudes, 0 to 10.
      std: standard deviation of the magnitudes.
      mean: colour of uncovered pixels in 0..1, one value per channel.

    Raises:
      ValueError: if the images have neither one nor three channels, or a number is out
        of range.
    """

    num_ops: int
    magnitude: float
    std: float
    mean: tuple[float, ...]

    def __post_init__(self):
        if len(self.mean) not in (1, 3):
            raise ValueError(
                f"RandAugment is for 1 channel (grey) or 3 (RGB), but the images have "
                f"{len(self.mean)}; set config.data.randaug_ops=0."
            )
        if self.num_ops < 1:
            raise ValueError(
                f"config.data.randaug_ops={self.num_ops}; expected 1 or more, or 0 for "
                "no RandAugment."
            )
        if not 0 <= self.magnitude <= _LARGEST:
            raise ValueError(
                f"config.data.randaug_magnitude={self.magnitude} must lie between 0 "
                f"and {_LARGEST:g}."
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Returns the changed image, of the same size and mode ("L" or "RGB")."""
        for _ in range(self.num_ops):
            # As many draws whether or not the operation is applied. Only rng.random()
            # is used: its stream is the one least likely to change.
            which, gate, radius, angle, sign = (rng.random() for _ in range(5))
            if gate >= _PROBABILITY:
                continue
            normal = math.sqrt(-2 * math.log(1 - radius)) * math.cos(math.tau * angle)
            image = self.apply(
                OPERATIONS[int(which * len(OPERATIONS))], image,
                magnitude=min(max(self.magnitude + self.std * normal, 0.0), _LARGEST),
                sign=1 if sign < 0.5 else -1,
            )
        return image

    def apply(
        self, operation: str, image: Image.Image, *, magnitude: float, sign: int
    ) -> Image.Image:
        """Returns the image after one of `OPERATIONS`.

        Args:
          magnitude: 0 to 10.
          sign: 1 or -1: the direction, for operations that have one.
        """
        fill = tuple(min(255, round(255 * value)) for value in self.mean)
        return _OPERATIONS[operation](image, magnitude / _LARGEST, sign, fill)


def from_config(data: ConfigDict) -> RandAugment | None:
    """Returns what `config.data` asks for; None where it asks for no operation."""
    if data.randaug_ops == 0:
        return None
    return RandAugment(
        num_ops=data.randaug_ops,
        magnitude=data.randaug_magnitude,
        std=0.5,  # timm's mstd0.5
        mean=tuple(data.mean),
    )
