"""LocalMIM's decoders: one for each scale, small, of a block of the encoder each.

Each is MAE's decoder of one block on one of the contexts, and ends on a grid of its own
(LocalMIM, arXiv 2303.05251, section 3.2): its tokens are laid out on the grid of
patches, brought to the cells of its target, and projected.

    finer by 4    2 x 2 up, norm, GELU, 2 x 2 up      widths d/2, d/4
    finer by 2    2 x 2 up                            width d/2
    coarser by 2  mean of 2 x 2 patches

"2 x 2 up" is a transposed convolution of stride 2. Lower blocks of the encoder predict
finer cells.
"""

from collections.abc import Mapping

import einops
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import masking
from crossmae_jax.distributed import sharding
from crossmae_jax.masking import Asked
from crossmae_jax.models import init_schemes, layers
from crossmae_jax.models.decoder_mae import MAEDecoder
from crossmae_jax.ops import gelu as gelu_ops
from crossmae_jax.tokens import Tokens

FACTORS = (4, 2, 1, 0.5)  # cells along a side of a patch


class Upsample(nn.Module):
    """Makes four places of each: a transposed convolution, 2 x 2 of stride 2."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b row col d"]) -> Float[Array, "b row2 col2 o"]:
        drawn = init_schemes.bounded(4 * self.features)
        kernel = self.param("kernel", drawn, (x.shape[-1], 4 * self.features))
        bias = self.param("bias", drawn, (self.features,)).astype(self.dtype)
        out = x.astype(self.dtype) @ sharding.gathered(kernel, self.dtype)
        out = einops.rearrange(
            out, "b row col (p q o) -> b (row p) (col q) o", p=2, q=2
        )
        return out + bias[None, None, None]


class CellHead(nn.Module):
    """Predicts the cells of another grid from vectors that lie on that of patches."""

    factor: float
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b row col d"]) -> Float[Array, "b row2 col2 t"]:
        dim = x.shape[-1]
        if self.factor > 1:
            x = Upsample(dim // 2, self.dtype, name="up_0")(x)
        if self.factor == 4:
            x = gelu_ops.gelu(layers.LayerNorm(self.dtype, name="norm")(x))
            x = Upsample(dim // 4, self.dtype, name="up_1")(x)
        if self.factor < 1:
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        drawn = init_schemes.bounded(x.shape[-1])
        return layers.Dense(self.width, self.dtype, drawn, drawn, name="proj")(x)


class ScaleDecoder(MAEDecoder):
    """MAE's decoder, ending on the grid of its target's cells."""

    cells: tuple[int, int] = (1, 1)

    def make_prediction(self, width: int) -> nn.Module:
        """Returns what predicts so many values of each cell."""
        return CellHead(self.cells[0] / self.grid[0], width, self.dtype)

    def head(
        self, name: str, tokens: Tokens, ids: masking.TokenIds, asked: Asked
    ) -> Tokens:
        """Predicts every cell; visible patches lie among them."""
        normed = tokens.with_values(self.decoder_norm(tokens.values))
        cells = self.decoder_pred(normed.laid_out())
        values = einops.rearrange(cells, "b row col t -> b (row col) t")
        return Tokens(values, None, self.cells)


class LocalDecoder(nn.Module):
    """Decodes each target from a context of its own, or all of them from one.

    Attributes are those of `decoders.Decoder`, and:
      grids: rows and columns of each target's cells.
    """

    method = "LocalMIM"
    gives_visible = needs_masked = self_attention = True
    reads_masked = False

    widths: Mapping[str, int]
    grids: Mapping[str, tuple[int, int]]
    grid: tuple[int, int]
    dim: int = 256
    depth: int = 1
    num_heads: int = 8
    mlp_ratio: float = 4.0
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        for name, cells in self.grids.items():
            factors = {new / old for new, old in zip(cells, self.grid, strict=True)}
            if len(factors) > 1 or not factors <= set(FACTORS):
                raise ValueError(
                    f"{name} has {cells[0]}x{cells[1]} cells, but LocalMIM's decoder "
                    f"predicts {', '.join(map(str, FACTORS))} along the side of a "
                    f"patch, and there are {self.grid[0]}x{self.grid[1]} patches; set "
                    "config.target.cells to 1/4, 1/2, 1 or 2 patches."
                )
        super().__post_init__()

    @property
    def num_contexts(self) -> int:
        """One for each target."""
        return len(self.widths)

    def setup(self):
        self.scales = {
            name: ScaleDecoder(
                dim=self.dim, depth=self.depth, num_heads=self.num_heads,
                widths={name: width}, grid=self.grid, mlp_ratio=self.mlp_ratio,
                remat=self.remat, dtype=self.dtype, cells=self.grids[name],
            ) for name, width in self.widths.items()
        }

    def __call__(
        self, contexts: tuple[Tokens, ...], ids: masking.TokenIds, asked: Asked
    ) -> dict[str, Tokens]:
        if len(contexts) == 1:
            contexts = contexts * self.num_contexts
        decoded = {}
        for context, scale in zip(contexts, self.scales.values(), strict=True):
            decoded |= scale((context,), ids, asked)
        return decoded

    def head(
        self, name: str, tokens: Tokens, ids: masking.TokenIds, asked: Asked
    ) -> Tokens:
        """Predicts every cell of a target's grid."""
        return self.scales[name].head(name, tokens, ids, asked)
