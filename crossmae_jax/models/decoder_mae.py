"""MAE's decoder: self-attention over visible and mask tokens together.

The encoder's tokens are projected to decoder width, a mask token stands for each patch
to predict, positions are added to all, and blocks of self-attention run over them (MAE,
arXiv 2111.06377, section 3 and appendix A.1). MAE asks for all masked patches. Patches
that are not asked for are not there: plain throwing (PR-MIM, arXiv 2411.15746, section
3.1). Attention does not depend on the order of tokens: class, visible, masked.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from crossmae_jax import masking
from crossmae_jax.masking import Asked
from crossmae_jax.models import init_schemes, layers, parts, posemb
from crossmae_jax.tokens import Tokens


class MAEDecoder(nn.Module):
    """Decodes masked patches from one context: the encoder's class and visible tokens.

    Of an encoder without a class token (GreenMIM, arXiv 2205.13515) the visible alone.

    Attributes are those of `decoders.Decoder`.
    """

    method = "MAE"
    gives_visible = needs_masked = self_attention = True
    reads_masked = False
    num_contexts = 1

    dim: int
    depth: int
    num_heads: int
    widths: Mapping[str, int]
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        layers.check_blocks(
            "decoder", dim=self.dim, depth=self.depth, num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
        )
        parts.only(self.widths)
        super().__post_init__()

    def setup(self):
        self.decoder_pos_embed = self.variable(
            "constants", "decoder_pos_embed",
            lambda: jnp.asarray(posemb.sincos(self.grid, self.dim)),
        )
        self.mask_token = self.param("mask_token", init_schemes.token, (1, 1, self.dim))
        self.decoder_embed = layers.Dense(self.dim, self.dtype)
        self.decoder_blocks = [
            layers.Block(
                self.dim, self.num_heads, self.mlp_ratio, self.remat, self.dtype
            )
            for _ in range(self.depth)
        ]
        self.decoder_norm = layers.LayerNorm(self.dtype)
        self.name_of_target, width = parts.only(self.widths)
        self.decoder_pred = self.make_prediction(width)

    def make_prediction(self, width: int) -> nn.Module:
        """Returns the layer that predicts so many values of a token."""
        return layers.Dense(width, self.dtype)

    def __call__(
        self, contexts: tuple[Tokens, ...], ids: masking.TokenIds, asked: Asked
    ) -> dict[str, Tokens]:
        (encoded,) = contexts
        table = self.decoder_pos_embed.value
        embedded = encoded.replace(sequence=self.decoder_embed(encoded.sequence))
        position = jnp.take(table[1:], ids.keep, axis=0)
        visible = embedded.values + position.astype(self.dtype)
        position = jnp.take(table[1:], ids.pred, axis=0)
        masked = (self.mask_token + position).astype(self.dtype)

        sequence = [visible, masked]
        if encoded.has_cls:
            cls_token = embedded.cls + table[None, :1].astype(self.dtype)
            sequence.insert(0, cls_token)
        x = jnp.concatenate(sequence, axis=1)
        for block in self.decoder_blocks:
            x = block(x)
        places = jnp.concatenate([ids.keep, ids.pred], axis=1)
        return {
            self.name_of_target: Tokens(x, places, self.grid, has_cls=encoded.has_cls)
        }

    def head(
        self, name: str, tokens: Tokens, ids: masking.TokenIds, asked: Asked
    ) -> Tokens:
        """Predicts the masked patches: of the visible ones nobody asks for any."""
        masked = tokens.behind(ids.keep.shape[1])
        return masked.with_values(self.decoder_pred(self.decoder_norm(masked.values)))
