"""Encoders by kind, and what every one of them tells about itself."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float
from ml_collections import ConfigDict

from crossmae_jax import kinds, masking
from crossmae_jax.models import parts, swin, vit
from crossmae_jax.tokens import Encoded


@runtime_checkable
class Encoder(Protocol):
    """Turns the visible patches of images into vectors.

    Attributes:
      grid: patches along height and width.
      patch_size: the side of a patch in pixels.
      dim: width of the vectors.
      depth: number of blocks; likewise `num_heads` and `mlp_ratio` of a block.
      drop_path: rate at which the last block is left out of training.
      mask_tokens: masked patches that are to be predicted are in it, as tokens.
      has_cls: there is a class token.
      windows: the side of each block's windows, whose maps then are of several widths
        and grids; none where every token sees all.
      title: what people call it, such as "ViT-B/16".
    """

    grid: tuple[int, int]
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    drop_path: float
    mask_tokens: bool
    has_cls: bool
    windows: tuple[int, ...]
    title: str

    def __call__(
        self,
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds | None = None,
    ) -> Encoded:
        """Encodes the visible patches; all of them if not given."""
        ...


ENCODERS = {"swin": swin.Swin, "vit": vit.ViT}


def build_encoder(
    config: ConfigDict, *, final_norm: bool = True, learned_positions: bool = False
) -> Encoder:
    """Makes the encoder that `config.model` and `config.data` describe.

    Args:
      final_norm: whether it ends in a norm; likewise `learned_positions` as in `ViT`.
        Of `config.masking` it is told how many images share a mask.

    Raises:
      ValueError: for an unknown choice, or choices that do not fit each other.
    """
    return kinds.make(
        "model.encoder", ENCODERS, config.model.encoder,
        image_size=tuple(config.data.image_size), channels=config.data.channels,
        final_norm=final_norm, learned_positions=learned_positions,
        together=config.get("masking", {}).get("together", 1),
        **parts.computing(config.model),
    )
