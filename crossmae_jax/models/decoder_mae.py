"""MAE's decoder: self-attention over visible and mask tokens together.

The encoder's tokens are projected to decoder width, a mask token stands for each patch
to predict, positions are added to all, and blocks of self-attention run over them (MAE,
arXiv 2111.06377, section 3 and appendix A.1). MAE asks for all masked patches. Patches
that are not asked for are not there: plain throwing (PR-MIM, arXiv 2411.15746, section
3.1). Attention does not depend on the order of tokens: class, visible, masked.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import masking
from crossmae_jax.models import layers, posemb


class MAEDecoder(nn.Module):
    """Decodes `ids.pred` from one context: the encoder's class and visible tokens.

    Attributes are those of `decoders.Decoder`.
    """

    method = "MAE"
    gives_visible = needs_masked = self_attention = shares_context = True

    dim: int
    depth: int
    num_heads: int
    out_dim: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        layers.check_heads("decoder", self.dim, self.num_heads)
        super().__post_init__()

    def setup(self):
        self.decoder_pos_embed = self.variable(
            "constants", "decoder_pos_embed",
            lambda: jnp.asarray(posemb.sincos(self.grid, self.dim)),
        )
        self.mask_token = self.param("mask_token", layers.token_init, (1, 1, self.dim))
        self.decoder_embed = layers.Dense(self.dim, self.dtype)
        self.decoder_blocks = [
            layers.Block(
                self.dim, self.num_heads, self.mlp_ratio, self.remat, self.dtype
            )
            for _ in range(self.depth)
        ]
        self.decoder_norm = layers.LayerNorm(self.dtype)
        self.decoder_pred = layers.Dense(self.out_dim, self.dtype)

    def __call__(
        self, context: tuple[Float[Array, "b k e"], ...], ids: masking.TokenIds
    ) -> layers.Decoded:
        (encoded,) = context
        table = self.decoder_pos_embed.value
        embedded = self.decoder_embed(encoded)
        cls_token = embedded[:, :1] + table[None, :1].astype(self.dtype)
        position = jnp.take(table[1:], ids.keep, axis=0)
        visible = embedded[:, 1:] + position.astype(self.dtype)
        position = jnp.take(table[1:], ids.pred, axis=0)
        masked = (self.mask_token + position).astype(self.dtype)

        x = jnp.concatenate([cls_token, visible, masked], axis=1)
        for block in self.decoder_blocks:
            x = block(x)
        num_keep = ids.keep.shape[1]
        return layers.Decoded(x[:, 1 + num_keep :], visible=x[:, 1 : 1 + num_keep])

    def head(self, tokens: Float[Array, "b q d"]) -> Float[Array, "b q t"]:
        """Turns tokens into patch vectors."""
        return self.decoder_pred(self.decoder_norm(tokens))
