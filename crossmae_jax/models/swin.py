"""Swin transformer, on all of an image or on any subset of its units.

Swin (arXiv 2103.14030, section 3): attention within windows of cells, in every other
block within moved ones; between stages four cells become one of twice the width. A
place of this encoder, what can be masked, thrown and decoded, is a cell of its LAST
stage: 8 x 8 cells of 4 pixels are one unit of 32. Up to there the cells of a unit stay
together, so that merging never lacks one:

    stage    width   cells of 4, 8, 16, 32 pixels    of a unit
    1..4     d..8d   56^2, 28^2, 14^2, 7^2           64, 16, 4, 1

With `mask_tokens` masked units are in it (SimMIM, arXiv 2111.09886, section 3.2: one
learned token in place of each cell, behind the norm of the patches); without, only the
visible ones are (GreenMIM, arXiv 2205.13515, section 3.2). Units that PR-MIM throws
(arXiv 2411.15746) are left out of either. All of a grid take the plain way, some of one
are grouped by their windows (`windows`). It is the same Swin, weight by weight.

Blocks are numbered through the stages, `blocks_0` to the last, and what merges cells
has the number of the block before it, `downsample_1`. There is no class token.
"""

import itertools
import re
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import masking, ranges
from crossmae_jax.models import init_schemes, layers, vit, windows
from crossmae_jax.models.windows import Windows
from crossmae_jax.ops import attention as attention_ops
from crossmae_jax.tokens import Encoded, Tokens, grid_size, patchify, take_tokens


class Size(NamedTuple):
    """Width of the first stage, and blocks and heads of each."""

    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]


SIZES = {
    "Ti": Size(dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "S": Size(dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "B": Size(dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "L": Size(dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48)),
}


def parse_size(size: str) -> tuple[Size, int]:
    """Reads "B/4", or "W16-D2.2-H2.4/2": width 16, two stages, patches of 2.

    Raises:
      ValueError: if the name is unknown or malformed.
    """
    name, _, patch = size.partition("/")
    own = re.fullmatch(r"W(\d+)-D([\d.]+)-H([\d.]+)", name)
    if not patch.isdecimal() or int(patch) == 0 or not (own or name in SIZES):
        raise ValueError(
            f"Unknown model size {size!r} of a Swin. Known: {', '.join(SIZES)} followed"
            " by /patch (B/4), or W<width>-D<depth of each stage>-H<heads of each>"
            "/patch (W16-D2.2-H2.4/2)."
        )
    if own is None:
        return SIZES[name], int(patch)
    depths, heads = (
        tuple(int(number or 0) for number in part.split("."))
        for part in own.groups()[1:]
    )
    shape = Size(int(own[1]), depths, heads)
    if 0 in (shape.dim, *depths, *heads) or len(depths) != len(heads):
        raise ValueError(
            f"Model size {size!r} must have a width, and a depth and heads of 1 or "
            "more for each stage."
        )
    for stage, num_heads in enumerate(heads):
        if (shape.dim << stage) % num_heads:
            raise ValueError(
                f"Model size {size!r}: width {shape.dim << stage} of stage {stage + 1} "
                f"does not divide into {num_heads} heads."
            )
    return shape, int(patch)


class Stage(NamedTuple):
    """Blocks of one width.

    Attributes:
      grid: rows and columns of its cells.
      side: of its windows.
      cells: along the side of a unit.
      first: number of its first block.
    """

    dim: int
    depth: int
    num_heads: int
    grid: tuple[int, int]
    side: int
    cells: int
    first: int


class WindowAttention(layers.Attention):
    """Self-attention within windows, with a bias for each offset in one.

    Attributes:
      side: of a window.
    """

    side: int = 7

    in_windows = True

    def setup(self):
        super().setup()
        self.relative_position_bias_table = self.param(
            "relative_position_bias_table", init_schemes.token,
            ((2 * self.side - 1) ** 2, self.num_heads),
        )

    def attend(
        self,
        queries: Float[Array, "b n d"],
        keys: Float[Array, "b n d"],
        values: Float[Array, "b n d"],
        within: Windows,
    ) -> Float[Array, "b n d"]:
        """Attends with what `project` returned, in windows."""
        num_heads = self.num_heads
        q, k, v = (
            within.grouped(x, num_heads=num_heads) for x in (queries, keys, values)
        )
        bias = within.bias(self.relative_position_bias_table)
        num_masks = bias.shape[0]
        if num_masks in (1, len(q)):
            out = attention_ops.attention(q, k, v, bias=bias)
        else:  # one for several images in a row
            q, k, v = (x.reshape(num_masks, -1, *x.shape[1:]) for x in (q, k, v))
            out = jax.vmap(_attention)(q, k, v, bias[:, None])
            out = out.reshape(-1, *out.shape[2:])
        return self.proj(within.ungrouped(out, num_heads=num_heads))


def _attention(q, k, v, bias):
    return attention_ops.attention(q, k, v, bias=bias, impl="xla")


class WindowBlock(layers.Block):
    """A block that attends within windows.

    Attributes:
      side: of a window.
    """

    side: int = 7

    def make_attention(self) -> layers.Attention:
        return WindowAttention(
            self.dim, self.num_heads, self.dtype, self.qkv_bias, self.drawn, self.side
        )

    def __call__(
        self, x: Float[Array, "b n d"], within: Windows
    ) -> Float[Array, "b n d"]:
        """Applies the block."""
        return self.run(x, within)


class PatchMerging(nn.Module):
    """Makes one vector of four: theirs, columns slowest, a norm, a linear layer."""

    dim: int
    norm_epsilon: float
    dtype: DTypeLike = jnp.float32
    drawn: init_schemes.Init = init_schemes.normal(1)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], *, shape: tuple[int, int]
    ) -> Float[Array, "b m e"]:
        """Merges cells that lie in rectangles of this shape, one after the other."""
        rows, columns = shape
        x = einops.rearrange(
            x, "b (u r p c q) d -> b (u r c) (q p d)",
            r=rows // 2, p=2, c=columns // 2, q=2,
        )
        x = layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm")(x)
        (merged,) = layers.SplitDense(
            self.dim, (False,), self.dtype, self.drawn.kernel, name="reduction"
        )(x)
        return merged


class Swin(nn.Module):
    """Encoder.

    Attributes:
      size: as `parse_size` reads it.
      window: side of the windows, in cells, at most a stage's grid.
      final_norm: ends in a norm; likewise as in `vit.ViT` `remat`, `drop_path`,
        `mask_tokens`, `weight_init`.
      norm_epsilon: of all norms: Swin's 1e-5, or GreenMIM's 1e-6.
      together: so many images in a row have the same ids.
    """

    size: str
    image_size: tuple[int, ...]
    window: int
    channels: int = 3
    mlp_ratio: float = 4.0
    final_norm: bool = True
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    drop_path: float = 0.0
    mask_tokens: bool = False
    weight_init: str = "normal"
    norm_epsilon: float = 1e-5
    together: int = 1

    has_cls = False

    def __post_init__(self):
        ranges.check("model.encoder.window", self.window, least=1)
        ranges.check("model.encoder.mlp_ratio", self.mlp_ratio, above=0)
        ranges.check("model.encoder.norm_epsilon", self.norm_epsilon, above=0)
        if self.weight_init not in init_schemes.INITS:
            raise ValueError(
                f"Unknown encoder.weight_init {self.weight_init!r}. Known: "
                f"{', '.join(init_schemes.INITS)}."
            )
        _ = self.stages  # refuses a size, an image or a window that cannot be
        super().__post_init__()

    @property
    def dim(self) -> int:
        """Width of the last stage's vectors."""
        return self.stages[-1].dim

    @property
    def depth(self) -> int:
        """Number of blocks of all stages."""
        return sum(parse_size(self.size)[0].depths)

    @property
    def num_heads(self) -> int:
        """Heads of the last stage's blocks."""
        return self.stages[-1].num_heads

    @property
    def patch_size(self) -> int:
        """The side of a unit, a cell of the last stage, in pixels."""
        shape, side = parse_size(self.size)
        return side << len(shape.depths) - 1

    @property
    def grid(self) -> tuple[int, int]:
        """Units along height and width."""
        return grid_size(self.image_size, self.patch_size)

    @property
    def windows(self) -> tuple[int, ...]:
        """The side of each block's windows."""
        return tuple(stage.side for stage in self.stages for _ in range(stage.depth))

    @property
    def title(self) -> str:
        """What people call it: "Swin-B/4, window 7", or its measures."""
        shape, side = parse_size(self.size)
        for name, known in SIZES.items():
            if known == shape:
                return f"Swin-{name}/{side}, window {self.window}"
        return f"Swin {self.size}, window {self.window}"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, the first of them on the finest grid."""
        shape, _ = parse_size(self.size)
        stages, number = [], len(shape.depths)
        for i, (depth, heads) in enumerate(zip(shape.depths, shape.heads, strict=True)):
            cells = 1 << number - 1 - i
            grid = tuple(length * cells for length in self.grid)
            side = windows.fitted(self.window, grid, stage=i)
            stages.append(Stage(
                shape.dim << i, depth, heads, grid, side, cells, sum(shape.depths[:i])
            ))
        return tuple(stages)

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds | None = None,
    ) -> Encoded:
        vit.check_images(images, (*self.image_size, self.channels))
        x, places = self._cells(images, ids)
        rates = vit.drop_path_rates(self.drop_path, depth=self.depth)
        maps, drawn = [], init_schemes.INITS[self.weight_init](1)
        for stage, following in itertools.zip_longest(self.stages, self.stages[1:]):
            where = _Where(stage, places, self.together)
            maps += [] if maps else [where.tokens(x)]
            within = [where.windows(shifted) for shifted in range(min(2, stage.depth))]
            for i in range(stage.depth):
                number = stage.first + i
                x = WindowBlock(
                    stage.dim, stage.num_heads, self.mlp_ratio, self.remat, self.dtype,
                    rates[number], drawn=drawn, norm_epsilon=self.norm_epsilon,
                    side=stage.side, name=f"blocks_{number}",
                )(x, within[i % 2])
                maps.append(where.tokens(x))
            if following is not None:
                x = PatchMerging(
                    following.dim, self.norm_epsilon, self.dtype, drawn,
                    name=f"downsample_{following.first - 1}",
                )(x, shape=where.shape)
        if self.final_norm:
            x = layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm")(x)
        return Encoded(where.tokens(x), tuple(maps))

    def _cells(self, images, ids):
        """Returns the cells of the first stage, and of which units they are.

        None stands for all of them, whose cells are in raster order.
        """
        cell, cells = self.patch_size // self.stages[0].cells, self.stages[0].cells
        places, masked = None if ids is None else ids.keep, None
        if self.mask_tokens:
            drawn = init_schemes.INITS[self.weight_init](1).token
            token = self.param("mask_token", drawn, (1, 1, self.stages[0].dim))
        if self.mask_tokens and ids is not None:
            num = self.grid[0] * self.grid[1]
            places = jnp.sort(jnp.concatenate([ids.keep, ids.pred], axis=1), axis=1)
            masked = masking.mask_of(ids.pred, num_patches=num)
            if places.shape[1] == num:
                places = None
        if places is None:
            patches = patchify(images, patch_size=cell)
        else:
            units = take_tokens(patchify(images, patch_size=self.patch_size), places)
            patches = einops.rearrange(
                units, "b u (r p c q t) -> b (u r c) (p q t)",
                r=cells, c=cells, p=cell, q=cell,
            )
        x = layers.PatchEmbed(
            self.stages[0].dim, self.dtype, self.weight_init, self.norm_epsilon,
            name="patch_embed",
        )(patches)
        if masked is None:
            return x, places
        if places is None:
            masked = masked.reshape(-1, *self.grid)
            masked = einops.repeat(
                masked, "b r c -> b (r p c q)", p=cells, q=cells
            )
        else:
            masked = jnp.take_along_axis(masked, places, axis=1)
            masked = jnp.repeat(masked, cells**2, axis=1)
        return jnp.where(masked[..., None], token.astype(self.dtype), x), places


class _Where:
    """Where the cells of a stage lie: all of its grid, or those of some units."""

    def __init__(self, stage, places, together):
        self.stage, self.places = stage, places
        if places is None:
            self.shape, self.ids = stage.grid, None
            return
        self.shape = (stage.cells, stage.cells)
        columns = stage.grid[1] // stage.cells
        row, column = jnp.divmod(jnp.arange(stage.cells**2), stage.cells)
        rows, across = places // columns, places % columns
        y, x = (
            (units[:, :, None] * stage.cells + inside[None, None]).reshape(
                len(places), -1
            )
            for units, inside in ((rows, row), (across, column))
        )
        self.ids = y * stage.grid[1] + x
        every = min(together, len(places))
        self._coordinates = y[::every], x[::every]

    def tokens(self, x):
        return Tokens(x, self.ids, self.stage.grid)

    def windows(self, number):
        """Returns the windows of the stage's block of this number."""
        stage = self.stage
        shift = windows.shift_of(number, side=stage.side, grid=stage.grid)
        if self.places is None:
            return windows.of_all(stage.grid, side=stage.side, shift=shift)
        return windows.of_some(
            *self._coordinates, grid=stage.grid, side=stage.side, shift=shift
        )
