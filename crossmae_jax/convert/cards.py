"""The card that goes with weights: what they are, and how images must come.

A file of PyTorch weights holds numbers and names. Which size of heads the numbers stand
for, how images were normalised, whether targets were standardised: that is lost, and
guessed by the next reader. Our files carry it in a card, as JSON.
"""

import dataclasses
import functools
import json
import math
from typing import Any

from ml_collections import ConfigDict

import crossmae_jax
from crossmae_jax import kinds
from crossmae_jax.convert.names import reading
from crossmae_jax.models import aggregator, classifier, encoders, fusion, mim
from crossmae_jax.runs import records, settings

KINDS = ("pretrain", "encoder", "classifier")
_MOST_BLOCKS = 10_000
_PARTS = ("encoder", "fusion", "decoder", "aggregator")


@dataclasses.dataclass(frozen=True)
class Card:
    """What weights are; None stands for what is not known.

    Attributes:
      kind: "pretrain" for an encoder with its decoder, "encoder" for one without,
        "classifier" for one with a pooling and a head.
      model: its settings, as in `config.model`; for an encoder without those of the
        decoder, for a classifier with `pool` and `num_classes`.
      image_size: height and width in pixels.
      mean: per channel, for pixels in 0..1; likewise `std`.
      normalize: whether targets are standardised patches.
      masking: as in `config.masking`.
      recipe: how they were trained, as far as known.
      step: after how many steps.
      origin: which run or file they come from.
      classes: of a classifier, what its logits stand for.
      target: as in `config.target`; without it, pixels with `normalize`.
      assumed: what no file told, but is usual: a line by the name in `hints.Facts`.
        What it is wanted for may say otherwise.
      library: version that wrote the card.
    """

    kind: str
    model: dict[str, Any]
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalize: bool | None
    masking: dict[str, Any] | None
    recipe: dict[str, Any]
    step: int | None
    origin: str
    classes: tuple[str, ...] | None = None
    target: dict[str, Any] | None = None
    assumed: dict[str, str] = dataclasses.field(default_factory=dict)
    library: str = f"crossmae_jax {crossmae_jax.__version__}"

    @functools.cached_property
    def encoder(self) -> encoders.Encoder:
        """The encoder that the weights are for, or are a part of."""
        return kinds.make(
            "model.encoder", encoders.ENCODERS, self.model["encoder"],
            image_size=self.image_size, channels=self.channels,
        )

    @functools.cached_property
    def fusion(self) -> fusion.Fusion:
        """What a decoder sees of the encoder; of a classifier there is none."""
        return kinds.make(
            "model.fusion", fusion.FUSIONS, self.model["fusion"],
            encoder_depth=self.encoder.depth, num_contexts=1,
        )

    @property
    def parts(self) -> list[str]:
        """Names the parts of the model that the weights are for."""
        if self.kind == "encoder":
            return ["encoder"]
        if self.kind == "classifier":
            normed = classifier.ends_in_norm(self.model["pool"])
            pooled = [] if normed else ["fc_norm"]
            return ["encoder", *pooled, *["head"] * (self.model["num_classes"] > 0)]
        aggregates = kinds.choose(
            "model.aggregator", aggregator.AGGREGATORS, self.model["aggregator"]
        ) is not None
        return [
            "encoder", *["fusion"] * self.fusion.mixes, "decoder",
            *["aggregator"] * aggregates,
        ]

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels."""
        return self.encoder.patch_size

    def to_json(self) -> str:
        """Returns the card as JSON, with what follows from it for other readers."""
        values = dataclasses.asdict(self)
        return json.dumps({"parts": self.parts, "patch_size": self.patch_size} | values)

    def encoder_only(self) -> "Card":
        """Returns the card of the encoder by itself."""
        lineage = self.model.get("fusion")
        pool = self.model.get("pool")
        normed = pool is not None and classifier.ends_in_norm(pool)
        if lineage is not None:
            normed = mim.ends_in_norm(self.model)
        if lineage is None or normed != self.fusion.final_norm:
            # One without a norm is as CrossMAE's.
            lineage = {"kind": "last" if normed else "inter_block"}
        return dataclasses.replace(
            self, kind="encoder", classes=None, target=None,
            model={"encoder": self.model["encoder"], "fusion": lineage},
            assumed={
                name: line for name, line in self.assumed.items()
                if name in ("num_heads", "image_size", "mean", "std")
            },
        )

    def grid_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Returns the grid of the position tables, to be resized to this one.

        That one itself, if only the number of patches is known and it has as many.
        """
        own = self.encoder.grid
        if "image_size" in self.assumed and math.prod(grid) == math.prod(own):
            return grid
        return own

    def lines(self) -> list[str]:
        """Describes the card for people, a fact per line."""
        height, width = self.image_size

        def known(value):
            return "not known" if value is None else value

        ratios = None if self.masking is None else ", ".join(
            f"{name} {value}" for name, value in self.masking.items()
        )
        target = None if self.normalize is None else (
            "standardised patches" if self.normalize else "pixels"
        )
        if self.target is not None and (
            self.target["kind"] != "pixels" or self.target.get("cells")
        ):
            target = _listed(self.target)
        rest = {  # what belongs to no part
            name: value for name, value in self.model.items()
            if name not in ("dtype", *_PARTS)
        }
        recipe = ", ".join(f"{k} {_flat(v)}" for k, v in self.recipe.items())
        return [
            f"{self.kind}: {', '.join(self.parts)}",
            *(
                f"{part:10} {_listed(self.model[part])}"
                for part in _PARTS if part in self.model
            ),
            *[f"head       {_listed(rest)}"] * bool(rest),
            *[f"classes    {_some(self.classes or ())}"] * bool(self.classes),
            f"images     {height} x {width} px, {self.channels} channels, patches of "
            f"{self.patch_size}",
            f"mean, std  {known(_flat(self.mean))}, {known(_flat(self.std))}",
            f"target     {known(target)}",
            f"masking    {known(ratios)}",
            f"recipe     {recipe or 'not known'}",
            f"step       {known(self.step)}",
            f"origin     {self.origin}",
            *(f"assumed    {line}" for line in self.assumed.values()),
            f"card       by {self.library}",
        ]


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_flat(value)}" for name, value in options.items())


def _some(names: tuple[str, ...]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return "/".join(str(_flat(v)) for v in value.values())
    if isinstance(value, (list, tuple)):
        return "(" + " ".join(str(_flat(v)) for v in value) + ")"
    return value


def from_json(text: str) -> Card:
    """Returns the card that `to_json` wrote.

    Raises:
      ConversionError: if the text is not that of a card.
    """
    fields = dataclasses.fields(Card)
    with reading("A card cannot be read"):
        # What old cards do not have.
        values = {"classes": None, "target": None, "assumed": {}}
        values |= records.parse(text)
        values = {field.name: values[field.name] for field in fields}
        values["model"] = _model(values["model"])
        for name in ("image_size", "mean", "std", "classes"):
            if values[name] is not None:
                values[name] = tuple(values[name])
        card = Card(**values)
        if card.kind not in KINDS:
            raise ValueError(f"kind is {card.kind!r}")
        if card.encoder.depth > _MOST_BLOCKS:  # of which lists would be made
            raise ValueError(f"{card.encoder.depth} blocks")
        _ = card.parts, card.patch_size, card.lines()
    return card


def _model(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a model, read from JSON, as configs write them."""
    return settings.as_written(settings.grouped({"model": stored})[0]["model"])


def of_run(
    config: ConfigDict, *, step: int, origin: str,
    classes: tuple[str, ...] | None = None,
) -> Card:
    """Returns the card of a run's weights.

    Args:
      classes: of its labels, if they are known.
    """
    stored = json.loads(config.to_json())
    data, optim = stored["data"], stored.get("optim", {})
    stored["model"].pop("remat", None)  # says how gradients are computed, no more
    recipe = {
        "data": data.get("name") or data.get("source"),
        "epochs": stored.get("epochs"), "batch_size": data.get("batch_size"),
        "optimizer": optim.pop("name", None), **optim,
    }
    if stored.get("objective", "pretrain") == "classify":
        model = {
            name: stored["model"][name] for name in ("encoder", "pool", "head_norm")
        }
        model["num_classes"] = data["num_classes"]
        kind, normalize, masking, target = "classifier", None, None, None
    else:
        classes, target = None, stored["target"]
        kind, model = "pretrain", stored["model"]
        normalize, masking = target.get("normalize"), stored["masking"]
    return Card(
        kind=kind, model=_model(model), image_size=tuple(data["image_size"]),
        channels=data["channels"], mean=tuple(data["mean"]), std=tuple(data["std"]),
        normalize=normalize, masking=masking,
        recipe={name: value for name, value in recipe.items() if value is not None},
        step=step, origin=origin, classes=classes,
        target=target,
    )
