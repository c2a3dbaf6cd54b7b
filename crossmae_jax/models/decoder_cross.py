"""CrossMAE's decoder: mask queries read from the encoder, not from each other.

A query is the mask token plus the position of the patch to predict. Each block lets
the queries cross-attend to its context (CrossMAE, arXiv 2401.14391, sections 3.2-3.4).
No query sees another, so any subset of patches can be decoded with the same result for
each: a part of them in training, all of them at test time.

The class token is part of the context; contexts carry no decoder position.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from crossmae_jax import masking
from crossmae_jax.masking import Asked
from crossmae_jax.models import init_schemes, layers, parts, posemb
from crossmae_jax.tokens import Tokens


class CrossDecoder(nn.Module):
    """Decodes any patches from one context per block, or from one shared by all.

    Attributes are those of `decoders.Decoder`, and:
      self_attention: the queries also attend to each other (the paper's ablation); a
        prediction then depends on which others are made.
    """

    method = "CrossMAE"
    gives_visible = needs_masked = reads_masked = False

    dim: int
    depth: int
    num_heads: int
    widths: Mapping[str, int]
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    self_attention: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        layers.check_blocks(
            "decoder", dim=self.dim, depth=self.depth, num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
        )
        parts.only(self.widths)
        super().__post_init__()

    @property
    def num_contexts(self) -> int:
        """One for each block."""
        return self.depth

    def setup(self):
        self.mask_token = self.param("mask_token", init_schemes.token, (1, 1, self.dim))
        self.decoder_pos_embed = self.variable(
            "constants", "decoder_pos_embed",
            lambda: jnp.asarray(posemb.sincos(self.grid, self.dim)),
        )
        self.decoder_blocks = [
            layers.CrossBlock(
                self.dim, self.num_heads, self.mlp_ratio, self.self_attention,
                self.remat, self.dtype,
            )
            for _ in range(self.depth)
        ]
        self.decoder_norm = layers.LayerNorm(self.dtype)
        self.name_of_target, width = parts.only(self.widths)
        self.decoder_pred = layers.Dense(width, self.dtype)

    def __call__(
        self, contexts: tuple[Tokens, ...], ids: masking.TokenIds, asked: Asked
    ) -> dict[str, Tokens]:
        if len(contexts) == 1:
            contexts = contexts * self.depth
        places = asked.get(self.name_of_target, ids.pred)
        x = self.queries(places)
        for block, context in zip(self.decoder_blocks, contexts, strict=True):
            x = block(x, context.sequence)
        return {self.name_of_target: Tokens(x, places, self.grid)}

    def head(
        self, name: str, tokens: Tokens, ids: masking.TokenIds, asked: Asked
    ) -> Tokens:
        """Predicts the patches that were decoded."""
        return tokens.with_values(self.decoder_pred(self.decoder_norm(tokens.values)))

    def queries(self, places: Int[Array, "b q"]) -> Float[Array, "b q d"]:
        """Returns mask token plus position of each patch to predict."""
        position = jnp.take(self.decoder_pos_embed.value[1:], places, axis=0)
        return (self.mask_token + position).astype(self.dtype)
