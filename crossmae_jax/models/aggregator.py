"""PR-MIM: the thrown patches' features, put together from those of their neighbours.

Progressive reconstruction (arXiv 2411.15746, section 3.2): the decoder works on few of
the masked patches, and all of them supervise the model.

    decoded tokens -> grid, zeros at thrown places -> aggregator -> thrown tokens

after the last decoder block and before the norm and the linear layer, which thrown and
decoded patches share. The class token takes no part and no positions are added. The
paper's aggregator is one depth-wise convolution: it mixes places, not channels. What
the paper compares it with (table 12 and text) can be chosen by name:

    conv         depth-wise k x k convolution with bias
    pool         mean over k x k places, those with zeros and those outside included
    transformer  one decoder block over the grid; positions are added, for without
                 them all thrown places would be one and the same token
    convnext     depth-wise k x k, norm, MLP, and a residual (arXiv 2201.03545)

The paper does not say whether retained places keep the decoder's token; here they do,
unless `rewrites_retained`. Nor does it give the convolution's initial values; here they
are LeCun normal, the bias zero.

MAE's decoder has outputs at visible places. CrossMAE's has none, and no paper says what
to put there. Measured (docs/pr_mim.md, three seeds each): with the features that its
last block attends to, projected, the error of masked patches is 0.278 +- 0.009 on
digits and 0.698 +- 0.007 on small photographs, with zeros 0.397 +- 0.045 and 0.734 +-
0.012. So "encoder" is CrossMAE's default.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import masking
from crossmae_jax.models import layers, parts, posemb
from crossmae_jax.ops import depthwise
from crossmae_jax.tokens import Tokens


class DepthwiseConv(nn.Module):
    """One filter per channel, with bias."""

    kernel_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b row col d"]) -> Float[Array, "b row col d"]:
        side, dim = self.kernel_size, x.shape[-1]
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (side, side, 1, dim)
        )
        bias = self.param("bias", nn.initializers.zeros_init(), (dim,))
        out = depthwise.depthwise_conv(x, kernel[:, :, 0].astype(self.dtype))
        return out + bias.astype(self.dtype)[None, None, None]


class AveragePool(nn.Module):
    """Mean over a window, without parameters."""

    kernel_size: int

    def __call__(self, x: Float[Array, "b row col d"]) -> Float[Array, "b row col d"]:
        return nn.avg_pool(x, (self.kernel_size, self.kernel_size), padding="SAME")


class GridTransformer(nn.Module):
    """A transformer block over all places of the grid."""

    num_heads: int
    mlp_ratio: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b row col d"]) -> Float[Array, "b row col d"]:
        _, height, width, dim = x.shape
        position = posemb.sincos((height, width), dim)[None, 1:]
        tokens = x.reshape(-1, height * width, dim) + position.astype(self.dtype)
        block = layers.Block(
            dim, self.num_heads, self.mlp_ratio, dtype=self.dtype, name="block"
        )
        return block(tokens).reshape(x.shape)


class ConvNeXt(nn.Module):
    """A ConvNeXt block, without layer scale: it is the only one."""

    kernel_size: int
    mlp_ratio: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b row col d"]) -> Float[Array, "b row col d"]:
        _, height, width, dim = x.shape
        mixed = DepthwiseConv(self.kernel_size, self.dtype, name="conv")(x)
        tokens = mixed.reshape(-1, height * width, dim)
        tokens = layers.LayerNorm(self.dtype, name="norm")(tokens)
        tokens = layers.Mlp(dim, self.mlp_ratio, self.dtype, name="mlp")(tokens)
        return x + tokens.reshape(x.shape)


VISIBLE = ("decoder", "encoder", "zeros")


class Aggregator(nn.Module):
    """Makes the thrown patches' tokens of those around them, with a `mixer`.

    Attributes:
      visible: what lies at visible places: the decoder's outputs there ("decoder"), the
        features that its last block attends to, projected ("encoder"), or "zeros".
      rewrites_retained: retained places take the aggregator's output, too.
      resizes: its parameters fit any grid.
    """

    dim: int
    grid: tuple[int, int]
    visible: str = "encoder"
    rewrites_retained: bool = False
    dtype: DTypeLike = jnp.float32

    resizes = True

    def __post_init__(self):
        parts.check_choice("aggregator.visible", self.visible, VISIBLE)
        super().__post_init__()

    def make_mixer(self) -> nn.Module:
        """Returns the layer that mixes the places of a grid."""
        raise NotImplementedError

    def setup(self):
        self.mixer = self.make_mixer()
        if self.visible == "encoder":
            self.visible_embed = layers.Dense(self.dim, self.dtype)

    def __call__(
        self, tokens: Tokens, ids: masking.TokenIds, context: Tokens | None
    ) -> Tokens:
        """Returns the tokens that it is given and, behind them, those of `ids.thrown`.

        Args:
          tokens: the decoder's: of visible patches, if it has them, and of `ids.pred`.
          context: what the decoder's last block attends to.
        """
        mixed = self.mixer(self.lay_out(tokens, ids, context))
        mixed = Tokens(mixed.reshape(len(mixed), -1, self.dim), None, self.grid)
        if self.rewrites_retained:
            tokens = tokens.with_values(mixed.at(tokens.ids))
        thrown = mixed.at(ids.thrown)
        return tokens.replace(
            sequence=jnp.concatenate([tokens.sequence, thrown], axis=1),
            ids=jnp.concatenate([tokens.ids, ids.thrown], axis=1),
        )

    def lay_out(
        self, tokens: Tokens, ids: masking.TokenIds, context: Tokens | None
    ) -> Float[Array, "b row col d"]:
        """Puts retained and visible tokens at their places, zeros elsewhere."""
        if self.visible == "decoder":
            return tokens.laid_out()
        retained = tokens.behind(tokens.num - ids.pred.shape[1])
        if self.visible == "zeros":
            return retained.laid_out()
        visible = self.visible_embed(context.values)
        return Tokens(
            jnp.concatenate([visible, retained.values], axis=1),
            jnp.concatenate([context.ids, retained.ids], axis=1), self.grid,
        ).laid_out()


class _Windows(Aggregator):
    """An aggregator that looks at a window around each place.

    Attributes:
      kernel_size: side of the window, odd.
    """

    kernel_size: int = 7  # PR-MIM, section 3.2

    def __post_init__(self):
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"aggregator.kernel_size={self.kernel_size} has no middle; take an odd "
                "number, such as 7."
            )
        super().__post_init__()


class ConvAggregator(_Windows):
    """The paper's: a depth-wise convolution."""

    def make_mixer(self) -> nn.Module:
        return DepthwiseConv(self.kernel_size, self.dtype)


class PoolAggregator(_Windows):
    """The mean over the window."""

    def make_mixer(self) -> nn.Module:
        return AveragePool(self.kernel_size)


class ConvNeXtAggregator(_Windows, kw_only=True):
    """A ConvNeXt block; `mlp_ratio` is the decoder's."""

    mlp_ratio: float

    def make_mixer(self) -> nn.Module:
        return ConvNeXt(self.kernel_size, self.mlp_ratio, self.dtype)


class TransformerAggregator(Aggregator, kw_only=True):
    """A transformer block; heads and `mlp_ratio` are the decoder's.

    Its positions are those of the grid that it was trained on.
    """

    num_heads: int
    mlp_ratio: float

    resizes = False

    def make_mixer(self) -> nn.Module:
        return GridTransformer(self.num_heads, self.mlp_ratio, self.dtype)


AGGREGATORS = {
    "none": None,
    "conv": ConvAggregator,
    "convnext": ConvNeXtAggregator,
    "pool": PoolAggregator,
    "transformer": TransformerAggregator,
}
