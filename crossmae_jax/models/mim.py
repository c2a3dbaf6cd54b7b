"""The masked image model: encoder, fusion, decoder, and for PR-MIM an aggregator.

    visible patches -> encoder -> fusion -> decoder ------------> head -> patch vectors
                                               `-> aggregator ---^

MAE is fusion "last" with decoder "mae"; CrossMAE is fusion "inter_block" with decoder
"cross"; "last" with "cross" is CrossMAE's ablation with the encoder's last map only.
PR-MIM is either of them with an aggregator, which predicts the patches that were thrown
from the decoder.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from crossmae_jax import masking
from crossmae_jax.models import (
    aggregator,
    decoders,
    encoders,
    fusion,
    layers,
    parts,
    vit,
)


class MaskedImageModel(nn.Module):
    """Predicts patches from the visible ones.

    Attributes:
      aggregator: None leaves thrown patches out.

    Raises:
      ValueError: for parts that do not fit each other.
    """

    encoder: encoders.Encoder
    fusion: fusion.Fusion
    decoder: decoders.Decoder
    aggregator: aggregator.Aggregator | None

    def __post_init__(self):
        if self.decoder.shares_context and self.fusion.num_contexts > 1:
            raise ValueError(
                f"{self.decoder.method}'s decoder takes one context for all of its "
                f"blocks, but the fusion makes {self.fusion.num_contexts}; set "
                "config.model.fusion.kind='last' or config.model.decoder.kind='cross'."
            )
        if self.aggregator is not None and (
            self.aggregator.visible == "decoder" and not self.decoder.gives_visible
        ):
            raise ValueError(
                "aggregator.visible='decoder' needs a decoder with outputs at visible "
                f"places, which that of {self.decoder.method} has not; set "
                "config.model.aggregator.visible='encoder' or 'zeros'."
            )
        super().__post_init__()

    def __call__(
        self, images: Float[Array, "b height width c"], ids: masking.TokenIds
    ) -> Float[Array, "b p t"]:
        """Returns a vector for each of the patches `predicted(ids)`."""
        context = self.fusion(self.encoder(images, ids.keep))
        return self.complete(self.decoder(context, ids), context[-1], ids)

    def complete(
        self,
        decoded: layers.Decoded,
        encoded: Float[Array, "b k e"] | None,
        ids: masking.TokenIds,
    ) -> Float[Array, "b p t"]:
        """Turns decoder tokens, and with an aggregator their neighbours, into patches.

        Args:
          encoded: what the decoder's last block attends to; of use to an aggregator
            that takes its visible neighbours from the encoder.
        """
        tokens = decoded.pred
        if self.aggregator is not None:
            tokens = self.aggregator(decoded, encoded, ids)
        return self.decoder.head(tokens)

    def predicted(self, ids: masking.TokenIds) -> Int[Array, "b p"]:
        """Returns the patches that are predicted, in the order of the predictions."""
        if self.aggregator is None:
            return ids.pred
        return jnp.concatenate([ids.pred, ids.thrown], axis=1)

    def encode(
        self,
        images: Float[Array, "b height width c"],
        ids_keep: Int[Array, "b v"] | None = None,
    ) -> vit.Encoded:
        """Encodes all patches, or those in `ids_keep`."""
        return self.encoder(images, ids_keep)


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
    decoder = parts.make(
        "decoder", decoders.DECODERS, model.decoder, grid=encoder.grid,
        out_dim=encoder.patch_size**2 * config.data.channels, **computing,
    )
    return MaskedImageModel(
        encoder=encoder,
        fusion=build_fusion(config, encoder, num_contexts=decoder.depth),
        decoder=decoder,
        aggregator=parts.make(
            "aggregator", aggregator.AGGREGATORS, model.aggregator, dim=decoder.dim,
            grid=encoder.grid, num_heads=decoder.num_heads,
            mlp_ratio=decoder.mlp_ratio, **computing,
        ),
    )


def build_fusion(
    config: ConfigDict, encoder: encoders.Encoder, *, num_contexts: int
) -> fusion.Fusion:
    """Makes the fusion that `config.model` describes, for an encoder."""
    return parts.make(
        "fusion", fusion.FUSIONS, config.model.fusion, encoder_depth=encoder.depth,
        num_contexts=num_contexts, **parts.computing(config.model),
    )


def ends_in_norm(model: parts.Group) -> bool:
    """Returns whether the encoder of `config.model` ends in a norm.

    Raises:
      ValueError: for an unknown kind of fusion, which decides over it.
    """
    return parts.choose("fusion", fusion.FUSIONS, model["fusion"]).final_norm


def method(*, decoder: str, aggregator: str) -> str:
    """Returns what people call the method with parts of these kinds."""
    name = decoders.DECODERS[decoder].method
    return name if aggregator == "none" else f"PR-MIM on {name}"
