"""From a stored image to the uint8 pixels of a batch: decode, crop, resize, flip.

Training takes a random resized crop and a flip, evaluation a resize and a centre crop,
as MAE (arXiv:2111.06377) does with torchvision:

    random resized crop   area  ~ uniform(crop_scale) * height * width
                          ratio ~ log-uniform(3/4, 4/3), width over height
        "ten_tries"       until it fits, then the largest centre crop with a legal ratio
        "single_try"      sides that do not fit are cut to the image's
    evaluation            shorter side to size / crop_ratio, then the centre
    resize                bicubic with antialiasing (PIL), to uint8

MAE's linear probe takes the single try, which is BYOL's crop (arXiv:2006.07733). The
crop ratio is 224 / 256, and 1 for targets of more than 224 pixels. Fine-tuning changes
the cropped and flipped image with RandAugment (`randaug`).

Where we differ, and why:

- For a target that is not square the ratio is relative to the target's own (a crop for
  a 1:2 input has ratios around 1:2), so that training does not stretch what evaluation
  leaves alone. For square targets this is torchvision's rule to the letter.
- Large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size (the decoder's own scaled
  DCT) where the crop still keeps twice the target's resolution. A 12-megapixel photo
  decodes about three times as fast; the pixels differ by less than one grey level on
  average. Images of ImageNet's usual size are decoded in full.
- Four or more channels are resized one by one: PIL would treat the fourth as opacity.

The rotation that a camera notes in EXIF is not applied, as in the references. 16-bit
grey keeps its high byte. Transparency is dropped, not blended. Grey images in a set of
colour images are repeated to three channels; every other mismatch is an error.
"""

import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from crossmae_jax import errors
from crossmae_jax.data.randaug import RandAugment

EVAL_CROP_RATIO = 224 / 256
CROPS = ("single_try", "ten_tries")

# What PIL raises on damaged files, by format and by where the damage is.
_PIL_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_GREY_MODES = ("1", "L", "LA", "La")
_ASPECT = (3 / 4, 4 / 3)
_KEEP = 2  # a crop of a reduced JPEG has at least this many pixels per target pixel


class BadImage(ValueError):
    """An image that cannot be read or decoded; the message names it."""


class ChannelMismatch(errors.UserError, ValueError):
    """An image whose channels are not those of the configuration."""


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


# Only rng.random() is used: its stream is the one least likely to change.


def _sides(rng: np.random.Generator, pixels: int, scale, ratio) -> tuple[int, int]:
    """Draws the height and width of a crop."""
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


def train_image(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    image_size: tuple[int, int],
    channels: int,
    crop: str,
    crop_scale: tuple[float, float],
    flip: bool,
    randaug: RandAugment | None,
    name: str,
) -> np.ndarray:
    """Decodes, takes a random resized crop, flips half of the images, changes them.

    Args:
      image: an encoded file, or uint8 [height width c].
      crop: one of `CROPS`.
      randaug: what changes the cropped images, if anything does.
      name: what errors call the image.

    Returns:
      uint8 [height width c] of `image_size` and `channels`.
    """
    picture = _open(image, name)
    width, height = picture.size
    aspect = image_size[1] / image_size[0]
    ratio = (_ASPECT[0] * aspect, _ASPECT[1] * aspect)
    draw = single_try_crop if crop == "single_try" else random_resized_crop
    box = draw(rng, height, width, scale=crop_scale, ratio=ratio)
    mirror = flip and rng.random() < 0.5
    right, bottom = box.left + box.width, box.top + box.height
    area = (float(box.left), float(box.top), float(right), float(bottom))
    if isinstance(picture, Image.Image) and picture.format == "JPEG":
        reduction = min(
            box.width // (_KEEP * image_size[1]), box.height // (_KEEP * image_size[0])
        )
        if reduction > 1:
            picture.draft(picture.mode, (width // reduction, height // reduction))
            # The reduced size is rounded up, so the two factors differ a little.
            x, y = picture.size[0] / width, picture.size[1] / height
            area = (area[0] * x, area[1] * y, area[2] * x, area[3] * y)
    pixels = _resize(_decode(picture, channels, name), area, image_size)
    pixels = pixels[:, ::-1] if mirror else pixels
    if randaug is None:
        return pixels
    whole = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return _stack((randaug(whole, rng),))


def eval_image(
    image: bytes | np.ndarray,
    *,
    image_size: tuple[int, int],
    channels: int,
    crop_ratio: float,
    name: str,
) -> np.ndarray:
    """Decodes, resizes to the target's size over `crop_ratio` and takes the centre.

    An image that has the target's size already is left untouched.
    """
    picture = _open(image, name)
    width, height = picture.size
    bands = _decode(picture, channels, name)
    if (height, width) == tuple(image_size):
        return _stack(bands)
    cover_height, cover_width = (int(size / crop_ratio) for size in image_size)
    if cover_height * width >= cover_width * height:
        new_height, new_width = cover_height, int(cover_height * width / height)
    else:
        new_height, new_width = int(cover_width * height / width), cover_width
    top = round((new_height - image_size[0]) / 2)
    left = round((new_width - image_size[1]) / 2)
    whole = (0.0, 0.0, float(width), float(height))
    resized = _resize(bands, whole, (new_height, new_width))
    return resized[top : top + image_size[0], left : left + image_size[1]]


class _Array(NamedTuple):
    """A decoded array, with as much of PIL's face as the transforms need."""

    pixels: np.ndarray
    size: tuple[int, int]


def whole_images(
    images: Any, *, image_size: tuple[int, int], channels: int
) -> UInt8[np.ndarray, "b height width c"]:
    """Returns an array of images as it is, or makes one of a list of images.

    Args:
      images: uint8 [b height width c]; or a list of files and uint8 arrays
        [height width c] of any size, which are resized and cropped by `eval_image`.

    Raises:
      ValueError: if they are no uint8 images, or an array of another size.
    """
    if isinstance(images, (str, Path)):
        raise ValueError(f"images={str(images)!r} is one file; give a list: [path].")
    if isinstance(images, Sequence):
        if not images:
            raise ValueError("The list of images is empty.")
        return np.stack([
            eval_image(
                Path(image).read_bytes() if is_file else _with_channels(image, number),
                image_size=image_size, channels=channels, crop_ratio=EVAL_CROP_RATIO,
                name=str(image) if is_file else f"image {number}",
            ) for number, image in enumerate(images)
            for is_file in (isinstance(image, (str, Path)),)
        ])
    images = _uint8(images)
    if images.ndim != 4 or images.shape[1:] != (*image_size, channels):
        raise ValueError(
            f"images have the shape {images.shape}; expected (b, {image_size[0]}, "
            f"{image_size[1]}, {channels}). Give a list of arrays to have them resized "
            "and cropped, or load(path, image_size=...) for another size."
        )
    return images


def _with_channels(image: Any, number: int) -> np.ndarray:
    image = _uint8(image)
    if image.ndim != 3:
        raise ValueError(
            f"Image {number} has the shape {image.shape}; expected (height, width, "
            "channels). Of a grey one: image[:, :, None]."
        )
    return image


def _uint8(image: Any) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise ValueError(
            f"Images are of type {image.dtype}; expected uint8, 0 to 255: they are "
            "normalised later, as the model wants."
        )
    return image


def _open(image: bytes | np.ndarray, name: str) -> Image.Image | _Array:
    """Reads the header, so that a crop can be drawn before anything is decoded."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise TypeError(
                f"{name}: the source gives an array of {image.dtype} with shape "
                f"{image.shape}; expected uint8 [height width channels]. Convert the "
                "data set to 8 bits."
            )
        return _Array(image, (image.shape[1], image.shape[0]))
    try:
        return Image.open(io.BytesIO(image))
    except _PIL_ERRORS as error:
        reason = "not a known image format or damaged at the start"
        if not isinstance(error, Image.UnidentifiedImageError):
            reason = f"{type(error).__name__}: {error}"
        elif not image:
            reason = "the file is empty"
        raise BadImage(f"{name}: {reason}") from None


def _decode(
    picture: Image.Image | _Array, channels: int, name: str
) -> tuple[Image.Image, ...]:
    """Decodes into images of one or three channels that add up to `channels`."""
    if isinstance(picture, _Array):
        pixels = picture.pixels
        if channels == 3 and pixels.shape[-1] == 1:
            pixels = np.repeat(pixels, 3, axis=-1)
        if pixels.shape[-1] != channels:
            raise _mismatch(name, pixels.shape[-1], "array", channels)
        if channels == 3:
            return (Image.fromarray(pixels),)
        return tuple(Image.fromarray(pixels[..., c]) for c in range(channels))
    mode, bands = picture.mode, picture.getbands()
    grey = mode in _GREY_MODES or mode.startswith("I")
    if channels not in (1, 3) and len(bands) != channels:
        raise _mismatch(name, len(bands), mode, channels)
    if channels == 1 and not (grey or mode in ("P", "F")):
        raise _mismatch(name, len(bands), mode, channels)
    try:
        picture.load()
        if mode.startswith("I"):
            return (_high_byte(picture),) * (1 if channels == 1 else 3)
        if mode == "F":
            raise ValueError("floating-point pixels; store 8 or 16 bits")
        if channels not in (1, 3):
            return picture.split()
        if channels == 1 and grey:
            return (picture.convert("L"),)
        colour = picture.convert("RGB")
    except _PIL_ERRORS as error:
        raise BadImage(f"{name}: {type(error).__name__}: {error}") from None
    if channels == 3:
        return (colour,)
    red, green, blue = colour.split()
    if not red.tobytes() == green.tobytes() == blue.tobytes():
        raise _mismatch(name, 3, "colour palette", channels)
    return (red,)


def _high_byte(picture: Image.Image) -> Image.Image:
    """Sixteen bits of grey as eight."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"values from {values.min()} to {values.max()} do not fit 16 bits"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def _mismatch(name: str, found: int, mode: str, channels: int) -> ChannelMismatch:
    advice = f"set data.channels={found} and {found} values in data.mean and data.std"
    if channels == 1 and found in (3, 4):
        advice = (
            "set data.channels=3 and three values in data.mean and data.std, or "
            "convert the images to grey"
        )
    return ChannelMismatch(
        f"{name} has {found} channels ({mode}), but data.channels={channels}; {advice}."
    )


def _resize(
    bands: tuple[Image.Image, ...],
    area: tuple[float, float, float, float],
    size: tuple[int, int],
) -> np.ndarray:
    """Cuts out the area (left, top, right, bottom), then resizes it to `size`.

    Cut first: PIL's own `box` argument would let pixels from outside the area in.
    """
    left, top = math.floor(area[0]), math.floor(area[1])
    outer = (left, top, math.ceil(area[2]), math.ceil(area[3]))
    inner = (area[0] - left, area[1] - top, area[2] - left, area[3] - top)
    target = (size[1], size[0])
    return _stack(
        tuple(
            band.crop(outer).resize(target, Image.Resampling.BICUBIC, box=inner)
            for band in bands
        )
    )


def _stack(bands: tuple[Image.Image, ...]) -> np.ndarray:
    arrays = [np.asarray(band) for band in bands]
    arrays = [a if a.ndim == 3 else a[..., None] for a in arrays]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
