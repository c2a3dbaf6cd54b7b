"""Vision transformer on any subset of an image's patches.

The encoder of MAE and CrossMAE, and with `ids=None` the plain ViT of every
downstream task: one class. Since a patch's projection depends on no other, only the
visible ones are projected and given their positions: the same numbers as projecting all
of them and dropping three quarters, as the references do, at a quarter of the work.

The class token comes first and is never masked. Fixed position tables live in the
"constants" collection, so that no optimiser can touch them; those of a classifier are
trained, and parameters.

SimMIM's encoder (arXiv 2111.09886, section 3) is this one with other options: masked
patches are in it, as one learned token, and places are told by a relative position
bias. Patches that PR-MIM throws (arXiv 2411.15746, section 4.1) are left out of it.

TEC's (arXiv 2210.11016) is MAE's with an MLP that the class token passes before the
first block.
"""

import functools
import re
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import masking, ranges
from crossmae_jax.models import init_schemes, layers, posemb, relative_bias
from crossmae_jax.tokens import (
    Encoded,
    Tokens,
    grid_size,
    patchify,
    put_tokens,
    take_tokens,
)

POSITIONS = ("sincos", "learned", "none")
RELATIVE_BIASES = ("none", "shared", "per_block")


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


def check_images(images: Array, expected: tuple[int, ...]) -> None:
    """Raises ValueError for images of another height, width or number of channels."""
    if images.shape[1:] != expected:
        raise ValueError(
            f"Images are {'x'.join(map(str, images.shape[1:]))} but the model was "
            f"built for {'x'.join(map(str, expected))} (height x width x channels);"
            " set config.data.image_size and config.data.channels to match."
        )


class ViT(nn.Module):
    """Encoder.

    Attributes:
      size: as `parse_size` reads it.
      final_norm: CrossMAE has none when it mixes feature maps: each mixture is normed.
      learned_positions: makes a fixed position table a parameter, as in fine-tuning.
      remat: what the gradient pass computes again, one of `layers.REMATS`.
      drop_path: rate of stochastic depth in the last block, see `drop_path_rates`.
        Blocks are left out only where `apply` gets `rngs={"drop_path": key}`. Samples
        depend on the key and on a sample's place in the batch, not on the devices.
      positions: what is added to the tokens: a fixed table ("sincos"), one that is
        drawn and trained ("learned"), or "none".
      relative_bias: `relative_bias.RelativeBias`, one for all blocks ("shared") or for
        each ("per_block").
      mask_tokens: masked patches that are to be predicted are tokens, too; those that
        are thrown or skipped are not.
      qkv_bias, layer_scale: see `layers.Block`.
      cls_token_mlp: the class token passes an MLP before its position is added.
      weight_init: how matrices and tokens are drawn, one of `init_schemes.INITS`.
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
    positions: str = "sincos"
    relative_bias: str = "none"
    mask_tokens: bool = False
    qkv_bias: str = "qkv"
    layer_scale: float | None = None
    cls_token_mlp: bool = False
    weight_init: str = "xavier"

    has_cls, windows = True, ()

    def __post_init__(self):
        _ = self.grid  # refuses a size or an image that cannot be
        ranges.check("model.encoder.mlp_ratio", self.mlp_ratio, above=0)
        for name, known in (
            ("positions", POSITIONS), ("relative_bias", RELATIVE_BIASES),
            ("qkv_bias", layers.QKV_BIASES), ("weight_init", init_schemes.INITS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Unknown encoder.{name} {getattr(self, name)!r}. Known: "
                    f"{', '.join(known)}."
                )
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
        check_images(images, (*self.image_size, self.channels))
        x, ids = self._tokens(images, ids)
        places = Tokens(x, ids, self.grid, has_cls=True)
        bias, biases = None, self.relative_bias
        if biases == "shared":
            bias = self._relative_bias(places, "relative_bias")
        maps = [x]
        rates = drop_path_rates(self.drop_path, depth=self.depth)
        for i, rate in enumerate(rates):
            if biases == "per_block":
                bias = self._relative_bias(places, f"relative_bias_{i}")
            x = layers.Block(
                self.dim, self.num_heads, self.mlp_ratio, self.remat, self.dtype, rate,
                self.qkv_bias, self.layer_scale, self._drawn(i + 1),
                name=f"blocks_{i}",
            )(x, bias)
            maps.append(x)
        if self.final_norm:
            x = layers.LayerNorm(self.dtype, name="norm")(x)
        last, *maps = (places.replace(sequence=x) for x in (x, *maps))
        return Encoded(last, tuple(maps))

    def _tokens(self, images, ids):
        """Returns what the first block sees, class token first, and at which places."""
        table = self._position_table()
        x, places = self._patches(images, ids)
        cls_token = self.param("cls_token", self._drawn(1).token, (1, 1, self.dim))
        if self.cls_token_mlp:
            cls_token = layers.Mlp(
                self.dim, self.mlp_ratio, self.dtype, self._drawn(1),
                name="cls_token_mlp",
            )(cls_token)
        if table is not None:
            position = table[None, 1:]
            if places is not None:
                position = jnp.take(table[1:], places, axis=0)
            x = x + position.astype(self.dtype)
            cls_token = cls_token + table[None, :1]
        cls_token = jnp.broadcast_to(
            cls_token.astype(self.dtype), (x.shape[0], 1, self.dim)
        )
        return jnp.concatenate([cls_token, x], axis=1), places

    def _patches(self, images, ids):
        """Returns a vector for each patch that is a token, and the places of these.

        None stands for all places, in raster order.
        """
        patches = patchify(images, patch_size=self.patch_size)
        embed = layers.PatchEmbed(
            self.dim, self.dtype, self.weight_init, name="patch_embed"
        )
        if self.mask_tokens:
            shape = (1, 1, self.dim)
            mask_token = self.param("mask_token", self._drawn(1).token, shape)
        if ids is None:
            return embed(patches), None
        visible = embed(take_tokens(patches, ids.keep))
        if not self.mask_tokens:
            return visible, ids.keep
        masked = mask_token.astype(self.dtype)
        masked = jnp.broadcast_to(masked, (*patches.shape[:2], self.dim))
        x = put_tokens(masked, ids.keep, visible)
        places = jnp.sort(jnp.concatenate([ids.keep, ids.pred], axis=1), axis=1)
        if places.shape[1] == patches.shape[1]:
            return x, None
        return take_tokens(x, places), places

    def _position_table(self):
        """Returns what is added at each place, the class token's first, or None."""
        if self.positions == "none":
            return None
        if self.positions == "learned":
            shape = (1 + self.grid[0] * self.grid[1], self.dim)
            return self.param("pos_embed", self._drawn(1).token, shape)
        table = functools.partial(posemb.sincos, self.grid, self.dim)
        if self.learned_positions:
            return self.param("pos_embed", lambda _key: jnp.asarray(table()))
        return self.variable(
            "constants", "pos_embed", lambda: jnp.asarray(table())
        ).value

    def _drawn(self, number):
        return init_schemes.INITS[self.weight_init](number)

    def _relative_bias(self, tokens, name):
        bias = relative_bias.RelativeBias(self.grid, self.num_heads, name=name)
        return bias(None if tokens.ids is None else tokens.places)
