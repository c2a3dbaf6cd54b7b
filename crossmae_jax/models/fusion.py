"""What each decoder block attends to, made of the encoder's feature maps.

Inter-block attention (CrossMAE, arXiv 2401.14391, section 3.4): with feature maps f_j,
decoder block i attends to

    context_i = LayerNorm_i( sum_j  W[j, i] f_j )

W is one learned matrix, shared by all tokens and channels, without softmax or bias.
The paper draws W with standard deviation 1/sqrt(maps); its released code then
re-initialises every linear layer, so that W is in effect Xavier-uniform, and so it is
here. The norm follows the mixture; the encoder has no norm of its own.

Multi-level feature fusion (MFF, arXiv 2308.00261): one context for all of the decoder,
of chosen blocks' outputs f_1 ... f_m, the last of them as it is,

    context = LayerNorm( sum_j  softmax(w)_j P_j(f_j) ),    P_m = identity

with a linear layer P_j for each other block and one number w_j, 1 at the start.

Taps (LocalMIM, arXiv 2303.05251): a context for each of some blocks, its output normed.

Adapter (TEC, arXiv 2210.11016): one context of the outputs of all blocks, the last one
behind the encoder's norm. Their channels, one block after the other, are normed
together and cut into groups g of equally many blocks,

    context = LayerNorm( sum_g  y_g + MLP_g(y_g) ),    y_g = P_g(LayerNorm(f)_g)
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax import ranges
from crossmae_jax.models import layers
from crossmae_jax.ops import gelu as gelu_ops
from crossmae_jax.tokens import Encoded, Tokens


@runtime_checkable
class Fusion(Protocol):
    """Makes contexts for the decoder of what the encoder returns.

    Attributes:
      method: what people call a model with it; None: after its decoder.
      final_norm: the encoder that it reads ends in a norm.
      used_maps: positions in `Encoded.maps` of those that the decoder is trained on,
        ascending: 0 is the encoder's input, 1 is block 0. None where it takes the
        encoder's output, for which every block is trained.
      num_contexts: one for all blocks of the decoder, or one for each.
      mixes: it has parameters of its own.
    """

    method: str | None
    final_norm: bool
    used_maps: tuple[int, ...] | None
    num_contexts: int
    mixes: bool

    def __call__(self, encoded: Encoded) -> tuple[Tokens, ...]:
        """Returns the contexts."""
        ...

    def shares(self, params: Any) -> Float[Array, "i maps"]:
        """Returns how much of each of `used_maps` its parameters put into each context.

        Of the output alone where there are none.
        """
        ...


class Last(nn.Module):
    """Hands the decoder the encoder's output as its only context.

    Attributes are those of `Fusion`.
    """

    method = None
    final_norm = True
    used_maps = None
    num_contexts = 1
    mixes = False

    def __call__(self, encoded: Encoded) -> tuple[Tokens, ...]:
        return (encoded.last,)

    def shares(self, params: Any) -> Float[Array, "1 1"]:
        """Returns that all of it is the output."""
        return jnp.ones((1, 1))


def resolve_maps(
    blocks: tuple[int, ...] | None, *, depth: int, include_input: bool
) -> tuple[int, ...]:
    """Returns positions in `Encoded.maps`: 0 is the encoder input, 1 block 0.

    Args:
      blocks: block numbers, in any order, negative ones counted from the end; None
        takes all. The maps are always used in ascending order.

    Raises:
      ValueError: if a block does not exist or is named twice.
    """
    if blocks is None:
        blocks = tuple(range(depth))
    resolved = sorted(block + depth if block < 0 else block for block in blocks)
    if not resolved or resolved[0] < 0 or resolved[-1] >= depth:
        raise ValueError(
            f"fusion.maps={tuple(blocks)} must name blocks of an encoder of depth "
            f"{depth}: {-depth} to {depth - 1}; leave it unset for all of them."
        )
    if len(set(resolved)) < len(resolved):
        raise ValueError(
            f"fusion.maps={tuple(blocks)} names a block twice (blocks {resolved}); "
            "name each once."
        )
    return (0,) * include_input + tuple(block + 1 for block in resolved)


class InterBlockAttention(nn.Module):
    """Mixes the chosen feature maps, once for each decoder block.

    Attributes are those of `Fusion`, and:
      encoder_depth: number of blocks that there are to choose from.
      num_contexts: number of mixtures.
      maps: blocks to mix, as `resolve_maps` takes them; None mixes all.
      input: the input of the first block is mixed in, too.
      remat: one of `layers.REMATS`; unless "none" the gradient pass mixes again.
    """

    encoder_depth: int
    num_contexts: int
    maps: tuple[int, ...] | None = None
    input: bool = True
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    method = None
    final_norm = False
    mixes = True

    def __post_init__(self):
        _ = self.used_maps  # refuses blocks that there are not
        super().__post_init__()

    @property
    def used_maps(self) -> tuple[int, ...]:
        """Positions of the maps that are mixed, see `Fusion`."""
        return resolve_maps(
            self.maps, depth=self.encoder_depth, include_input=self.input
        )

    def setup(self):
        self.kernel = self.param(
            "kernel", nn.initializers.xavier_uniform(),
            (len(self.used_maps), self.num_contexts),
        )
        self.dec_norms = [
            layers.LayerNorm(self.dtype) for _ in range(self.num_contexts)
        ]

    def __call__(self, encoded: Encoded) -> tuple[Tokens, ...]:
        normed_mixtures = InterBlockAttention._normed_mixtures
        if self.remat != "none":
            normed_mixtures = nn.remat(normed_mixtures)
        maps = tuple(encoded.maps[j].sequence for j in self.used_maps)
        place = encoded.maps[0]
        return tuple(place.replace(sequence=x) for x in normed_mixtures(self, maps))

    def shares(self, params: Any) -> Float[Array, "i maps"]:
        """Returns W, a row for each context."""
        return params["kernel"].T

    def _normed_mixtures(self, maps):
        mixtures = self.mix(maps)
        return tuple(norm(x) for norm, x in zip(self.dec_norms, mixtures, strict=True))

    def mix(
        self, maps: tuple[Float[Array, "b k d"], ...]
    ) -> Float[Array, "i b k d"]:
        """Returns the mixtures before their norms, decoder block first.

        Args:
          maps: those that are mixed, class token included.
        """
        chosen = jnp.stack(maps)
        return jnp.einsum("jbkd,ji->ibkd", chosen, self.kernel.astype(self.dtype))


class _OfChosen(nn.Module):
    """A fusion of blocks that must be named.

    Attributes:
      encoder_depth: number of blocks that there are to choose from.
      maps: blocks, as `resolve_maps` takes them.
    """

    encoder_depth: int
    maps: tuple[int, ...] | None = None
    dtype: DTypeLike = jnp.float32

    final_norm = False
    mixes = True
    unnamed = ""  # what is said where no blocks are named

    def __post_init__(self):
        if self.maps is None:
            raise ValueError(self.unnamed)
        _ = self.used_maps  # refuses blocks that there are not
        super().__post_init__()

    @property
    def used_maps(self) -> tuple[int, ...]:
        """Positions of the maps that are used, see `Fusion`."""
        return resolve_maps(self.maps, depth=self.encoder_depth, include_input=False)


class MultiLevel(_OfChosen):
    """Mixes projections of shallow blocks into the last one, class token included.

    Attributes are those of `Fusion` and of `_OfChosen`.
    """

    method = "MFF"
    num_contexts = 1
    unnamed = (
        "fusion.kind='multi_level' mixes chosen blocks; set config.model.fusion.maps, "
        "for ViT-B to (0, 2, 4, 6, 8, 11)."
    )

    @nn.compact
    def __call__(self, encoded: Encoded) -> tuple[Tokens, ...]:
        *shallow, last = (encoded.maps[j].sequence for j in self.used_maps)
        projected = [
            layers.Dense(last.shape[-1], self.dtype, name=f"proj_{i}")(x)
            for i, x in enumerate(shallow)
        ]
        # Of four axes as published, so that it decays as matrices do.
        weights = self.param(
            "weights", nn.initializers.ones_init(), (len(self.used_maps), 1, 1, 1)
        )
        shares = jax.nn.softmax(weights, axis=0).astype(self.dtype)
        mixture = sum(s * x for s, x in zip(shares, [*projected, last], strict=True))
        normed = layers.LayerNorm(self.dtype, name="norm")(mixture)
        return (encoded.maps[0].replace(sequence=normed),)

    def shares(self, params: Any) -> Float[Array, "1 maps"]:
        """Returns the shares of the projected maps, which sum to 1."""
        return jax.nn.softmax(params["weights"], axis=0).reshape(1, -1)


class Taps(_OfChosen):
    """Hands on the outputs of chosen blocks, each with a norm of its own.

    Attributes are those of `Fusion` and of `_OfChosen`; the lowest block is the first
    context.
    """

    method = None
    unnamed = (
        "fusion.kind='taps' hands on chosen blocks; set config.model.fusion.maps, as "
        "LocalMIM does to (1, 3, -3, -1)."
    )

    @property
    def num_contexts(self) -> int:
        """One for each of the maps."""
        return len(self.used_maps)

    @nn.compact
    def __call__(self, encoded: Encoded) -> tuple[Tokens, ...]:
        maps = (encoded.maps[j] for j in self.used_maps)
        return tuple(
            each.replace(
                sequence=layers.LayerNorm(self.dtype, name=f"norms_{i}")(each.sequence)
            ) for i, each in enumerate(maps)
        )

    def shares(self, params: Any) -> Float[Array, "i maps"]:
        """Returns that each context is one map."""
        return jnp.eye(self.num_contexts)


class _GroupMlp(nn.Module):
    """An MLP whose width is given, and no ratio."""

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        hidden = layers.Dense(self.hidden, self.dtype, name="fc1")(x)
        return layers.Dense(x.shape[-1], self.dtype, name="fc2")(gelu_ops.gelu(hidden))


class Adapter(nn.Module):
    """Makes one context of the outputs of all blocks, in groups of neighbours.

    Attributes are those of `Fusion`, and:
      encoder_depth: number of blocks.
      groups: number of groups, which divides it.
      hidden: width of the MLP of each.
    """

    encoder_depth: int
    groups: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    method = used_maps = None
    final_norm = mixes = True
    num_contexts = 1

    def __post_init__(self):
        ranges.check("model.fusion.groups", self.groups, least=1)
        ranges.check("model.fusion.hidden", self.hidden, least=1)
        if self.encoder_depth % self.groups:
            raise ValueError(
                f"fusion.groups={self.groups} does not divide the encoder's "
                f"{self.encoder_depth} blocks; set config.model.fusion.groups to a "
                "divisor, such as a third of them."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, encoded: Encoded) -> tuple[Tokens, ...]:
        last = encoded.last.sequence
        outputs = [*(each.sequence for each in encoded.maps[1:-1]), last]
        normed = layers.LayerNorm(self.dtype, name="adap_before")(
            jnp.concatenate(outputs, axis=-1)
        )
        dim, total = last.shape[-1], 0
        for i, group in enumerate(jnp.split(normed, self.groups, axis=-1)):
            y = layers.Dense(dim, self.dtype, name=f"fuse_fcs_{i}")(group)
            mlp = _GroupMlp(self.hidden, self.dtype, name=f"adap_mlps_{i}")
            total = total + y + mlp(y)
        context = layers.LayerNorm(self.dtype, name="adap_after")(total)
        return (encoded.last.replace(sequence=context),)

    def shares(self, params: Any) -> Float[Array, "1 1"]:
        """Returns that all of it is the output, for which every block is trained."""
        return jnp.ones((1, 1))


FUSIONS = {
    "adapter": Adapter, "inter_block": InterBlockAttention, "last": Last,
    "multi_level": MultiLevel, "taps": Taps,
}
