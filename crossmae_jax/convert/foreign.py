"""Opens weights of other libraries: their tensors under our names, and a card for them.

What their names and shapes tell becomes the card, with what lies beside them and what
the caller says: `structure`. What our models have in another form is `folding`'s.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from crossmae_jax.convert import (
    cards,
    contents,
    folding,
    hints,
    names,
    of_swin,
    opened,
    spellings,
    structure,
)
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.files.tensor import Tensor, Tensors
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.convert.opened import EMBEDDED, Weights

_POOLER = ("pooler.dense.weight", "pooler.dense.bias")  # behind a ViTModel's encoder
# transformers 5 writes the blocks of ViTMAE's decoder under this name; it reads both.
_SPELLINGS = {"decoder.decoder_encoder.layer.": "decoder.decoder_layers."}
_TABLES = {
    "mae": (spellings.MAE,),
    "timm": (spellings.TIMM,),
    "huggingface": (
        spellings.HUGGINGFACE_MAE, spellings.HUGGINGFACE_VIT,
        spellings.HUGGINGFACE_CLASSIFIER,
    ),
    "simmim": (spellings.SIMMIM, spellings.SIMMIM_CLASSIFIER),
}
# Without use: of a batch norm, and numbers of rows that follow from the grid.
_UNUSED = ("head.0.num_batches_tracked", *of_swin.BUFFERS)
# Parts of models that change every token, by the words in their names.
_UNHELD = {
    "reg_token": "register tokens", "register_tokens": "register tokens",
    "dist_token": "a distillation token", "distillation_token": "a distillation token",
    "norm_pre": "a norm before its blocks",
}
# How names begin that are of nothing in the encoder.
_AFTER = (
    "head", "fc", "attn_pool", "pooler", "classifier", "decoder", "mask_token",
    "projector", "predictor", "projection", "dec_norms", "wfm",
)


class Source(NamedTuple):
    """A file or folder of another library, with its tensors and what it tells."""

    path: Path
    format: str
    contents: contents.Contents
    facts: Facts


def find(
    path: Path, format: str, *, under: str | None, evidence: list[str]
) -> Source:
    """Finds its tensors, and what lies beside them."""
    config: dict[str, Any] = {}
    if path.is_dir() and (path / "config.json").is_file():
        config = hints.read_json(path / "config.json")
    held = contents.read(path, under=under)
    evidence += held.evidence
    with names.reading(f"The settings of {path} cannot be read"):
        if format == "huggingface":
            facts = hints.of_huggingface(path, config, evidence)
        elif format == "timm":
            facts = hints.of_timm(config, evidence)
        elif format == "simmim":
            facts = Facts(normalize=False)  # its target is never standardised
        else:
            facts = hints.of_mae(held.rest, evidence)
    if format == "huggingface":
        held = held._replace(tensors=_respelt(held.tensors, evidence))
    return Source(path, format, held, facts)


def open_source(
    source: Source, parts: str, given: Facts, fallback: Facts, evidence: list[str]
) -> Weights:
    """Opens it, under our names and with the card of its model.

    Args:
      parts, given, fallback: see `opening.open_weights`; `given` are its facts.
      evidence: gets what is concluded.
    """
    path, format, rest = source.path, source.format, source.contents.rest
    tensors, changed = source.contents.tensors, list(source.contents.changed)
    if beside := sorted(map(str, rest.keys() - {"under", EMBEDDED})):
        evidence.append(f"beside the tensors, not used as weights: {', '.join(beside)}")
    _check_held(tensors, path)
    # ViTMAEForPreTraining has a prefix that an encoder by itself lacks.
    table = min(
        of_swin.tables(tensors) or _TABLES[format],
        key=lambda table: len(spellings.to_ours(table, tensors)[1]),
    )
    ours, left_over = spellings.to_ours((*table, *spellings.FOLDED), tensors)
    left_over = [name for name in left_over if not name.endswith(_UNUSED)]
    patch_name = spellings.their_names(table, "encoder/patch_embed/proj/kernel")[0]
    if patch_name not in tensors or len(tensors[patch_name].shape) != 4:
        raise ConversionError(
            f"{path} is not of the format {format}: it has no {patch_name} of 4 axes."
        )
    patch = tensors[patch_name].shape
    if isinstance(rest.get(EMBEDDED), str):  # we wrote it
        card = _embedded(source, ours, given, fallback, evidence)
    else:
        positions = "encoder/pos_embed"
        if names.attends_across(ours) and positions in ours:
            ours[positions] = names.zero_class_row(ours[positions])
            evidence.append(
                "positions: zeros for the class token, whatever its row holds; "
                "CrossMAE's scripts never add it"
            )
        facts = hints.usable(source.facts, given, fallback, where=str(path))
        facts = _with_usable_names(facts, given, ours, changed).with_given(given)
        assumed: dict[str, str] = {}
        facts = _with_imagenet(facts, format, patch[1], assumed)
        if parts == "encoder" and (left_over or "decoder/mask_token" not in ours):
            ours, left_over = _encoder_alone(ours, left_over, evidence)
        ours = folding.on_reading(
            ours, patch_size=patch[2], evidence=changed,
            image_size=facts.image_size, wanted=fallback.image_size,
        )
        card = structure.infer(
            ours, patch, facts, fallback=fallback, origin=f"{path.name} ({format})",
            recipe=hints.recipe(rest), evidence=evidence, assumed=assumed,
        )
    advice = "; to take the encoder alone: parts='encoder', or --parts=encoder"
    opened.check(
        ours, card, path, table=(*table, *spellings.FOLDED), left_over=left_over,
        advice=advice if any(map(comes_after, left_over)) else "",
    )
    return Weights(
        card, ours, format, (*evidence, *changed), source.contents.place, tuple(changed)
    )


def _embedded(
    source: Source, ours: dict[str, Tensor], given: Facts, fallback: Facts,
    evidence: list[str],
) -> Card:
    """Returns the card in a file of another format that we wrote."""
    path = source.path
    if extras := [k for k, v in dataclasses.asdict(given).items() if v is not None]:
        raise ConversionError(f"{path} has a card; leave out {', '.join(extras)}.")
    card = cards.from_json(source.contents.rest[EMBEDDED])
    card = hints.usable(card, fallback, where=f"The card in {path}")
    evidence.append("model: from the card in the file")
    normed = card.kind == "classifier" or card.fusion.final_norm
    if not normed and "encoder/norm/scale" in ours:
        del ours["encoder/norm/scale"], ours["encoder/norm/bias"]
        evidence.append("left out: the norm that the export added (fresh_norm)")
    return card


def _with_imagenet(
    facts: Facts, format: str, channels: int, assumed: dict[str, str]
) -> Facts:
    """Adds what the reference's code always normalises with."""
    code = {"mae": "MAE", "simmim": "SimMIM"}.get(format)
    if not code or channels != 3 or (facts.mean, facts.std) != (None, None):
        return facts
    for name, values in zip(("mean", "std"), hints.IMAGENET, strict=True):
        assumed[name] = (
            f"{name} {' '.join(map(str, values))}, ImageNet's, as {code}'s code has; "
            f"give {name} if not"
        )
    mean, std = hints.IMAGENET
    return dataclasses.replace(facts, mean=mean, std=std)


def _with_usable_names(
    facts: Facts, given: Facts, ours: Tensors, changed: list[str]
) -> Facts:
    """Drops names of classes that are too many or too few, and says so.

    Raises:
      ConversionError: if it is those that the caller gives.
    """
    number = ours["head/bias"].shape[0] if "head/bias" in ours else None
    if wrong := hints.check_classes(given.classes, number):
        raise ConversionError(f"classes: {wrong}; give one for each, or none.")
    if wrong := hints.check_classes(facts.classes, number):
        changed.append(f"left out: names of the classes; {wrong}")
        return dataclasses.replace(facts, classes=None)
    return facts


def _check_held(tensors: Tensors, path: Path) -> None:
    """Raises ConversionError for what changes every token, and we have not."""
    for part, title in _UNHELD.items():
        held_not = [name for name in tensors if part in name.split(".")]
        if held_not:
            raise ConversionError(
                f"{path} has {title} ({', '.join(held_not)}), on which every block "
                "depends, and our ViT has none: what this model computes cannot be "
                "held, nor can its encoder by itself. To start training from the rest, "
                "whose features are others, save the file without that."
            )


def _encoder_alone(
    ours: dict[str, Tensor], left_over: list[str], evidence: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Leaves out what comes after the encoder, and says what."""
    encoder = {
        name: value for name, value in ours.items() if name.startswith("encoder/")
    }
    kept = [name for name in left_over if not comes_after(name)]
    left_out = {
        name.partition("/")[0] for name in ours.keys() - encoder.keys()
    } | {
        name if "embeddings" in name else name.partition(".")[0]
        for name in left_over if name not in kept
    }
    if left_out:
        evidence.append(f"left out, as asked: {', '.join(sorted(left_out))}")
    return encoder, kept


def comes_after(name: str) -> bool:
    """Returns whether a tensor is of what comes after encoders, by its own name."""
    return name.startswith(_AFTER) or name.endswith("embeddings.mask_token")


def _respelt(tensors: Tensors, evidence: list[str]) -> dict[str, Tensor]:
    """Returns tensors of transformers under the usual names, without the pooler."""
    respelt = {}
    for name, value in tensors.items():
        if name in _POOLER:
            evidence.append(f"left out: {name}, which comes after the encoder")
            continue
        for spelling, usual in _SPELLINGS.items():
            name = name.replace(spelling, usual)
        respelt[name] = value
    return respelt
