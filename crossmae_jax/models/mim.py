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

from crossmae_jax import masking, patches
from crossmae_jax.models import aggregator, fusion, layers, vit
from crossmae_jax.models.decoder_cross import CrossDecoder
from crossmae_jax.models.decoder_mae import MAEDecoder

DECODERS = {"cross": CrossDecoder, "mae": MAEDecoder}
FUSIONS = ("inter_block", "last")


class MaskedImageModel(nn.Module):
    """Predicts patches from the visible ones.

    Attributes:
      fusion: None hands the decoder the encoder's normed tokens as its only context.
      aggregator: None leaves thrown patches out.
    """

    encoder: vit.ViT
    fusion: fusion.InterBlockAttention | None
    decoder: CrossDecoder | MAEDecoder
    aggregator: aggregator.Aggregator | None

    def __call__(
        self, images: Float[Array, "b height width c"], ids: masking.TokenIds
    ) -> Float[Array, "b p t"]:
        """Returns a vector for each of the patches `predicted(ids)`."""
        encoded = self.encoder(images, ids.keep)
        if self.fusion is None:
            context = (encoded.tokens,)
        else:
            context = self.fusion(encoded.feature_maps)
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


def _choice(kind: str, name: str, known) -> None:
    if name not in known:
        raise ValueError(f"Unknown {kind} {name!r}. Known: {', '.join(sorted(known))}.")


def _check_aggregator(model: ConfigDict) -> None:
    options = model.aggregator
    _choice("aggregator", options.kind, ("none", *aggregator.AGGREGATORS))
    if options.kind == "none":
        return
    _choice("aggregator.visible", options.visible, aggregator.VISIBLE)
    if options.visible == "decoder" and model.decoder != "mae":
        raise ValueError(
            f"aggregator.visible='decoder' needs a decoder with outputs at visible "
            f"places, but decoder={model.decoder!r} has none; set "
            "config.model.aggregator.visible='encoder' or 'zeros'."
        )
    if options.kernel_size < 1 or options.kernel_size % 2 == 0:
        raise ValueError(
            f"aggregator.kernel_size={options.kernel_size} has no middle; take an odd "
            "number, such as 7."
        )


def build_encoder(config: ConfigDict) -> vit.ViT:
    """Makes the encoder that `config.model` and `config.data` describe."""
    size, patch_size = vit.parse_size(config.model.size)
    return vit.ViT(
        size=size, patch_size=patch_size, image_size=tuple(config.data.image_size),
        channels=config.data.channels, mlp_ratio=config.model.mlp_ratio,
        final_norm=config.model.fusion != "inter_block", remat=config.model.remat,
        dtype=jnp.dtype(config.model.dtype),
    )


def build(config: ConfigDict) -> MaskedImageModel:
    """Makes the model that `config.model` and `config.data` describe.

    Raises:
      ValueError: for an unknown choice, or choices that do not fit each other.
    """
    model, image_size = config.model, tuple(config.data.image_size)
    _choice("fusion", model.fusion, FUSIONS)
    _choice("decoder", model.decoder, DECODERS)
    _choice("dtype", model.dtype, ("bfloat16", "float32"))
    _choice("remat", model.remat, layers.REMATS)
    if model.decoder == "mae" and model.fusion != "last":
        raise ValueError(
            f"decoder='mae' takes the encoder's last map only, but fusion="
            f"{model.fusion!r}; set config.model.fusion='last' or decoder='cross'."
        )
    if model.decoder == "mae" and model.decoder_self_attention:
        raise ValueError(
            "decoder_self_attention=True is an option of decoder='cross'; the MAE "
            "decoder always has self-attention. Set it to False."
        )
    if model.decoder_heads < 1 or model.decoder_dim % model.decoder_heads:
        raise ValueError(
            f"decoder_dim={model.decoder_dim} does not divide into "
            f"decoder_heads={model.decoder_heads}."
        )
    _check_aggregator(model)
    size, patch_size = vit.parse_size(model.size)
    grid = patches.grid_size(image_size, patch_size)
    dtype, mlp_ratio = jnp.dtype(model.dtype), model.mlp_ratio
    mixes = model.fusion == "inter_block"
    extra = {} if model.decoder == "mae" else {
        "self_attention": model.decoder_self_attention
    }
    return MaskedImageModel(
        encoder=build_encoder(config),
        fusion=fusion.InterBlockAttention(
            maps=fusion.resolve_maps(
                model.fusion_maps, depth=size.depth, include_input=model.fusion_input
            ),
            decoder_depth=model.decoder_depth, remat=model.remat, dtype=dtype,
        ) if mixes else None,
        decoder=DECODERS[model.decoder](
            dim=model.decoder_dim, depth=model.decoder_depth,
            num_heads=model.decoder_heads,
            out_dim=patch_size**2 * config.data.channels,
            grid=grid, mlp_ratio=mlp_ratio, remat=model.remat, dtype=dtype, **extra,
        ),
        aggregator=aggregator.Aggregator(
            kind=model.aggregator.kind, dim=model.decoder_dim, grid=grid,
            kernel_size=model.aggregator.kernel_size, num_heads=model.decoder_heads,
            mlp_ratio=mlp_ratio, visible=model.aggregator.visible,
            rewrites_retained=model.aggregator.rewrites_retained, dtype=dtype,
        ) if model.aggregator.kind != "none" else None,
    )
