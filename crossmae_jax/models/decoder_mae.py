"""MAE's decoder: self-attention over visible and mask tokens together.

The encoder's tokens are projected to decoder width, the mask token fills every other
place, positions are added to all, and blocks of self-attention run over the whole image
(MAE, arXiv 2111.06377, section 3 and appendix A.1). Only the patches asked for are read
out; what they say depends on all tokens, so reading fewer saves no attention.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import masking, patches
from crossmae_jax.models import layers, posemb


class MAEDecoder(nn.Module):
    """Decodes `ids.pred` from one context: the encoder's class and visible tokens."""

    dim: int
    depth: int
    num_heads: int
    out_dim: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, context: tuple[Float[Array, "b k e"], ...], ids: masking.TokenIds
    ) -> Float[Array, "b q t"]:
        (encoded,) = context
        pos_embed = self.variable(
            "constants", "decoder_pos_embed",
            lambda: jnp.asarray(posemb.sincos(self.grid, self.dim)),
        ).value
        mask_token = self.param("mask_token", layers.token_init, (1, 1, self.dim))

        x = layers.dense(self.dim, self.dtype, name="decoder_embed")(encoded)
        cls_token, visible = x[:, :1], x[:, 1:]
        num_masked = ids.restore.shape[1] - visible.shape[1]
        masked = jnp.broadcast_to(
            mask_token.astype(self.dtype), (x.shape[0], num_masked, self.dim)
        )
        shuffled = jnp.concatenate([visible, masked], axis=1)
        x = patches.take_tokens(shuffled, ids.restore)  # b n e, raster order
        x = jnp.concatenate([cls_token, x], axis=1)
        x = x + pos_embed[None].astype(self.dtype)

        for i in range(self.depth):
            x = layers.Block(
                self.num_heads, self.mlp_ratio, self.dtype, name=f"decoder_blocks_{i}"
            )(x)
        x = patches.take_tokens(x[:, 1:], ids.pred)  # b q e
        x = layers.layer_norm(self.dtype, name="decoder_norm")(x)
        return layers.dense(self.out_dim, self.dtype, name="decoder_pred")(x)
