"""Vision transformer on any subset of an image's patches.

The encoder of MAE and CrossMAE, and with `ids=None` the plain ViT of every
downstream task: one class. Since a patch's projection depends on no other, only the
visible ones are projected and given their positions: the same numbers as projecting all
of them and dropping three quarters, as the references do, at a quarter of the work.

The class token comes first and is never masked. Position tables are fixed and live in
the "constants" collection, so that no optimiser can touch them; those of a classifier
are trained, and parameters.
"""

import functools
import re
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import masking, ranges
from crossmae_jax.models import layers, posemb
from crossmae_jax.tokens import Encoded, Tokens, grid_size, patchify, take_tokens


class Size(NamedTuple):
    """Width, depth and heads of an encoder."""

    dim: int
    depth: int
    num_heads: int


SIZES = {
    "Ti": Size(dim=192, depth=12, num_heads=3),
    "S": Size(dim=384, depth=12, num_heads=6),
    "B": Size(dim=768, depth=12, num_heads=12),
    "L": Size(dim=1024, depth=24, num_heads=16),
    "H": Size(dim=1280, depth=32, num_heads=16),
}


def parse_size(size: str) -> tuple[Size, int]:
    """Reads "B/16", or "W96-D6-H4/2": width 96, depth 6, heads 4, patches of 2.

    Raises:
      ValueError: if the name is unknown or malformed.
    """
    name, _, patch = size.partition("/")
    own = re.fullmatch(r"W(\d+)-D(\d+)-H(\d+)", name)
    if not patch.isdecimal() or int(patch) == 0 or not (own or name in SIZES):
        raise ValueError(
            f"Unknown model size {size!r}. Known: {', '.join(SIZES)} followed by "
            "/patch (B/16), or W<width>-D<depth>-H<heads>/patch (W96-D6-H4/2)."
        )
    shape = Size(*map(int, own.groups())) if own else SIZES[name]
    if 0 in shape:
        raise ValueError(
            f"Model size {size!r} must have a width, a depth and heads of 1 or more."
        )
    if shape.dim % shape.num_heads:
        raise ValueError(
            f"Model size {size!r}: width {shape.dim} does not divide into "
            f"{shape.num_heads} heads."
        )
    return shape, int(patch)


def drop_path_rates(maximum: float, *, depth: int) -> tuple[float, ...]:
    """Returns each block's rate of stochastic depth: from 0 linearly to the maximum.

    Raises:
      ValueError: if the maximum is not a probability below 1.
    """
    if not 0 <= maximum < 1:
        raise ValueError(
            f"drop_path={maximum} is no share of samples to leave a block out for; "
            "give 0 or more, below 1."
        )
    return tuple(maximum * i / max(depth - 1, 1) for i in range(depth))


class ViT(nn.Module):
    """Encoder.

    Attributes:
      size: as `parse_size` reads it.
      final_norm: CrossMAE has none when it mixes feature maps: each mixture is normed.
      learned_positions: makes the position table a parameter, as in fine-tuning.
      remat: what the gradient pass computes again, one of `layers.REMATS`.
      drop_path: rate of stochastic depth in the last block, see `drop_path_rates`.
        Blocks are left out only where `apply` gets `rngs={"drop_path": key}`. Samples
        depend on the key and on a sample's place in the batch, not on the devices.
    """

    size: str
    image_size: tuple[int, ...]
    channels: int = 3
    mlp_ratio: float = 4.0
    final_norm: bool = True
    learned_positions: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    drop_path: float = 0.0

    def __post_init__(self):
        _ = self.grid  # refuses a size or an image that cannot be
        ranges.check("model.encoder.mlp_ratio", self.mlp_ratio, above=0)
        super().__post_init__()

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return parse_size(self.size)[0].dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return parse_size(self.size)[0].depth

    @property
    def num_heads(self) -> int:
        """Heads of every block."""
        return parse_size(self.size)[0].num_heads

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels."""
        return parse_size(self.size)[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return grid_size(self.image_size, self.patch_size)

    @property
    def title(self) -> str:
        """What people call it: "ViT-B/16", or its measures."""
        shape, patch_size = parse_size(self.size)
        for name, known in SIZES.items():
            if known == shape:
                return f"ViT-{name}/{patch_size}"
        return f"width {shape.dim}, depth {shape.depth}, patches of {patch_size}"

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds | None = None,
    ) -> Encoded:
        expected = (*self.image_size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"Images are {'x'.join(map(str, images.shape[1:]))} but the model was "
                f"built for {'x'.join(map(str, expected))} (height x width x channels);"
                " set config.data.image_size and config.data.channels to match."
            )
        table = functools.partial(posemb.sincos, self.grid, self.dim)
        if self.learned_positions:
            pos_embed = self.param("pos_embed", lambda _key: jnp.asarray(table()))
        else:
            pos_embed = self.variable(
                "constants", "pos_embed", lambda: jnp.asarray(table())
            ).value

        x = patchify(images, patch_size=self.patch_size)
        position = pos_embed[None, 1:]
        keep = None if ids is None else ids.keep
        if keep is not None:
            x = take_tokens(x, keep)
            position = jnp.take(pos_embed[1:], keep, axis=0)
        x = layers.PatchEmbed(self.dim, self.dtype, name="patch_embed")(x)
        x = x + position.astype(self.dtype)

        cls_token = self.param("cls_token", layers.token_init, (1, 1, self.dim))
        cls_token = (cls_token + pos_embed[None, :1]).astype(self.dtype)
        cls_token = jnp.broadcast_to(cls_token, (x.shape[0], 1, self.dim))
        x = jnp.concatenate([cls_token, x], axis=1)

        maps = [x]
        rates = drop_path_rates(self.drop_path, depth=self.depth)
        for i, rate in enumerate(rates):
            x = layers.Block(
                self.dim, self.num_heads, self.mlp_ratio, self.remat, self.dtype,
                rate, name=f"blocks_{i}",
            )(x)
            maps.append(x)
        if self.final_norm:
            x = layers.LayerNorm(self.dtype, name="norm")(x)
        last, *maps = (Tokens(x, keep, self.grid, has_cls=True) for x in (x, *maps))
        return Encoded(last, tuple(maps))
