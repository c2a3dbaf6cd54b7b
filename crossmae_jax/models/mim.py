"""The masked image model: encoder, fusion, decoder, and for PR-MIM an aggregator.

    visible patches -> encoder -> fusion -> decoder ------------> head -> targets
                                               `-> aggregator ---^

MAE is fusion "last" with decoder "mae", MFF "multi_level" with "mae"; CrossMAE is
"inter_block" with "cross"; "last" with "cross" is its ablation with the encoder's last
map only. LocalMIM is "taps" with "local", TEC "adapter" with "tec". SimMIM is "last"
with "linear", and masked patches as tokens of the encoder.
PR-MIM is any of them with an aggregator, which predicts the patches that were thrown
from the decoder, or from SimMIM's encoder.
"""

from collections.abc import Mapping

from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from crossmae_jax import kinds, masking, targets
from crossmae_jax.masking import Asked
from crossmae_jax.models import aggregator, decoders, encoders, fusion, parts
from crossmae_jax.models.fusion import FUSIONS
from crossmae_jax.tokens import Encoded, Tokens

_OF_A_TARGET = "aggregator_"  # before its name, where there are several


class MaskedImageModel(nn.Module):
    """Predicts patches from the visible ones.

    Attributes:
      aggregators: one for each target, by its name; without them thrown patches are
        left out.

    Raises:
      ValueError: for parts that do not fit each other.
    """

    encoder: encoders.Encoder
    fusion: fusion.Fusion
    decoder: decoders.Decoder
    aggregators: Mapping[str, aggregator.Aggregator]

    preserve_adopted_names = True  # the only aggregator's parameters have no target's

    def __post_init__(self):
        if self.decoder.reads_masked != self.encoder.mask_tokens:
            mask_tokens = self.decoder.reads_masked
            raise ValueError(
                f"{self.decoder.method}'s decoder takes masked patches "
                + ("from the encoder, which has none" if mask_tokens else
                   "as tokens of its own, but the encoder has them, too")
                + f"; set config.model.encoder.mask_tokens={mask_tokens}, or another "
                "config.model.decoder.kind."
            )
        if self.encoder.windows and self.fusion.mixes:
            raise ValueError(
                "The outputs of this encoder's blocks lie on several grids and have "
                "several widths, so that no fusion brings them together; set "
                "config.model.fusion.kind='last'."
            )
        if self.fusion.num_contexts not in (1, self.decoder.num_contexts):
            several = self.decoder.num_contexts
            raise ValueError(
                f"{self.decoder.method}'s decoder takes one context for all of its "
                f"blocks{f', or {several}' if several > 1 else ''}, but the fusion "
                f"makes {self.fusion.num_contexts}; set config.model.fusion.kind='last'"
                " or another config.model.decoder.kind."
            )
        if self.encoder.mask_tokens and any(
            each.visible == "encoder" for each in self.aggregators.values()
        ):
            raise ValueError(
                "aggregator.visible='encoder' with masked patches in the encoder would "
                "see these twice; set config.model.aggregator.visible='decoder'."
            )
        if not self.decoder.gives_visible and any(
            each.visible == "decoder" for each in self.aggregators.values()
        ):
            raise ValueError(
                "aggregator.visible='decoder' needs a decoder with outputs at visible "
                f"places, which that of {self.decoder.method} has not; set "
                "config.model.aggregator.visible='encoder' or 'zeros'."
            )
        super().__post_init__()

    def __call__(
        self,
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds,
        asked: Asked = FrozenDict(),
    ) -> dict[str, Tokens]:
        """Returns what is predicted, by the targets' names; see `Decoder.head`.

        Args:
          asked: places at which targets are asked for, masked or not.

        Raises:
          ValueError: if the decoder predicts masked patches only and is asked for some.
        """
        if asked and self.decoder.needs_masked:
            raise ValueError(
                f"The target asks for {', '.join(asked)} at places that may be visible,"
                f" but {self.decoder.method}'s decoder predicts masked patches only; "
                "set config.model.decoder.kind='cross', or 'tec' for a teacher's."
            )
        contexts = self.fusion(self.encoder(images, ids))
        decoded = self.decoder(contexts, ids, asked)
        return self.complete(decoded, ids, asked, contexts[-1])

    def complete(
        self,
        decoded: dict[str, Tokens],
        ids: masking.TokenIds,
        asked: Asked,
        context: Tokens | None,
    ) -> dict[str, Tokens]:
        """Turns decoder tokens, and with an aggregator their neighbours, into targets.

        Args:
          context: what the decoder's last block attends to; of use to an aggregator
            that takes its visible neighbours from the encoder.
        """
        predicted = {}
        for name, tokens in decoded.items():
            # A decoder of visible places, too, has tokens of places not asked for.
            whole = name not in asked or self.decoder.gives_visible
            if name in self.aggregators and whole:
                tokens = self.aggregators[name](tokens, ids, context)
            predicted[name] = self.decoder.head(name, tokens, ids, asked)
        return predicted

    def encode(
        self,
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds | None = None,
    ) -> Encoded:
        """Encodes the visible patches; all of them if not given."""
        return self.encoder(images, ids)


def build(config: ConfigDict) -> MaskedImageModel:
    """Makes the model that `config.model` and `config.data` describe.

    Raises:
      ValueError: for an unknown choice, or choices that do not fit each other.
    """
    parts.check_settings(
        config, ("encoder", "fusion", "decoder", "aggregator", "remat", "dtype")
    )
    model, computing = config.model, parts.computing(config.model)
    encoder = encoders.build_encoder(config, final_norm=ends_in_norm(model))
    target = targets.make(config, patch_size=encoder.patch_size)
    decoder = kinds.make(
        "model.decoder", decoders.DECODERS, model.decoder, grid=encoder.grid,
        widths=target.widths, grids=target.grids,
        encoder_dim=encoder.dim, encoder_heads=encoder.num_heads,
        encoder_mlp_ratio=encoder.mlp_ratio, **computing,
    )
    _check_grids(decoder, target, encoder.grid)
    aggregators = {}
    made = kinds.make(
        "model.aggregator", aggregator.AGGREGATORS, model.aggregator, dim=decoder.dim,
        grid=encoder.grid, num_heads=decoder.num_heads, mlp_ratio=decoder.mlp_ratio,
        **computing,
    )
    if made is not None:
        several = len(decoder.widths) > 1
        aggregators = {
            name: made.clone(name=f"{_OF_A_TARGET}{name}" if several else "aggregator")
            for name in decoder.widths
        }
    return MaskedImageModel(
        encoder=encoder,
        fusion=build_fusion(config, encoder, num_contexts=decoder.depth),
        decoder=decoder, aggregators=aggregators,
    )


def _check_grids(
    decoder: decoders.Decoder, target: targets.Target, grid: tuple[int, int]
) -> None:
    """Refuses cells that are no patches, unless the decoder was told of them."""
    if hasattr(decoder, "grids"):
        return
    for name, (rows, columns) in target.grids.items():
        if (rows, columns) != grid:
            raise ValueError(
                f"{name} has {rows}x{columns} cells, but {decoder.method}'s decoder "
                f"predicts one vector for each of {grid[0]}x{grid[1]} patches; set "
                "config.model.decoder.kind='local', or config.target.cells to a patch."
            )


def build_fusion(
    config: ConfigDict, encoder: encoders.Encoder, *, num_contexts: int
) -> fusion.Fusion:
    """Makes the fusion that `config.model` describes, for an encoder."""
    return kinds.make(
        "model.fusion", FUSIONS, config.model.fusion, encoder_depth=encoder.depth,
        num_contexts=num_contexts, **parts.computing(config.model),
    )


def part_of(module: str) -> str:
    """Returns to which part of a model a module at its top belongs."""
    return "aggregator" if module.startswith(_OF_A_TARGET) else module


def of_another_kind(one: MaskedImageModel, other: MaskedImageModel) -> set[str]:
    """Returns which parts between encoder and targets are not of one kind in both.

    A fusion goes with the decoder that it was trained for.
    """
    decoders_of = [(type(m.decoder), m.decoder.self_attention) for m in (one, other)]
    if decoders_of[0] != decoders_of[1]:
        return {"fusion", "decoder"}
    return {"fusion"} if type(one.fusion) is not type(other.fusion) else set()


def ends_in_norm(model: kinds.Group) -> bool:
    """Returns whether the encoder of `config.model` ends in a norm.

    Raises:
      ValueError: for an unknown kind of fusion, which decides over it.
    """
    wanted = kinds.choose("model.fusion", FUSIONS, model["fusion"]).final_norm
    # A decoder may have it instead; of an encoder by itself there is none to ask.
    return wanted and not model.get("decoder", {}).get("norm", False)


def method(*, fusion: str, decoder: str, aggregator: str) -> str:
    """Returns what people call the method with parts of these kinds."""
    name = FUSIONS[fusion].method or decoders.DECODERS[decoder].method
    return name if aggregator == "none" else f"PR-MIM on {name}"
