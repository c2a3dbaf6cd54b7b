"""Which part of an image is seen: drawn at random in training, the centre after it.

As MAE (arXiv:2111.06377) does with torchvision:

    random resized crop   area  ~ uniform(crop_scale) * height * width
                          ratio ~ log-uniform(3/4, 4/3), width over height
        "ten_tries"       until it fits, then the largest centre crop with a legal ratio
        "single_try"      sides that do not fit are cut to the image's
    evaluation            shorter side to size / crop_ratio, then the centre

MAE's linear probe takes the single try, which is BYOL's crop (arXiv:2006.07733). The
crop ratio is 224 / 256, and 1 for targets of more than 224 pixels.

Where we differ: for a target that is not square the ratio is relative to the target's
own (a crop for a 1:2 input has ratios around 1:2), so that training does not stretch
what evaluation leaves alone. For square targets this is torchvision's rule to the
letter.
"""

import math
from typing import NamedTuple

import numpy as np

from crossmae_jax.data.fields import View

EVAL_CROP_RATIO = 224 / 256
_ASPECT = (3 / 4, 4 / 3)


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def random_resized_crop(
    rng: np.random.Generator, height: int, width: int, *, scale, ratio=_ASPECT
) -> Box:
    """Draws the rectangle of a random resized crop.

    Args:
      scale: least and greatest share of the image's area.
      ratio: least and greatest width / height.
    """
    for _ in range(10):
        crop_height, crop_width = _sides(rng, height * width, scale, ratio)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return _place(rng, height, width, crop_height, crop_width)
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        crop_width = min(width, max(1, round(height * ratio[1])))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Box(top, left, crop_height, crop_width)


def single_try_crop(
    rng: np.random.Generator, height: int, width: int, *, scale, ratio=_ASPECT
) -> Box:
    """Draws area and ratio once, and cuts sides that do not fit to the image's."""
    crop_height, crop_width = _sides(rng, height * width, scale, ratio)
    crop_height = min(max(1, crop_height), height)
    crop_width = min(max(1, crop_width), width)
    return _place(rng, height, width, crop_height, crop_width)


def _sides(rng: np.random.Generator, pixels: int, scale, ratio) -> tuple[int, int]:
    """Draws the height and width of a crop."""
    # Here and below only rng.random(): its stream is the one least likely to change.
    area = pixels * (scale[0] + (scale[1] - scale[0]) * rng.random())
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + (high - low) * rng.random())
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def _place(
    rng: np.random.Generator, height: int, width: int, crop_height: int, crop_width: int
) -> Box:
    top = int(rng.random() * (height - crop_height + 1))
    left = int(rng.random() * (width - crop_width + 1))
    return Box(top, left, crop_height, crop_width)


CROPS = {"single_try": single_try_crop, "ten_tries": random_resized_crop}


def random_view(
    rng: np.random.Generator,
    stored: tuple[int, int],
    *,
    image_size: tuple[int, int],
    crop: str,
    crop_scale: tuple[float, float],
    flip: bool,
) -> View:
    """Returns the view of training: a crop of a random place, size and shape.

    Args:
      crop: one of `CROPS`.
      crop_scale: least and greatest share of the image's area.
      flip: mirrors every other view, at random.
    """
    aspect = image_size[1] / image_size[0]
    ratio = (_ASPECT[0] * aspect, _ASPECT[1] * aspect)
    box = CROPS[crop](rng, *stored, scale=crop_scale, ratio=ratio)
    mirrored = flip and rng.random() < 0.5
    right, bottom = box.left + box.width, box.top + box.height
    area = (float(box.left), float(box.top), float(right), float(bottom))
    return View(stored, area, mirrored, image_size, image_size)


def centre_view(
    stored: tuple[int, int], *, image_size: tuple[int, int], crop_ratio: float
) -> View:
    """Returns the view of evaluation: `crop_ratio` of the sides, around the centre.

    An image that has the target's size already is left untouched.
    """
    height, width = stored
    size = tuple(image_size)
    if stored != size:
        cover_height, cover_width = (int(side / crop_ratio) for side in image_size)
        if cover_height * width >= cover_width * height:
            size = (cover_height, int(cover_height * width / height))
        else:
            size = (int(cover_width * height / width), cover_width)
    whole = (0.0, 0.0, float(width), float(height))
    return View(stored, whole, False, size, tuple(image_size))
