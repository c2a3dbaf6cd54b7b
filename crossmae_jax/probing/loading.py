"""Weights of any format, ready to be looked into: `crossmae_jax.load(path)`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from crossmae_jax.convert import names, opening, resizing, structure
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.probing import pretrained


def load(
    path: Any, *, format: str | None = None, step: int | None = None,
    image_size: Sequence[int] | None = None, mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None, **facts: Any,
) -> pretrained.Pretrained:
    """Returns the model of weights of any format, with its decoder if there is one.

    Logs what is assumed of it because nothing tells it, and what was changed in it.

    Args:
      path: a run, an import or a file: see `convert.opening`.
      step: of a run; the newest intact one if not given.
      image_size: height and width to work at, multiples of the patch size; the
        position tables are resized. That of pre-training if not given.
      mean: per channel, for pixels in 0..1; needed where the file does not tell, and
        replaces the card's; likewise `std`.
      facts: what else the file does not tell, as in `convert.hints.Facts`.

    Raises:
      ConversionError: if the weights cannot be read, or do not tell enough.
    """
    # For positions that form no square: the size may be the file's own.
    fallback = Facts(
        image_size=None if image_size is None else tuple(image_size),
        mean=mean, std=std,
    )
    weights = opening.open_weights(
        path, format=format, step=step, fallback=fallback, **facts
    )
    card, tensors = weights.card, dict(weights.tensors)
    if image_size is not None:
        resized = dataclasses.replace(card, image_size=tuple(image_size))
        aggregators = getattr(structure.build(card), "aggregators", {}).values()
        if resized.image_size != card.image_size and not all(
            aggregator.resizes for aggregator in aggregators
        ):
            raise ConversionError(
                "The positions of this model's aggregator are those of "
                f"{card.image_size}, and cannot be resized to {resized.image_size}."
            )
        new_grid = resized.encoder.grid
        grid = card.grid_for(new_grid)
        resizing.resize(tensors, grid=grid, new_grid=new_grid)
        resizing.windows(tensors, card.encoder.windows, resized.encoder.windows)
        if grid == new_grid:  # which tells what was assumed
            assumed = {k: v for k, v in card.assumed.items() if k != "image_size"}
            resized = dataclasses.replace(resized, assumed=assumed)
        card = resized
    given = {name for name, x in (("mean", mean), ("std", std)) if x is not None}
    card = dataclasses.replace(
        card, mean=mean or card.mean, std=std or card.std,
        assumed={k: v for k, v in card.assumed.items() if k not in given},
    )
    if weights.changed:
        logging.warning("%s: %s.", path, "; ".join(weights.changed))
    if card.assumed:  # which nothing else would show, if it is wrong
        advice = " image_size of load is to work at: import the file with its own."
        logging.warning(
            "%s: assumed: %s.%s", path, "; ".join(card.assumed.values()),
            advice if "image_size" in card.assumed else "",
        )
    like = structure.abstract_variables(card)
    variables = jax.tree.map(jnp.asarray, names.variables_of(tensors, like))
    if card.kind == "encoder":  # a ViT by itself has no level per part
        variables = {name: tree["encoder"] for name, tree in variables.items()}
    return pretrained.Pretrained(card, variables)
