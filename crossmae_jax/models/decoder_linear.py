"""SimMIM's decoder: one linear layer on the encoder's tokens of masked patches.

Masked patches were tokens of the encoder already, so that nothing is left to attend to:
a layer predicts all values of a patch from its token (SimMIM, arXiv 2111.09886, section
3.3). The reference's 1 x 1 convolution and pixel shuffle are this layer with the values
of a patch in another order.

PR-MIM (arXiv 2411.15746) does not say whether its aggregator stands behind the
encoder's final norm or before it. Here it stands behind it, unless `norm`.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from crossmae_jax import masking
from crossmae_jax.masking import Asked
from crossmae_jax.models import init_schemes, layers, parts
from crossmae_jax.tokens import Tokens


class LinearDecoder(nn.Module):
    """Predicts masked patches from the encoder's tokens of them.

    Attributes are those of `decoders.Decoder`, which has no blocks, and:
      norm: the final norm is the decoder's and not the encoder's, so that an aggregator
        stands before it.
    """

    method = "SimMIM"
    gives_visible = needs_masked = reads_masked = True
    self_attention = False
    num_contexts, depth = 1, 0

    widths: Mapping[str, int]
    grid: tuple[int, int]
    encoder_dim: int
    encoder_heads: int
    encoder_mlp_ratio: float
    norm: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        parts.only(self.widths)
        super().__post_init__()

    @property
    def dim(self) -> int:
        """Width of the tokens: the encoder's."""
        return self.encoder_dim

    @property
    def num_heads(self) -> int:
        """The encoder's, for an aggregator that is a block."""
        return self.encoder_heads

    @property
    def mlp_ratio(self) -> float:
        """Likewise."""
        return self.encoder_mlp_ratio

    def setup(self):
        self.decoder_norm = layers.LayerNorm(self.dtype)
        self.name_of_target, width = parts.only(self.widths)
        bounded = init_schemes.bounded(self.dim)  # PyTorch's default, kept by SimMIM
        self.decoder_pred = layers.Dense(width, self.dtype, bounded, bounded)

    def __call__(
        self, contexts: tuple[Tokens, ...], ids: masking.TokenIds, asked: Asked
    ) -> dict[str, Tokens]:
        (encoded,) = contexts
        places = jnp.concatenate([ids.keep, ids.pred], axis=1)
        return {self.name_of_target: Tokens(encoded.at(places), places, self.grid)}

    def head(
        self, name: str, tokens: Tokens, ids: masking.TokenIds, asked: Asked
    ) -> Tokens:
        """Predicts the masked patches: of the visible ones nobody asks for any."""
        masked = tokens.behind(ids.keep.shape[1])
        values = self.decoder_norm(masked.values) if self.norm else masked.values
        return masked.with_values(self.decoder_pred(values))
