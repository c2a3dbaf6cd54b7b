"""Starts training from weights: `config.init_from`.

What is loaded is decided by part, and a part is loaded whole or not at all:

    encoder, its norm, fusion, decoder, aggregator, fc_norm, batch_norm, head

A part that both sides have must agree in every name and shape, and in what shapes do
not show: heads, the maps that are mixed. A part of another kind (MAE's decoder for
CrossMAE's, MFF's fusion for inter-block attention) is left unused, and the model's own
stays new. The aggregators of several targets are one part. Tables of positions and of
relative biases are resized to the model's grid, a bias that all blocks shared is copied
where each has its own, and a mask token of the encoder is left out where it would have
none. Anything else is an error.
"""

import collections
import dataclasses
import functools
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from crossmae_jax.convert import channels as channels_of
from crossmae_jax.convert import folding, names, opening, resizing, structure
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.files.tensor import Tensor
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.models import encoders, mim
from crossmae_jax.origins import Origin
from crossmae_jax.runs import workdir

PARTS = (
    "encoder", "the encoder's norm", "fusion", "decoder", "aggregator", "fc_norm",
    "batch_norm", "head", "hog",
)


@dataclasses.dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
      path: where the weights lie.
      collections: of the variables, those that it is for.
      tensors: what is loaded, under our names and in the model's shapes.
      new: the parts that stay as they were drawn.
      report: what becomes of every part, a line each.
      classes: what the logits of a head that is loaded stand for, if that is known.
    """

    path: str
    collections: frozenset[str]
    tensors: dict[str, Tensor]
    new: frozenset[str]
    report: list[str]
    classes: tuple[str, ...] | None = None

    def apply(self, variables: Any) -> Any:
        """Returns the variables with what is loaded in its places, and there on the
        devices where they lay.

        Raises:
          ConversionError: if a tensor that is loaded has a value that is not finite.
        """
        flat = traverse_util.flatten_dict(variables, sep="/")
        for path, leaf in flat.items():
            collection, _, name = path.partition("/")
            loaded = self.tensors.get(name)
            if loaded is not None and collection in self.collections:
                values = loaded.read().astype(leaf.dtype)
                self._check_finite(name, values)
                flat[path] = jax.make_array_from_callback(
                    leaf.shape, leaf.sharding,
                    lambda index, values=values: values[index],
                )
        return traverse_util.unflatten_dict(flat, sep="/")

    def _check_finite(self, name: str, values: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            raise ConversionError(
                f"{self.path}: {finite.size - np.count_nonzero(finite)} of "
                f"{finite.size} values of {name} are no finite numbers, so nothing can "
                "be learnt from these weights; give others, such as those of an "
                "earlier step."
            )


def plan_all(
    starts: Mapping[str, str | Origin], abstract_variables: Any, config: ConfigDict, *,
    classes: tuple[str, ...] | None = None,
) -> list[Start]:
    """Decides what becomes of an objective's `starts`; see `plan`.

    With "params" go the collections that have no weights of their own.

    Raises:
      ConversionError: also if weights that must be there are not named.
    """
    unnamed = abstract_variables.keys() - starts.keys()
    plans = []
    for collection, path in starts.items():
        own = {collection} | (unnamed if collection == "params" else set())
        own = {name: abstract_variables[name] for name in sorted(own)}
        if isinstance(path, Origin):
            plans.append(_plan_of_its_own(path, own, config))
        elif path:
            plans.append(plan(path, own, config, classes=classes))
    return plans


def _plan_of_its_own(
    origin: Origin, abstract_variables: Any, config: ConfigDict
) -> Start:
    """Decides what becomes of weights that are an encoder's beside the model."""
    setting = f"config.{origin.setting}"
    if not origin.path:
        raise ConversionError(
            f"{setting} is not set, and without these weights nothing can be learnt "
            f"from; give a run or a file of a ViT: --{setting}=PATH, and in "
            f"config.{origin.encoder_setting} which one it is."
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model = {
            "encoder": dict(origin.encoder), "remat": "none", "dtype": "float32"
        }
    try:
        start = plan(origin.path, abstract_variables, config, parts="encoder")
        first, *others = start.report
        return dataclasses.replace(
            start, report=[f"{origin.setting}: {first}", *others]
        )
    except ConversionError as error:
        raise ConversionError(
            f"{setting}={origin.path}: {error}\nThe model of these weights is what "
            f"config.{origin.encoder_setting} says, in place of config.model.encoder."
        ) from error


def plan(
    path: str, abstract_variables: Any, config: ConfigDict, *,
    classes: tuple[str, ...] | None = None, parts: str = "all",
) -> Start:
    """Decides what becomes of weights in a model; reads descriptions only.

    Args:
      path: weights of any format.
      abstract_variables: shapes of the model's variables.
      config: of the model; `config.init_channels` says how to adapt the patch
        projection to another number of channels, "" forbids it.
      classes: of the data, where they are known; a head for others is not loaded.
      parts: "all", or "encoder" to leave out what comes after it.

    Raises:
      ConversionError: if a part that both sides have does not fit.
    """
    try:
        weights = opening.open_weights(
            path, fallback=_fallback(config, parts), parts=parts
        )
    except names.Untold as error:
        raise ConversionError(
            f"{error}\nTell that to an import, and start from NEW, which it makes: "
            f"python -m crossmae_jax convert import {shlex.quote(str(path))} "
            f"{error.flags} {structure.flags_of_heads(config)} --to=NEW"
        ) from error
    card = weights.card
    ours = names.without_collections(abstract_variables)
    theirs = dict(weights.tensors)
    parts = {_part(name) for name in ours} & {_part(name) for name in theirs}
    parts -= _of_another_kind(card, config)
    if classes and card.classes and card.classes != classes:
        parts.discard("head")
    _check_hidden(card, config, parts)
    changed = _adapt(theirs, card, config, path) + _fit_encoder(theirs, card, config)
    names.check_match(
        {name: value for name, value in theirs.items() if _part(name) in parts},
        {name: leaf.shape for name, leaf in ours.items() if _part(name) in parts},
        reason=_reason(card, config),
    )
    loaded = {name: theirs[name] for name in ours if _part(name) in parts}
    new = [name for name in ours if name not in loaded]
    report = [
        f"weights from {path}: {card.origin}"
        + ("" if card.step is None else f", step {card.step}"),
        _line("loaded", loaded),
        _line("new", new, "drawn at random"),
        _line("unused", [name for name in theirs if name not in loaded]),
        f"  adapted  {'; '.join(changed) or 'nothing'}",
        *(f"  assumed  {line}" for line in _assumed(card, config, parts)),
        *(f"  note     {line}" for line in weights.changed),
        *(f"  note     {line}" for line in _notes(card, config, parts, classes)),
    ]
    return Start(
        path, frozenset(abstract_variables), loaded, frozenset(map(_part, new)), report,
        classes=card.classes if "head" in parts else None,
    )


def _notes(
    card: Card, config: ConfigDict, parts: set[str], classes: tuple[str, ...] | None
) -> Iterator[str]:
    """Yields in what the weights differ from what they are going to be used for."""
    for name in ("mean", "std"):
        theirs, ours = getattr(card, name), tuple(config.data[name])
        if theirs is not None and card.channels == len(ours) and (
            not np.allclose(theirs, ours, atol=1e-3)
        ):
            yield (
                f"the weights are of images with {name}={tuple(theirs)}; "
                f"config.data.{name}={ours}"
            )
    normalize = config.get("target", {}).get("normalize")
    if "decoder" in parts and None not in (card.normalize, normalize) and (
        card.normalize != normalize
    ):
        yield f"the decoder was trained with target.normalize={card.normalize}"
    if not classes:
        return
    if card.classes and card.classes != classes:
        yield (
            f"the head is for other classes, {', '.join(card.classes[:3])}, ...; the "
            f"data has {', '.join(classes[:3])}, ..."
        )
    if "head" in parts and not card.classes:
        yield (
            "the names of the head's classes are not known; taken to be the data's, in "
            f"their order: {', '.join(classes[:3])}, ..."
        )


def _assumed(card: Card, config: ConfigDict, parts: set[str]) -> list[str]:
    """Says what no file told; of it the model has its own, where it can differ."""
    encoder, lines = encoders.build_encoder(config), []
    if "image_size" in card.assumed:
        rows, columns = card.grid_for(encoder.grid)
        lines.append(f"a grid of {rows} x {columns} patches")
    if "num_heads" in card.assumed:
        lines.append(f"{encoder.num_heads} heads of the encoder, as the model has")
    if "decoder_heads" in card.assumed and "decoder" in parts:
        lines.append(
            f"{config.model.decoder.num_heads} heads of the decoder, as the model has"
        )
    if "head" in parts:
        lines += filter(None, [card.assumed.get("pool")])
    if known := [name for name in ("mean", "std") if name in card.assumed]:
        lines.append(f"ImageNet's {' and '.join(known)}, as its authors' code has")
    return [f"{line}; the file does not tell" for line in lines]


def _part(name: str) -> str:
    first, second = (name + "/").split("/")[:2]
    if (first, second) == ("encoder", "norm"):
        return "the encoder's norm"
    return mim.part_of(first)


def _line(title: str, tensors: Any, remark: str = "") -> str:
    counts = collections.Counter(map(_part, tensors))
    parts = ", ".join(
        f"{part} ({counts[part]} tensors)" for part in PARTS if part in counts
    )
    return f"  {title:8} {parts or 'nothing'}" + (
        f"; {remark}" if counts and remark else ""
    )


def _fallback(config: ConfigDict, parts: str) -> Facts:
    """Returns what the model can add to a file that does not tell all of itself."""
    heads = config.model.get("decoder", {}).get("num_heads")
    return Facts(
        num_heads=encoders.build_encoder(config).num_heads,
        # Of a decoder that is left out any number will do.
        decoder_heads=1 if parts == "encoder" else heads,
        image_size=tuple(config.data.image_size),
        mean=tuple(config.data.mean), std=tuple(config.data.std),
    )


def _of_another_kind(card: Card, config: ConfigDict) -> set[str]:
    """Returns the parts that both sides have, but that are not the same thing."""
    if card.kind != "pretrain" or "decoder" not in config.model:
        return set()
    other = mim.of_another_kind(structure.build(card), mim.build(config))
    if card.model["aggregator"] != config.model.aggregator.to_dict():
        other.add("aggregator")
    return other


def _check_hidden(card: Card, config: ConfigDict, parts: set[str]) -> None:
    """Compares what decides over the numbers, but shows in no shape."""
    theirs, ours = card.encoder, encoders.build_encoder(config)
    pairs = {}
    if "encoder" in parts and "num_heads" not in card.assumed and (
        (theirs.dim, theirs.depth) == (ours.dim, ours.depth)
    ):
        pairs["heads of the encoder"] = (theirs.num_heads, ours.num_heads)
    if "decoder" in parts and "decoder_heads" not in card.assumed:
        decoders = card.model["decoder"], config.model.decoder
        if "dim" in decoders[0] and decoders[0]["dim"] == decoders[1]["dim"]:
            pairs["decoder.num_heads"] = tuple(side["num_heads"] for side in decoders)
    if "fusion" in parts and theirs.depth == ours.depth:
        mixing = mim.build_fusion(config, ours, num_contexts=1)
        pairs["maps that are mixed"] = (card.fusion.used_maps, mixing.used_maps)
    wrong = [
        f"{what}: {a}, the model has {b}" for what, (a, b) in pairs.items() if a != b
    ]
    if wrong:
        raise ConversionError(
            "The weights do not fit the model, though shapes may agree."
            + names.listing("in the file", wrong)
        )


def _adapt(theirs: dict, card: Card, config: ConfigDict, path: str) -> list[str]:
    """Adapts the patch projection to the model's channels, if that was asked for."""
    how, channels = config.init_channels, config.data.channels
    if how and how not in channels_of.ADAPTATIONS:
        raise ConversionError(
            f"Unknown init_channels={how!r}. Known: "
            f"{', '.join(channels_of.ADAPTATIONS)}, or '' for the file's own channels."
        )
    if card.channels == channels:
        return []
    if not how:
        raise ConversionError(
            f"{path} is for {card.channels} channels, the model for {channels}; say "
            "how to adapt the patch projection: --config.init_channels=mean, repeat "
            "or sum (docs/weights.md)."
        )
    name = "encoder/patch_embed/proj/kernel"
    theirs[name] = theirs[name].then(functools.partial(
        channels_of.adapted, num_in=card.channels, num_out=channels, how=how
    ))
    return [f"{card.channels} -> {channels} channels by {how}"]


def _fit_encoder(theirs: dict, card: Card, config: ConfigDict) -> list[str]:
    """Brings what tells places to the model's grid and blocks; drops a mask token.

    That of SimMIM's encoder has no place in one that sees no masked patches. An MLP of
    the class token becomes that token, where the model has none.
    """
    encoder, lines = encoders.build_encoder(config), []
    if not encoder.mask_tokens:
        theirs.pop("encoder/mask_token", None)
    keeps_mlp = getattr(encoder, "cls_token_mlp", False)
    if not keeps_mlp and folding.has_cls_token_mlp(theirs):
        folded = folding.cls_token_mlp(theirs)
        theirs.clear()
        theirs.update(folded)
        lines.append("the class token as its MLP makes it")
    if getattr(encoder, "relative_bias", "none") == "per_block":
        lines += resizing.bias_for_each_block(theirs, depth=card.encoder.depth)
    lines += resizing.windows(theirs, card.encoder.windows, encoder.windows)
    grid = card.grid_for(encoder.grid)
    return lines + resizing.resize(theirs, grid=grid, new_grid=encoder.grid)


def _reason(card: Card, config: ConfigDict) -> str:
    """Says in which settings file and model differ."""
    differences, titles = [], (card.encoder.title, encoders.build_encoder(config).title)
    if titles[0] != titles[1]:
        differences.append(f"file is {titles[0]}, model is {titles[1]}")
    theirs, ours = (
        workdir.flatten(side) for side in (card.model, config.model.to_dict())
    )
    for name in (
        "encoder.mlp_ratio", "decoder.dim", "decoder.depth", "decoder.mlp_ratio"
    ):
        if name in theirs and name in ours and theirs[name] != ours[name]:
            differences.append(f"file has {name}={theirs[name]}, model {ours[name]}")
    sides = (card.encoder, encoders.build_encoder(config))
    for name in ("positions", "relative_bias", "qkv_bias", "layer_scale"):
        a, b = (getattr(side, name, None) for side in sides)
        # Whatever it began with, it is a tensor now.
        if (a is None) != (b is None) if name == "layer_scale" else a != b:
            differences.append(f"file has encoder.{name}={a}, model {b}")
    if card.channels != config.data.channels:
        differences.append(
            f"file is for {card.channels} channels, model for {config.data.channels}"
        )
    advice = (
        "set config.model to the file's, or take the encoder alone: python -m "
        "crossmae_jax convert export FILE --format=safetensors --parts=encoder "
        "--to=NEW.safetensors"
    )
    return f"{'; '.join(differences) or 'unknown'}; {advice}"
