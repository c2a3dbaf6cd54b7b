"""Image operations on the device: normalising, erasing, mixing.

Images travel as uint8, a quarter of the traffic of float32, and are normalised here.
Fine-tuning (MAE, arXiv:2111.06377, appendix A.1) then erases a box of some images and
mixes all of them, in this order, both as timm does:

    random erasing  arXiv:1708.04896, timm.data.random_erasing, mode "pixel"
        normal noise in a box: area ~ uniform(0.02, 1/3) of the image, height / width ~
        log-uniform(0.3, 1/0.3), ten tries until both sides are below the image's
    mixup           arXiv:1710.09412, timm.data.mixup, mode "batch"
        lam x + (1 - lam) partner, lam ~ beta(mixup_alpha, mixup_alpha)
    cutmix          arXiv:1905.04899, likewise
        a box of the partner, of sides sqrt(1 - lam), cut off at the image's border;
        lam is then the share of the image that is left

A partner is the image in the mirrored place of a group, and lam, box and the choice
between mixup and cutmix are common to a group. timm's group is the batch of one GPU, 32
images in MAE's recipe. Cutmix boxes of odd sides have all their pixels, as in timm from
1.0.29 on; in earlier ones, 0.3.2 of MAE's recipe too, they were a pixel smaller.

Draws are keyed by sample numbers (a group's by its first), so they do not depend on the
number of devices. Without communication every group must lie on one device: choose a
multiple of their number.
"""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt, UInt8

_ERASED_AREA = (0.02, 1 / 3)  # least and greatest share of the image: timm
_ERASED_ASPECT = (0.3, 1 / 0.3)
_TRIES = 10


class Boxes(NamedTuple):
    """Rectangles of pixels; bottom and right are the first pixels outside."""

    top: Int[Array, "*n"]
    bottom: Int[Array, "*n"]
    left: Int[Array, "*n"]
    right: Int[Array, "*n"]

    def mask(self, height: int, width: int) -> Bool[Array, "*n height width 1"]:
        """Returns True inside."""
        top, bottom, left, right = (x[..., None, None, None] for x in self)
        rows = jnp.arange(height).reshape((1,) * self.top.ndim + (height, 1, 1))
        columns = jnp.arange(width).reshape((1,) * self.top.ndim + (1, width, 1))
        return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)


class Mixing(NamedTuple):
    """How the images of each group are mixed with their partners.

    Attributes:
      share: how much of an image's own target it keeps (lambda).
      is_cutmix: whether a box of the partner is pasted; else the images are blended.
      boxes: that box, for cutmix.
    """

    share: Float[Array, "groups"]
    is_cutmix: Bool[Array, "groups"]
    boxes: Boxes


def _per_channel(values: tuple[float, ...], channels: int, name: str) -> Array:
    if len(values) != channels:
        raise ValueError(
            f"config.data.{name} has {len(values)} values {tuple(values)} but images "
            f"have {channels} channels; give one value per channel."
        )
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, channels)


def check_statistics(
    *, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Raises ValueError unless these can be those of pixels in 0..1; None is unknown.

    A model is blind to images that are normalised in other units, and says nothing.
    """
    named = {"mean": mean, "std": std}
    for name, values in named.items():
        if isinstance(values, numbers.Real):
            raise ValueError(f"{name}={values}; expected a value for each channel.")
    named = {k: tuple(values) for k, values in named.items() if values is not None}
    given = ", ".join(f"{name}={values}" for name, values in named.items())
    for name, values in named.items():
        if not all(isinstance(x, numbers.Real) and math.isfinite(x) for x in values):
            raise ValueError(f"{given}: {name} has a value that is no number.")
    if any(x <= 0 for x in named.get("std", ())):
        raise ValueError(
            f"{given}: expected values above 0 in std, by which pixels are divided; "
            "1.0 leaves a channel as it is."
        )
    if any(x < 0 for x in named.get("mean", ())):
        raise ValueError(f"{given}: expected values in 0..1 in mean, as pixels are.")
    wide = [name for name, values in named.items() if any(x > 1 for x in values)]
    if "mean" in wide and all(x >= 1 for x in named.get("std", (0,))):
        wide = list(named)  # a deviation of 1, of pixels in 0..255
    if wide:
        scaled = ", ".join(
            f"{name}={tuple(float(f'{x / 255:.4g}') for x in named[name])}"
            for name in wide
        )
        raise ValueError(
            f"{given}: {' and '.join(wide)} in the units of pixels in 0..255, but here "
            f"they are in 0..1; divided by 255: give {scaled}."
        )


def normalize(
    images: UInt8[Array, "b height width c"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b height width c"]:
    """Scales to 0..1, subtracts the mean of each channel and divides by its std.

    Raises:
      ValueError: if that would be no normalising, see `check_statistics`.
    """
    check_statistics(mean=mean, std=std)
    channels = images.shape[-1]
    return (
        images.astype(jnp.float32) / 255.0 - _per_channel(mean, channels, "mean")
    ) / _per_channel(std, channels, "std")


def unnormalize(
    images: Float[Array, "b height width c"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b height width c"]:
    """Undoes `normalize`, to 0..1; clips what lies outside."""
    channels = images.shape[-1]
    pixels = images * _per_channel(std, channels, "std") + _per_channel(
        mean, channels, "mean"
    )
    return jnp.clip(pixels, 0.0, 1.0)


def draw_erasing(
    key: Key[Array, ""], *, height: int, width: int, probability: float
) -> Boxes:
    """Draws the box to erase from one image; empty if there is none."""
    gate, area, aspect, row, column = jax.random.uniform(key, (5, _TRIES))
    low, high = _ERASED_AREA
    area = (low + (high - low) * area) * (height * width)
    low, high = (math.log(ratio) for ratio in _ERASED_ASPECT)
    aspect = jnp.exp(low + (high - low) * aspect)
    box_height, box_width = jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)
    box_height, box_width = (
        jnp.round(side).astype(jnp.int32) for side in (box_height, box_width)
    )
    fits = (box_height < height) & (box_width < width)
    erased = fits.any() & (gate[0] < probability)
    first = jnp.argmax(fits)

    def edges(size, side, place):
        low = (place * (size - side + 1)).astype(jnp.int32)
        return tuple(jnp.where(erased, x[first], 0) for x in (low, low + side))

    return Boxes(*edges(height, box_height, row), *edges(width, box_width, column))


def random_erasing(
    key: Key[Array, ""],
    sample: UInt[Array, "b"],
    images: Float[Array, "b height width c"],
    *,
    probability: float,
) -> Float[Array, "b height width c"]:
    """Fills a box of some images with noise.

    Args:
      sample: number of each image in the run; what happens to an image depends on the
        key and its number alone.
      images: normalised, so that noise of variance 1 looks like an image.
      probability: share of the images that lose a box.
    """
    _, height, width, _ = images.shape

    def erase(number, image):
        box_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
        box = draw_erasing(
            box_key, height=height, width=width, probability=probability
        )
        noise = jax.random.normal(noise_key, image.shape, image.dtype)
        return jnp.where(box.mask(height, width), noise, image)

    return jax.vmap(erase)(sample, images)


def cutmix_boxes(
    share: Float[Array, "groups"],
    row: Int[Array, "groups"],
    column: Int[Array, "groups"],
    *,
    height: int,
    width: int,
) -> Boxes:
    """Returns boxes around (row, column), cut off at the image's border.

    Args:
      share: what a whole box leaves of the image; its sides are rounded down.
    """

    def edges(size, centre):
        side = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32)
        low, high = centre - side // 2, centre + (side + 1) // 2
        return jnp.clip(low, 0, size), jnp.clip(high, 0, size)

    return Boxes(*edges(height, row), *edges(width, column))


def _symmetric_beta(
    alpha: Float[Array, "n"], radius: Float[Array, "n"], angle: Float[Array, "n"]
) -> Float[Array, "n"]:
    """Turns two uniforms into a draw from beta(alpha, alpha), without a loop.

    Bailey's polar method for Student's t with 2 alpha degrees of freedom (Mathematics
    of Computation 62, 1994), of which (1 + t / sqrt(2 alpha + t^2)) / 2 is such a beta.
    """
    w, cosine = (1 - radius) ** (1 / alpha), jnp.cos(2 * math.pi * angle)
    sine = cosine * jnp.sqrt((1 - w) / (w + (1 - w) * cosine**2))
    return jnp.clip(0.5 + 0.5 * sine, 0, 1)


def draw_mixing(
    key: Key[Array, ""],
    number: UInt[Array, "groups"],
    *,
    height: int,
    width: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_probability: float,
) -> Mixing:
    """Draws how groups are mixed, each from its own number."""

    def uniform(number):
        return jax.random.uniform(jax.random.fold_in(key, number), (5,))

    which, radius, angle, row, column = jax.vmap(uniform)(number).T
    is_cutmix = which < cutmix_probability
    alpha = jnp.where(is_cutmix, cutmix_alpha, mixup_alpha)
    share = _symmetric_beta(alpha, radius, angle)
    row = (row * height).astype(jnp.int32)
    column = (column * width).astype(jnp.int32)
    boxes = cutmix_boxes(share, row, column, height=height, width=width)
    area = (boxes.bottom - boxes.top) * (boxes.right - boxes.left)
    return Mixing(
        jnp.where(is_cutmix, 1 - area / (height * width), share), is_cutmix, boxes
    )


def mix(
    images: Float[Array, "b height width c"],
    targets: Float[Array, "b classes"],
    mixing: Mixing,
) -> tuple[Float[Array, "b height width c"], Float[Array, "b classes"]]:
    """Mixes every image and its target with the one mirrored in its group."""
    groups = mixing.share.shape[0]
    _, height, width, _ = images.shape

    def grouped(x):
        x = x.reshape(groups, -1, *x.shape[1:])
        return x, x[:, ::-1]

    own, partner = grouped(images)
    share = mixing.share.astype(images.dtype).reshape(groups, 1, 1, 1, 1)
    is_cutmix = mixing.is_cutmix.reshape(groups, 1, 1, 1, 1)
    pasted = jnp.where(mixing.boxes.mask(height, width)[:, None], partner, own)
    blended = own * share + partner * (1 - share)
    mixed = jnp.where(is_cutmix, pasted, blended).reshape(images.shape)
    own, partner = grouped(targets)
    share = mixing.share.reshape(groups, 1, 1)
    return mixed, (own * share + partner * (1 - share)).reshape(targets.shape)


def mixup_cutmix(
    key: Key[Array, ""],
    sample: UInt[Array, "b"],
    images: Float[Array, "b height width c"],
    targets: Float[Array, "b classes"],
    *,
    groups: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_probability: float,
) -> tuple[Float[Array, "b height width c"], Float[Array, "b classes"]]:
    """Mixes images and their targets in pairs, by mixup or by cutmix.

    Args:
      sample: number of each image in the run.
      targets: class probabilities, as of `losses.smooth_labels`.
      groups: how many equal parts of the batch draw for themselves.
      cutmix_probability: share of the groups that cutmix instead of mixup.

    Raises:
      ValueError: if the batch has no such parts of an even number of images.
    """
    batch_size, height, width, _ = images.shape
    if groups < 1 or batch_size % (2 * groups):
        raise ValueError(
            f"A batch of {batch_size} images cannot be cut into {groups} equal groups "
            "of an even number, whose images mixup and cutmix pair; make "
            "config.data.batch_size / config.optim.accum_steps a multiple of "
            f"{2 * max(groups, 1)}, or choose another number of groups."
        )
    mixing = draw_mixing(
        key, sample[:: batch_size // groups], height=height, width=width,
        mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha,
        cutmix_probability=cutmix_probability,
    )
    return mix(images, targets, mixing)
