"""Decoders by kind, and what every one of them tells about itself."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from crossmae_jax import masking
from crossmae_jax.models import layers
from crossmae_jax.models.decoder_cross import CrossDecoder
from crossmae_jax.models.decoder_mae import MAEDecoder


@runtime_checkable
class Decoder(Protocol):
    """Predicts patches from what a fusion has made of the encoder's feature maps.

    Attributes:
      dim: width of its tokens.
      depth: number of blocks; likewise `num_heads` and `mlp_ratio` of a block.
      method: what people call the method that has it, such as "MAE".
      gives_visible: visible patches go through its blocks beside the masked ones, in
        one self-attention, and come out as tokens, too.
      needs_masked: it can be asked for masked patches only.
      self_attention: the tokens of masked patches attend to each other.
      shares_context: all blocks have one context; others can have one each.
    """

    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    method: str
    gives_visible: bool
    needs_masked: bool
    self_attention: bool
    shares_context: bool

    def __call__(
        self, context: tuple[Float[Array, "b k e"], ...], ids: masking.TokenIds
    ) -> layers.Decoded:
        """Decodes `ids.pred`."""
        ...

    def head(self, tokens: Float[Array, "b q d"]) -> Float[Array, "b q t"]:
        """Turns tokens into patch vectors."""
        ...


DECODERS = {"cross": CrossDecoder, "mae": MAEDecoder}
