"""Decoders by kind, and what every one of them tells about itself."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from crossmae_jax import masking
from crossmae_jax.masking import Asked
from crossmae_jax.models.decoder_cross import CrossDecoder
from crossmae_jax.models.decoder_linear import LinearDecoder
from crossmae_jax.models.decoder_local import LocalDecoder
from crossmae_jax.models.decoder_mae import MAEDecoder
from crossmae_jax.models.decoder_tec import TECDecoder
from crossmae_jax.tokens import Tokens


@runtime_checkable
class Decoder(Protocol):
    """Predicts targets from what a fusion has made of the encoder's feature maps.

    Attributes:
      widths: how many values it predicts at a place, by the target's name.
      dim: width of its tokens.
      depth: number of blocks; likewise `num_heads` and `mlp_ratio` of a block, or where
        it has none of the encoder's.
      method: what people call the method that has it, such as "MAE".
      gives_visible: visible patches go through its blocks beside the masked ones, in
        one self-attention, and come out as tokens, too.
      needs_masked: it can be asked for masked patches only.
      self_attention: the tokens of masked patches attend to each other.
      num_contexts: how many it takes, where it is not one for all of it.
      reads_masked: masked patches are tokens of its context.
    """

    widths: Mapping[str, int]
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    method: str
    gives_visible: bool
    needs_masked: bool
    self_attention: bool
    num_contexts: int
    reads_masked: bool

    def __call__(
        self, contexts: tuple[Tokens, ...], ids: masking.TokenIds, asked: Asked
    ) -> dict[str, Tokens]:
        """Returns the last block's tokens, from which each target is predicted.

        Those of the visible patches first, if it gives them, then those of `ids.pred`,
        both in the order of the ids; or, without those of the visible ones, those of
        the places that are asked for.
        """
        ...

    def head(
        self, name: str, tokens: Tokens, ids: masking.TokenIds, asked: Asked
    ) -> Tokens:
        """Returns what is predicted of a target, perhaps at the places of another grid.

        At the places that are asked for; at the masked patches, in the order in which
        they come; or at all places of a grid.

        Args:
          tokens: as `__call__` returns them; of masked patches that an aggregator has
            added, too, behind the others.
        """
        ...


DECODERS = {
    "cross": CrossDecoder, "linear": LinearDecoder, "local": LocalDecoder,
    "mae": MAEDecoder, "tec": TECDecoder,
}
