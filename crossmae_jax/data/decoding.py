"""From a stored image to decoded pixels: files of any kind, and arrays.

The header is read first, so that a crop can be drawn before anything is decoded. Large
JPEGs are then decoded at 1/2, 1/4 or 1/8 of their size (the decoder's own scaled DCT)
where the crop still keeps twice the target's resolution. A 12-megapixel photo decodes
about three times as fast; the pixels differ by less than one grey level on average.
Images of ImageNet's usual size are decoded in full.

How much memory a file can take is known from its header: a few bytes may stand for
gigabytes. An image of more than `max_pixels` is not decoded. PIL has a limit of its
own, one for the whole process, which is raised where more are asked for.

Only the formats that are meant are opened, those of `listing.EXTENSIONS`, whatever a
file is called: PIL knows more, and starts a program for some (Ghostscript for EPS).
Whatever goes wrong while a file is decoded makes it a bad image, also where its parts
are fewer than its header promises (`missing_parts`).

The rotation that a camera notes in EXIF is not applied, as in the references. 16-bit
grey keeps its high byte. Transparency is dropped, not blended. Grey images in a set of
colour images are repeated to three channels; every other mismatch is an error. Four or
more channels are kept one by one: PIL would treat the fourth as opacity.
"""

import dataclasses
import io

import numpy as np
from PIL import Image

from crossmae_jax import errors
from crossmae_jax.data import missing_parts
from crossmae_jax.data.fields import Bands, View

# PIL's names. Those first that it knows without importing all of its plugins.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")
_GREY_MODES = ("1", "L", "LA", "La")
MAX_PIXELS = 178_956_970  # what PIL opens at most by default; 0.7 GB as colour
_KEEP = 2  # a crop of a reduced JPEG has at least this many pixels per target pixel


class BadImage(ValueError):
    """An image that cannot be read or decoded; the message names it."""


class ChannelMismatch(errors.UserError, ValueError):
    """An image whose channels are not those of the configuration."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A stored image of which the header has been read, and nothing else.

    Attributes:
      name: what errors call the image.
      size: height and width, as stored.
      encoded: the file; empty for an array.
    """

    content: Image.Image | np.ndarray
    name: str
    size: tuple[int, int]
    encoded: bytes = b""

    def reduce(self, view: View) -> None:
        """Has a JPEG decoded at a lower resolution where the view does not need all."""
        if not isinstance(self.content, Image.Image) or self.content.format != "JPEG":
            return
        left, top, right, bottom = view.area
        reduction = int(min(
            (right - left) // (_KEEP * view.size[1]),
            (bottom - top) // (_KEEP * view.size[0]),
        ))
        if reduction > 1:
            height, width = self.size
            self.content.draft(
                self.content.mode, (width // reduction, height // reduction)
            )

    def decode(self, channels: int) -> Bands:
        """Decodes into images of one or three channels that add up to `channels`.

        Raises:
          BadImage: if the file is damaged.
          ChannelMismatch: if it has other channels.
        """
        if isinstance(self.content, np.ndarray):
            return _split(self.content, channels, self.name)
        return _decode(self.content, self.encoded, channels, self.name)


def open_image(
    image: bytes | np.ndarray, *, name: str, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Reads the header of an encoded file, or takes uint8 [height width c] as it is.

    Args:
      max_pixels: height times width of the largest file that may be decoded.

    Raises:
      BadImage: if it is no image, or one of more pixels.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise TypeError(
                f"{name}: the source gives an array of {image.dtype} with shape "
                f"{image.shape}; expected uint8 [height width channels]. Convert the "
                "data set to 8 bits."
            )
        return Picture(image, name, image.shape[:2])
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        opened = Image.open(io.BytesIO(image), formats=FORMATS)
    except Image.DecompressionBombError as error:  # above twice PIL's own limit
        raise _too_large(name, f"PIL refuses it ({error})", max_pixels) from None
    except Exception as error:  # what a damaged header does to PIL is past listing
        reason = (
            f"not a known image format ({', '.join(FORMATS)}) or damaged at the start: "
            f"it begins with {bytes(image[:8])!r}"
        )
        if not isinstance(error, Image.UnidentifiedImageError):
            reason = f"{type(error).__name__}: {error}"
        elif not image:
            reason = "the file is empty"
        raise BadImage(f"{name}: {reason}") from None
    height, width = opened.height, opened.width
    if height * width > max_pixels:
        raise _too_large(name, f"it has {height} x {width} pixels", max_pixels)
    return Picture(opened, name, (height, width), image)


def _split(pixels: np.ndarray, channels: int, name: str) -> Bands:
    if channels == 3 and pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] != channels:
        raise _mismatch(name, pixels.shape[-1], "array", channels)
    if channels == 3:
        return (Image.fromarray(pixels),)
    return tuple(Image.fromarray(pixels[..., c]) for c in range(channels))


def _decode(
    image: Image.Image, encoded: bytes, channels: int, name: str
) -> Bands:
    mode, bands = image.mode, image.getbands()
    grey = mode in _GREY_MODES or mode.startswith("I")
    if channels not in (1, 3) and len(bands) != channels:
        raise _mismatch(name, len(bands), mode, channels)
    if channels == 1 and not (grey or mode in ("P", "F")):
        raise _mismatch(name, len(bands), mode, channels)
    try:
        missing = missing_parts.before_decoding(image)
        image.load()
        if missing := missing or missing_parts.after_decoding(image, encoded):
            raise ValueError(missing)
        if mode.startswith("I"):
            return (_high_byte(image),) * (1 if channels == 1 else 3)
        if mode == "F":
            raise ValueError("floating-point pixels; store 8 or 16 bits")
        if channels not in (1, 3):
            return image.split()
        if channels == 1 and grey:
            return (image.convert("L"),)
        colour = image.convert("RGB")
    except Exception as error:  # likewise, and no image may end a run of days
        raise BadImage(f"{name}: {type(error).__name__}: {error}") from None
    if channels == 3:
        return (colour,)
    red, green, blue = colour.split()
    if not red.tobytes() == green.tobytes() == blue.tobytes():
        raise _mismatch(name, 3, "colour palette", channels)
    return (red,)


def _high_byte(image: Image.Image) -> Image.Image:
    """Sixteen bits of grey as eight."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"values from {values.min()} to {values.max()} do not fit 16 bits"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def _too_large(name: str, what: str, max_pixels: int) -> BadImage:
    return BadImage(
        f"{name}: {what}; data.max_pixels={max_pixels} is the most that is decoded. "
        "Make the image smaller, give its pixels as an array, or raise data.max_pixels"
    )


def _mismatch(name: str, stored: int, mode: str, channels: int) -> ChannelMismatch:
    advice = f"set data.channels={stored} and {stored} values in data.mean and data.std"
    if channels == 1 and stored in (3, 4):
        advice = (
            "set data.channels=3 and three values in data.mean and data.std, or "
            "convert the images to grey"
        )
    return ChannelMismatch(
        f"{name} has {stored} channels ({mode}), but data.channels={channels}; "
        f"{advice}."
    )
