"""From the record of a source to the arrays of a sample: `config.data.transform`.

    classification   a crop of the image; its label, -1 where there is none
    squashed         the same of the whole image, whatever its shape
    weighted         as classification, and a weight for each patch of the crop

A transform draws one `View` for a sample and hands all of its fields through it. Those
of the classification are a random resized crop and a flip, and the centre in evaluation
(`crops`); fine-tuning changes the cropped image with RandAugment (`randaug`), as MAE
does (arXiv:2111.06377).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from crossmae_jax import errors, ranges
from crossmae_jax.data import crops, decoding, randaug
from crossmae_jax.data.fields import INTERPOLATIONS, Bands, Field, View
from crossmae_jax.data.randaug import RandAugment

NO_LABEL = -1

Record = Mapping[str, Any]  # what a source gives: "name", "image" and its kinds


@runtime_checkable
class Transform(Protocol):
    """From a record to a sample; small to pickle, because it runs in worker processes.

    Attributes:
      fields: the arrays of a sample by name. "sample" and "valid" are the pipeline's.
      needs: kinds of records (see `sources.Source`) that it cannot do without.
    """

    fields: Mapping[str, Field]
    needs: frozenset[str]

    def __call__(
        self, record: Record, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Returns an array for each field, of its shape and type.

        Args:
          rng: of the sample, and of no other; None in evaluation, which draws nothing.

        Raises:
          BadImage: if something of the record cannot be decoded: another record will
            stand in for it.
        """


@dataclasses.dataclass(frozen=True)
class Classification:
    """A crop of the image and its label; for pre-training too, which needs no label.

    Attributes:
      crop: one of `crops.CROPS`.
      crop_scale: least and greatest share of the image's area.
      flip: half of the images are mirrored.
      interpolation: of random crops, one of `fields.INTERPOLATIONS`; evaluation is
        bicubic.
      randaug: changes the cropped images, if anything does.
      eval_crop_ratio: share of the resized image's sides that evaluation sees.
      max_pixels: larger files are bad images.

    Raises:
      ValueError: if a crop is unknown, a size or a ratio is none, or no image is small
        enough.
    """

    image_size: tuple[int, int]
    channels: int
    crop: str
    crop_scale: tuple[float, ...]
    flip: bool
    randaug: RandAugment | None
    eval_crop_ratio: float
    max_pixels: int = decoding.MAX_PIXELS
    interpolation: str = "bicubic"

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        if self.crop not in crops.CROPS:
            raise ValueError(
                f"Unknown data.crop {self.crop!r}. Known: {', '.join(crops.CROPS)}."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"Unknown data.interpolation {self.interpolation!r}. Known: "
                f"{', '.join(INTERPOLATIONS)}."
            )
        ranges.check("data.channels", self.channels, least=1)
        for side in self.image_size:
            ranges.check("data.image_size", side, least=1)
        least, most = self.crop_scale if len(self.crop_scale) == 2 else (0, 0)
        if not 0 < least <= most <= 1:
            raise ValueError(
                f"config.data.crop_scale={self.crop_scale} must be two shares of an "
                "image's area, above 0 and at most 1, the smaller one first."
            )
        if not 0 < self.eval_crop_ratio <= 1:
            raise ValueError(
                f"config.data.eval_crop_ratio={self.eval_crop_ratio} must lie between "
                "0 and 1; it is the share of the resized image's side that is kept."
            )
        if self.max_pixels < 1:
            raise ValueError(
                f"config.data.max_pixels={self.max_pixels} must be 1 or more; it is "
                "height times width of the largest image that is decoded."
            )

    @classmethod
    def from_config(cls, data: ConfigDict) -> "Classification":
        """Reads its settings from `config.data`."""
        return cls(**cls._settings(data))

    @classmethod
    def _settings(cls, data: ConfigDict) -> dict[str, Any]:
        return dict(
            image_size=tuple(data.image_size),
            channels=data.channels,
            crop=data.crop,
            crop_scale=tuple(float(share) for share in data.crop_scale),
            flip=data.flip,
            randaug=randaug.from_config(data),
            eval_crop_ratio=data.eval_crop_ratio,
            max_pixels=data.max_pixels,
            interpolation=data.interpolation,
        )

    @property
    def fields(self) -> dict[str, Field]:
        """The pixels and the label."""
        return {
            "image": Field((*self.image_size, self.channels), "uint8", 0),
            "label": Field((), "int32", NO_LABEL),
        }

    def __call__(
        self, record: Record, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Returns uint8 pixels [height width c] and an int32 label []."""
        picture = decoding.open_image(
            record["image"], name=record["name"], max_pixels=self.max_pixels
        )
        view = self.view(picture.size, rng)
        if rng is not None:
            picture.reduce(view)
        return self.seen(record, view, picture.decode(self.channels), rng)

    def view(self, stored: tuple[int, int], rng: np.random.Generator | None) -> View:
        """Returns what is seen of an image of this height and width."""
        if rng is None:
            return crops.centre_view(
                stored, image_size=self.image_size, crop_ratio=self.eval_crop_ratio
            )
        return crops.random_view(
            rng, stored, image_size=self.image_size, crop=self.crop,
            crop_scale=self.crop_scale, flip=self.flip,
        )._replace(interpolation=self.interpolation)

    def seen(
        self, record: Record, view: View, bands: Bands,
        rng: np.random.Generator | None,
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a sample, of what is seen of its record."""
        pixels = view.pixels(bands)
        if rng is not None and self.randaug is not None:
            whole = Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)
            pixels = np.asarray(self.randaug(whole, rng)).reshape(pixels.shape)
        label = np.array(record.get("label", NO_LABEL), np.int32)
        return {"image": pixels, "label": label}


@dataclasses.dataclass(frozen=True)
class Squashed(Classification):
    """The whole image, resized to the model's size whatever its shape; no crop.

    What AMT looks at (arXiv 2211.15362): every place of an image has a place in it.
    """

    def view(self, stored: tuple[int, int], rng: np.random.Generator | None) -> View:
        """Returns all of it."""
        whole = (0.0, 0.0, float(stored[1]), float(stored[0]))
        return View(stored, whole, False, self.image_size, self.image_size)


@dataclasses.dataclass(frozen=True)
class Weighted(Classification):
    """A crop, and how much each of its patches weighs: for `masking.weighted`.

    A record's "weights" lie on a grid over the whole image. They are cut and mirrored
    by the view of the pixels, and averaged over each patch of the crop. All are 1 in
    evaluation, and where a record has none.

    Attributes:
      weights_grid: rows and columns of the patches, or of units of patches.

    Raises:
      ValueError: if it is none.
    """

    weights_grid: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if len(self.weights_grid or ()) != 2 or min(self.weights_grid) < 1:
            raise ValueError(
                f"config.data.weights_grid={self.weights_grid} with "
                "data.transform='weighted'; give rows and columns of what is masked as "
                "one, such as (14, 14)."
            )

    @classmethod
    def _settings(cls, data: ConfigDict) -> dict[str, Any]:
        grid = data.weights_grid
        given = {"weights_grid": None if grid is None else tuple(grid)}
        return super()._settings(data) | given

    @property
    def fields(self) -> dict[str, Field]:
        """The pixels, the label and the weights, in raster order."""
        shape = (math.prod(self.weights_grid),)
        return super().fields | {"weights": Field(shape, "float32", 1.0)}

    def seen(
        self, record: Record, view: View, bands: Bands,
        rng: np.random.Generator | None,
    ) -> dict[str, np.ndarray]:
        """Returns also f32 weights [patches]."""
        weights, grid = np.ones(self.weights_grid, np.float32), self.weights_grid
        if rng is not None and "weights" in record:
            patches = view._replace(size=grid, canvas=grid)
            weights = patches.raster(record["weights"], nearest=False, fill=1.0)
        return super().seen(record, view, bands, rng) | {"weights": weights.reshape(-1)}


# config.data.transform -> what makes it from config.data
TRANSFORMS: dict[str, Callable[[ConfigDict], Transform]] = {
    "classification": Classification.from_config,
    "squashed": Squashed.from_config,
    "weighted": Weighted.from_config,
}


def make(data: ConfigDict) -> Transform:
    """Returns the transform that `config.data` asks for.

    Raises:
      SetupError: if there is no such transform, or a setting makes no sense.
    """
    if data.transform not in TRANSFORMS:
        raise errors.SetupError(
            f"Unknown data.transform {data.transform!r}. Known: "
            f"{', '.join(sorted(TRANSFORMS))}."
        )
    with errors.setting_up():
        return TRANSFORMS[data.transform](data)


def eval_image(
    image: bytes | np.ndarray,
    *,
    image_size: tuple[int, int],
    channels: int,
    crop_ratio: float,
    name: str,
    max_pixels: int = decoding.MAX_PIXELS,
) -> UInt8[np.ndarray, "height width c"]:
    """Returns the pixels of an image as evaluation sees them, see `crops.centre_view`.

    Args:
      image: an encoded file, or uint8 [height width c].
      name: what errors call the image.
      max_pixels: height times width of the largest file that may be decoded.

    Raises:
      BadImage: if it cannot be decoded.
    """
    picture = decoding.open_image(image, name=name, max_pixels=max_pixels)
    view = crops.centre_view(picture.size, image_size=image_size, crop_ratio=crop_ratio)
    return view.pixels(picture.decode(channels))


def whole_images(
    images: Any, *, image_size: tuple[int, int], channels: int
) -> UInt8[np.ndarray, "b height width c"]:
    """Returns an array of images as it is, or makes one of a list of images.

    Args:
      images: uint8 [b height width c]; or a list of files and uint8 arrays
        [height width c] of any size, which are resized and cropped by `eval_image`.

    Raises:
      ValueError: if they are no uint8 images, an array of another size, or files of
        more than `decoding.MAX_PIXELS`.
    """
    if isinstance(images, (str, Path)):
        raise ValueError(f"images={str(images)!r} is one file; give a list: [path].")
    if isinstance(images, Sequence):
        if not images:
            raise ValueError("The list of images is empty.")
        return np.stack([
            eval_image(
                Path(image).read_bytes() if is_file else _with_channels(image, number),
                image_size=image_size, channels=channels,
                crop_ratio=crops.EVAL_CROP_RATIO,
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
