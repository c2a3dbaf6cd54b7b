"""TEC's decoder: the same blocks twice, for a teacher's features and its attention.

Each pass is MAE's decoder with a linear layer, mask token and norm of its own; blocks
and positions are shared (TEC, arXiv 2210.11016). Of the tokens x that come out, normed:

    feature     W x                              at masked patches
    attention   (Q x)_i (K x)_j / sqrt(width)    rows i that are asked for, all patches
                                                 j, in heads

The width is that of all heads together. The class token may be a row and is no key. A
patch that was thrown, and that no aggregator predicts, has zeros for x.
"""

from collections.abc import Mapping

import einops
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import masking
from crossmae_jax.masking import Asked
from crossmae_jax.models import init_schemes, layers, posemb
from crossmae_jax.tokens import Tokens, take_tokens

_TARGETS = ("feature", "attention")


class Pass(nn.Module):
    """What one of the two passes has to itself.

    Attributes:
      width: of the features.
      num_heads: of the attention; 0 for the pass of the features.
    """

    dim: int
    width: int
    num_heads: int = 0
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.mask_token = self.param("mask_token", init_schemes.token, (1, 1, self.dim))
        self.decoder_embed = layers.Dense(self.dim, self.dtype)
        self.decoder_norm = layers.LayerNorm(self.dtype)
        if self.num_heads:
            self.decoder_qk = layers.SplitDense(self.width, (True, True), self.dtype)
        else:
            self.decoder_pred = layers.Dense(self.width, self.dtype)

    def embed(
        self, context: Tokens, table: Float[Array, "n e"], ids: masking.TokenIds
    ) -> Tokens:
        """Returns what the first block sees: class token, visible and masked ones."""
        sequence = self.decoder_embed(context.sequence)
        embedded = context.replace(sequence=sequence)
        visible, masked = (jnp.take(table[1:], x, axis=0) for x in (ids.keep, ids.pred))
        x = [
            embedded.cls + table[None, :1].astype(self.dtype),
            embedded.values + visible.astype(self.dtype),
            (self.mask_token + masked).astype(self.dtype),
        ]
        places = jnp.concatenate([ids.keep, ids.pred], axis=1)
        return context.replace(sequence=jnp.concatenate(x, axis=1), ids=places)

    def features(self, masked: Tokens) -> Tokens:
        """Predicts the features of patches."""
        return masked.with_values(self.decoder_pred(self.decoder_norm(masked.values)))

    def attention(self, tokens: Tokens, rows: Array) -> Tokens:
        """Predicts the attention of these places, logits [b r (h n)].

        Args:
          rows: i32[b r], with `CLASS_TOKEN` for the class token.
        """
        normed = tokens.replace(sequence=self.decoder_norm(tokens.sequence))
        whole = jnp.concatenate([normed.cls, normed.at(None)], axis=1)
        queries, keys = self.decoder_qk(whole)
        queries, keys = (
            einops.rearrange(x.astype(jnp.float32), "b s (h d) -> b s h d",
                             h=self.num_heads)
            for x in (take_tokens(queries, rows + 1), keys[:, 1:])
        )
        logits = jnp.einsum("brhd,bnhd->brhn", queries, keys) * self.width**-0.5
        logits = einops.rearrange(logits, "b r h n -> b r (h n)")
        return Tokens(logits, rows, tokens.grid)


class TECDecoder(nn.Module):
    """Decodes features and attention from one context, in a pass for each.

    Attributes are those of `decoders.Decoder`.
    """

    method = "TEC"
    gives_visible = self_attention = True
    needs_masked = reads_masked = False
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
        if set(self.widths) != set(_TARGETS):
            raise ValueError(
                f"TEC's decoder predicts {' and '.join(_TARGETS)} of a teacher, but "
                f"that of config.target is {', '.join(self.widths)}; set "
                "config.target.kind='teacher', or another config.model.decoder.kind."
            )
        super().__post_init__()

    def setup(self):
        self.decoder_pos_embed = self.variable(
            "constants", "decoder_pos_embed",
            lambda: jnp.asarray(posemb.sincos(self.grid, self.dim)),
        )
        self.decoder_blocks = [
            layers.Block(
                self.dim, self.num_heads, self.mlp_ratio, self.remat, self.dtype
            )
            for _ in range(self.depth)
        ]
        width, num_patches = self.widths["feature"], self.grid[0] * self.grid[1]
        self.forward_fea_decoder = Pass(self.dim, width, dtype=self.dtype)
        self.forward_att_decoder = Pass(
            self.dim, width, self.widths["attention"] // num_patches, self.dtype
        )

    def _pass(self, name):
        own = {
            "feature": self.forward_fea_decoder, "attention": self.forward_att_decoder
        }
        return own[name]

    def __call__(
        self, contexts: tuple[Tokens, ...], ids: masking.TokenIds, asked: Asked
    ) -> dict[str, Tokens]:
        """Returns the tokens of visible and retained patches, whatever is asked for."""
        (context,), table = contexts, self.decoder_pos_embed.value
        decoded = {}
        for name in _TARGETS:
            tokens = self._pass(name).embed(context, table, ids)
            x = tokens.sequence
            for block in self.decoder_blocks:
                x = block(x)
            decoded[name] = tokens.replace(sequence=x)
        return decoded

    def head(
        self, name: str, tokens: Tokens, ids: masking.TokenIds, asked: Asked
    ) -> Tokens:
        """Predicts features of masked patches; attention of the rows asked for.

        Of retained patches where nobody asks.
        """
        if name == "feature":
            return self._pass(name).features(tokens.behind(ids.keep.shape[1]))
        return self._pass(name).attention(tokens, asked.get(name, ids.pred))
