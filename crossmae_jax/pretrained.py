"""Encoders for notebooks: `crossmae_jax.load(path)`, images in, features out."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from crossmae_jax import augment, parallel, patches
from crossmae_jax.convert import exporting, names, sources, structure
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.data import transforms
from crossmae_jax.models import posemb, vit


class Encoder:
    """An encoder with its weights: `features = encoder(images)`.

    Whole images, no masking, no key: the same images give the same features. They are
    normalised as the card says. Computation is float32; compiled once per batch size.

    Images are uint8, `[b height width c]` of the encoder's size, or a list of uint8
    arrays `[height width c]` of any size, which are resized to 256/224 of the size and
    cropped at the centre, as in evaluation.

    Attributes:
      card: what the weights are.
      variables: the weights.

    Example:
      encoder = crossmae_jax.load("runs/mine")
      features = encoder(images)  # b d
      tokens = encoder.tokens(images)  # b 1+n d, the class token first
    """

    def __init__(self, card: Card, variables: Any):
        if card.mean is None or card.std is None or not (
            len(card.mean) == len(card.std) == card.channels and min(card.std) > 0
        ):
            raise ConversionError(
                f"mean={card.mean}, std={card.std} do not say how images are "
                f"normalised for {card.origin}; give mean and std, a value for each of "
                f"its {card.channels} channels, for pixels in 0..1, std above 0."
            )
        self.card = card
        self.variables = variables
        self._model = structure.build(card)
        mesh = parallel.make_mesh(jax.local_devices()[:1])  # where new arrays lie
        self._apply = jax.jit(parallel.within(mesh, self._run))

    def __call__(self, images: Any) -> Float[Array, "b d"]:
        """Returns a vector per image: what the evaluations of this library use.

        That is the mean over patch tokens of the encoder's output, or of the last
        feature map that CrossMAE's decoder was trained on; of a classifier the vector
        that its head sees.
        """
        return self._apply(self.variables, self.prepare(images))["features"]

    def tokens(self, images: Any) -> Float[Array, "b n d"]:
        """Returns the output of the last block, after its norm if there is one."""
        return self._apply(self.variables, self.prepare(images))["tokens"]

    def logits(self, images: Any) -> Float[Array, "b classes"]:
        """Returns a value per class; for fine-tuned classifiers only.

        Raises:
          ConversionError: if there is no head.
        """
        if "head" not in self.card.parts:
            raise ConversionError(
                f"{self.card.origin} has no head, only {', '.join(self.card.parts)}; "
                "fit one on the features."
            )
        return self._apply(self.variables, self.prepare(images))["logits"]

    def prepare(self, images: Any) -> UInt8[np.ndarray, "b height width c"]:
        """Returns images as an array of the encoder's size.

        Raises:
          ValueError: if they are no uint8 images, or an array of another size.
        """
        size, channels = tuple(self.card.image_size), self.card.channels
        if isinstance(images, Sequence):
            if not images:
                raise ValueError("The list of images is empty.")
            return np.stack([
                transforms.eval_image(
                    _uint8(image), image_size=size, channels=channels,
                    crop_ratio=224 / 256, name=f"image {number}",
                ) for number, image in enumerate(images)
            ])
        images = _uint8(images)
        if images.ndim != 4 or images.shape[1:] != (*size, channels):
            raise ValueError(
                f"images have the shape {images.shape}; expected (b, {size[0]}, "
                f"{size[1]}, {channels}). Give a list of arrays to have them resized "
                "and cropped, or load(path, image_size=...) for another size."
            )
        return images

    def _run(self, variables: Any, images: Array) -> dict[str, Array]:
        images = augment.normalize(images, mean=self.card.mean, std=self.card.std)
        with jax.default_matmul_precision("highest"):
            found = self._model.apply(variables, images)
        if self.card.kind == "classifier":
            return {
                name: value for name, value in found._asdict().items()
                if value is not None
            }
        features = vit.mean_feature(found, _last_map(self.card))
        return {"tokens": found.tokens, "features": features}


def _uint8(image: Any) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise ValueError(
            f"Images are of type {image.dtype}; expected uint8, 0 to 255: they are "
            "normalised here, as the card says."
        )
    return image


def _last_map(card: Card) -> int | None:
    model = card.model
    if model["fusion"] != "inter_block":
        return None
    return structure.mixed_maps(model)[-1]


def load(
    path: Any, *, format: str | None = None, step: int | None = None,
    image_size: Sequence[int] | None = None, mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None, **facts: Any,
) -> Encoder:
    """Returns the encoder, or fine-tuned classifier, of weights of any format.

    Args:
      path: a run, an import or a file: see `convert.sources`.
      step: of a run; the newest intact one if not given.
      image_size: height and width to encode at, multiples of the patch size; the
        position table is resized. That of pre-training if not given.
      mean: per channel, for pixels in 0..1; needed where the file does not tell, and
        replaces the card's; likewise `std`.
      facts: what else the file does not tell, as in `convert.hints.Facts`.

    Raises:
      ConversionError: if the weights cannot be read, or do not tell enough.
    """
    # For positions that form no square: the size may be the file's own.
    fallback = Facts(image_size=None if image_size is None else tuple(image_size))
    weights = sources.open_weights(
        path, format=format, step=step, fallback=fallback, **facts
    )
    if weights.card.kind == "pretrain":
        weights = exporting.encoder_of(weights)
    card, tensors = weights.card, dict(weights.tensors)
    if image_size is not None:
        grids = [
            patches.grid_size(tuple(size), card.patch_size)
            for size in (card.image_size, image_size)
        ]
        tensors["encoder/pos_embed"] = tensors["encoder/pos_embed"].then(
            functools.partial(posemb.resize, grid=grids[0], new_grid=grids[1])
        )
        card = dataclasses.replace(card, image_size=tuple(image_size))
    card = dataclasses.replace(card, mean=mean or card.mean, std=std or card.std)
    like = structure.abstract_variables(card)
    variables = jax.tree.map(jnp.asarray, names.variables_of(tensors, like))
    if card.kind == "encoder":  # a ViT by itself has no level per part
        variables = {name: tree["encoder"] for name, tree in variables.items()}
    return Encoder(card, variables)
