"""Weights that were opened, of whatever format, and whether they are all there."""

import dataclasses
import math

import jax

from crossmae_jax.convert import hints, names, spellings, structure
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.files.tensor import Tensors
from crossmae_jax.convert.names import ConversionError, Untold
from crossmae_jax.paths import AnyPath

CARD = "crossmae_jax"  # the card's name in the metadata of our files
EMBEDDED = "crossmae_jax_card"  # and in files of other formats that we wrote


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights under our names and in our layouts, whatever they come from.

    Attributes:
      format: one of `FORMATS`.
      evidence: what format and card were concluded from, a line each.
      place: in the file, as in `contents.Contents`.
      changed: of the evidence, what is other here than in the file.
    """

    card: Card
    tensors: Tensors
    format: str
    evidence: tuple[str, ...]
    place: str = "."
    changed: tuple[str, ...] = ()


def encoder_of(weights: Weights) -> Weights:
    """Returns the encoder by itself, without decoder or head."""
    card = weights.card.encoder_only()
    tensors = {
        name: value for name, value in weights.tensors.items()
        if name.startswith("encoder/")
    }
    return dataclasses.replace(weights, card=card, tensors=tensors)


def with_usable_names(weights: Weights) -> Weights:
    """Drops names of classes that are too many or too few, and says so."""
    card = weights.card
    wrong = hints.check_classes(card.classes, card.model.get("num_classes"))
    if not wrong:
        return weights
    line = f"left out: names of the classes; {wrong}"
    return dataclasses.replace(
        weights, card=dataclasses.replace(card, classes=None),
        evidence=(*weights.evidence, line), changed=(*weights.changed, line),
    )


def check(
    tensors: Tensors, card: Card, path: AnyPath, *, table: spellings.Table = (),
    left_over: list[str] | None = None, advice: str = "",
) -> None:
    """Raises ConversionError unless tensors are exactly those of the card's model.

    Args:
      advice: to take the encoder alone, where that is possible.
    """
    expected = _expected(tensors, card, path)
    reason = f"{path} is cut, or holds more than a {card.encoder.title}{advice}"
    try:
        names.check_match(
            tensors, {name: leaf.shape for name, leaf in expected.items()},
            table=table, left_over=left_over or (), reason=reason,
        )
    except ConversionError as error:
        said = f"{path}: {error}"
        if advice:
            raise Untold(said, flags="--parts=encoder") from error
        raise ConversionError(said) from error


def _expected(
    tensors: Tensors, card: Card, path: AnyPath
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the variables of the card's model, which is not larger than the file.

    A card may be anybody's: what it says is found out within the time and memory that
    a model takes of which the file has the tensors.
    """
    most = sum(tensor.size for tensor in tensors.values())
    with names.reading(f"{path}: its card is none of a model"):
        depths = [
            part["depth"] for part in card.model.values()
            if isinstance(part, dict) and "depth" in part
        ]
        larger = {
            "blocks": max([card.encoder.depth, *depths]) > len(tensors),
            "patches": math.prod(card.encoder.grid) > most,
            "channels": max(card.channels, card.encoder.dim) > most,
        }
        if any(larger.values()):
            what = " and ".join(name for name in larger if larger[name])
            raise ConversionError(
                f"{path}: its card has more {what} than the file has tensors for; it "
                "is cut, or its card was changed by hand."
            )
        return names.without_collections(structure.abstract_variables(card))
