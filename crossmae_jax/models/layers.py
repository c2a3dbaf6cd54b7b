"""The layers of every transformer here: patch projection, attention, MLP, blocks.

Pre-norm blocks with exact (erf) GELU and, other than Swin's, norms of epsilon 1e-6, as
in MAE (arXiv 2111.06377, appendix A.1). Queries, keys and values of self-attention come
from ONE matrix, keys and values of cross-attention from another, as in the PyTorch
references: Xavier initialisation then sees the fused matrix, whose bound is smaller by
sqrt(2) than that of separate ones.

`dtype` is the compute type. Parameters, norms and softmax stay float32; norms take the
variance of centred values, since E[x^2] - E[x]^2 cancels when activations have a mean.
With bfloat16 everything else is bfloat16, the residual stream and the gradients of
matrix products included (PyTorch's autocast keeps the residual stream in float32).
"""

from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from crossmae_jax import ranges
from crossmae_jax.distributed import sharding
from crossmae_jax.models.init_schemes import INITS, Init, xavier
from crossmae_jax.ops import attention as attention_ops
from crossmae_jax.ops import gelu as gelu_ops
from crossmae_jax.ops import layer_norm as layer_norm_ops

# What the gradient pass computes again instead of keeping it. "selective": norms, GELU
# and mixtures of feature maps, which are cheap; inputs and results of the matrix
# products are kept. "full": everything but the input of each block.
REMATS = ("none", "selective", "full")

# Which of queries, keys and values have a bias.
QKV_BIASES = {
    "qkv": (True, True, True),
    "qv": (True, False, True),  # a key's is the same for all keys of a query
    "none": (False, False, False),
}


def check_blocks(
    part: str, *, dim: int, depth: int, num_heads: int, mlp_ratio: float
) -> None:
    """Raises ValueError for blocks that cannot be: no width, or not one of its heads.
    """
    ranges.check(f"model.{part}.dim", dim, least=1)
    ranges.check(f"model.{part}.depth", depth, least=1)
    ranges.check(f"model.{part}.mlp_ratio", mlp_ratio, above=0)
    if num_heads < 1 or dim % num_heads:
        raise ValueError(
            f"{part}.dim={dim} does not divide into {part}.num_heads={num_heads}."
        )


class Dense(nn.Module):
    """Linear layer, drawn as in MAE: weights Xavier-uniform, bias 0."""

    features: int
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", self.bias_init, shape[1:]).astype(self.dtype)
        out = x.astype(self.dtype) @ sharding.gathered(kernel, self.dtype)
        return out + bias.reshape((1,) * (x.ndim - 1) + shape[1:])


class LayerNorm(nn.Module):
    """Layer norm with float32 statistics."""

    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        return layer_norm_ops.layer_norm(x, scale, bias, self.epsilon, self.dtype)


class PatchEmbed(nn.Module):
    """Linear projection of patch vectors.

    Equal to a convolution with kernel and stride of one patch, but takes vectors, so
    that only the patches in use are projected.

    Attributes:
      weight_init: one of `INITS`.
      norm_epsilon: of a norm behind it; None for none.
    """

    dim: int
    dtype: DTypeLike = jnp.float32
    weight_init: str = "xavier"
    norm_epsilon: float | None = None

    @nn.compact
    def __call__(self, patches: Shaped[Array, "b n t"]) -> Float[Array, "b n d"]:
        drawn = INITS[self.weight_init](1, patch_dim=patches.shape[-1])
        project = Dense(
            self.dim, self.dtype, drawn.patch_kernel, drawn.patch_bias, name="proj"
        )
        if self.norm_epsilon is None:
            return project(patches)
        return LayerNorm(self.dtype, self.norm_epsilon, name="norm")(project(patches))


class SplitDense(nn.Module):
    """One linear layer whose result comes in equal parts.

    The parts are products with parts of the matrix: cutting the matrix is cheap,
    cutting the result would copy every activation.

    Attributes:
      biased: which of the parts have a bias.
    """

    features: int
    biased: tuple[bool, ...]
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b n f"]]:
        parts, num_biased = len(self.biased), sum(self.biased)
        kernel = self.param(
            "kernel", self.kernel_init, (x.shape[-1], parts * self.features)
        )
        x, whole = x.astype(self.dtype), sharding.gathered(kernel, self.dtype)
        results = [x @ w for w in jnp.split(whole, parts, axis=1)]
        if not num_biased:
            return results
        bias = self.param(
            "bias", nn.initializers.zeros_init(), (num_biased * self.features,)
        )
        bias = bias.astype(self.dtype)[None, None]
        biases = iter(jnp.split(bias, num_biased, axis=2))
        return [
            result + next(biases) if biased else result
            for result, biased in zip(results, self.biased, strict=True)
        ]


class Attention(nn.Module):
    """Multi-head attention of `x` over itself, or over `context` when it is given.

    The context may have another width; keys and values are projected from it directly.
    It comes in two halves, `attend(*project(x))`, because a block computes the first
    again where it saves memory.

    Attributes:
      qkv_bias: one of `QKV_BIASES`, of self-attention.
      drawn: how the matrices are.
    """

    dim: int
    num_heads: int
    dtype: DTypeLike = jnp.float32
    qkv_bias: str = "qkv"
    drawn: Init = xavier(1)

    in_windows = False  # all queries see all keys

    def setup(self):
        # qkv is used, or q and kv: a layer that is not called has no parameters.
        biased, matrix = QKV_BIASES[self.qkv_bias], self.drawn.kernel
        self.qkv = SplitDense(self.dim, biased, self.dtype, matrix)
        self.q = Dense(self.dim, self.dtype, matrix)
        self.kv = SplitDense(self.dim, (True, True), self.dtype, matrix)
        self.proj = Dense(self.dim, self.dtype, self.drawn.output)

    def project(
        self, x: Float[Array, "b q d"], context: Float[Array, "b k e"] | None = None
    ) -> list[Float[Array, "b n d"]]:
        """Returns queries, keys and values."""
        if context is None:
            return self.qkv(x)
        return [self.q(x), *self.kv(context)]

    def attend(
        self,
        queries: Float[Array, "b q d"],
        keys: Float[Array, "b k d"],
        values: Float[Array, "b k d"],
        bias: Float[Array, "#b #h q k"] | None = None,
    ) -> Float[Array, "b q d"]:
        """Attends with what `project` returned, the bias added to the logits."""
        q, k, v = (
            einops.rearrange(x, "b n (h d) -> b n h d", h=self.num_heads)
            for x in (queries, keys, values)
        )
        out = attention_ops.attention(q, k, v, bias=bias)
        return self.proj(einops.rearrange(out, "b q h d -> b q (h d)"))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    dim: int
    mlp_ratio: float
    dtype: DTypeLike = jnp.float32
    drawn: Init = xavier(1)

    def setup(self):
        hidden = int(self.dim * self.mlp_ratio)
        self.fc1 = Dense(hidden, self.dtype, self.drawn.kernel)
        self.fc2 = Dense(self.dim, self.dtype, self.drawn.output)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.contract(self.fc1(x))

    def contract(self, hidden: Float[Array, "b n m"]) -> Float[Array, "b n d"]:
        """Applies the GELU and the second layer."""
        return self.fc2(gelu_ops.gelu(hidden))


class Block(nn.Module):
    """Self-attention and MLP, each on a norm of the residual stream.

    Stochastic depth (arXiv 1603.09382): with a key for the collection "drop_path", each
    of the two branches is left out for each sample with probability `drop_path`, and
    divided by the probability of staying where it stays. Without one it never is.

    Attributes:
      remat: one of `REMATS`.
      qkv_bias: one of `QKV_BIASES`.
      layer_scale: what each channel of a branch is multiplied with at the start (CaiT,
        arXiv 2103.17239, section 2), and trained from there; None for nothing.
      drawn: how the matrices are.
    """

    dim: int
    num_heads: int
    mlp_ratio: float
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    drop_path: float = 0.0
    qkv_bias: str = "qkv"
    layer_scale: float | None = None
    drawn: Init = xavier(1)
    norm_epsilon: float = 1e-6

    def make_attention(self) -> Attention:
        """Returns the attention."""
        return Attention(
            self.dim, self.num_heads, self.dtype, self.qkv_bias, self.drawn
        )

    def setup(self):
        self.norm1 = LayerNorm(self.dtype, self.norm_epsilon)
        self.attn = self.make_attention()
        self.norm2 = LayerNorm(self.dtype, self.norm_epsilon)
        self.mlp = Mlp(self.dim, self.mlp_ratio, self.dtype, self.drawn)
        if self.layer_scale is not None:
            start = nn.initializers.constant(self.layer_scale)
            self.gamma_1 = self.param("gamma_1", start, (self.dim,))
            self.gamma_2 = self.param("gamma_2", start, (self.dim,))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        bias: Float[Array, "#b #h n n"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Applies the block; the bias is added to the logits of its attention."""
        return self.run(x, bias)

    def run(self, x: Float[Array, "b n d"], bias: Any) -> Float[Array, "b n d"]:
        """Applies the block; its attention knows what the bias is."""
        # Drawn outside of what is computed again: equal samples whatever `remat`.
        survival = self._survival(x.shape[0])
        return _again("full", self.remat, Block._run)(self, x, survival, bias)

    def _survival(self, num):
        """Returns a factor per sample for each branch; None keeps a branch as it is."""
        if self.drop_path == 0 or not self.has_rng("drop_path"):
            return None, None
        keep = 1 - self.drop_path
        kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, (2, num, 1, 1))
        return tuple(kept / keep)

    def _run(self, x, survival, bias):
        project = _again("selective", self.remat, Block._project)
        branch = self.attn.attend(*project(self, x), bias)
        x = x + _survived(self._scaled(branch, 1), survival[0])
        return x + _survived(self._scaled(_mlp(self, x), 2), survival[1])

    def _scaled(self, branch, number):
        if self.layer_scale is None:
            return branch
        gamma = self.gamma_1 if number == 1 else self.gamma_2
        return branch * gamma.astype(branch.dtype)[None, None]

    def _project(self, x):
        return self.attn.project(self.norm1(x))


class CrossBlock(nn.Module):
    """Cross-attention to a context, and MLP (arXiv 2401.14391, section 3.2).

    The context is used as it comes: it is normed where it is made. With
    `self_attention` the queries first attend to each other (the paper's ablation).

    Attributes:
      remat: one of `REMATS`.
    """

    dim: int
    num_heads: int
    mlp_ratio: float
    self_attention: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self):
        if self.self_attention:
            self.norm0 = LayerNorm(self.dtype)
            self.self_attn = Attention(self.dim, self.num_heads, self.dtype)
        self.norm1 = LayerNorm(self.dtype)
        self.cross_attn = Attention(self.dim, self.num_heads, self.dtype)
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(self.dim, self.mlp_ratio, self.dtype)

    def __call__(
        self, x: Float[Array, "b q d"], context: Float[Array, "b k e"]
    ) -> Float[Array, "b q d"]:
        return _again("full", self.remat, CrossBlock._run)(self, x, context)

    def _run(self, x, context):
        if self.self_attention:
            project = _again("selective", self.remat, CrossBlock._project_self)
            x = x + self.self_attn.attend(*project(self, x))
        project = _again("selective", self.remat, CrossBlock._project)
        x = x + self.cross_attn.attend(*project(self, x, context))
        return x + _mlp(self, x)

    def _project_self(self, x):
        return self.self_attn.project(self.norm0(x))

    def _project(self, x, context):
        return self.cross_attn.project(self.norm1(x), context)


def _again(mode, remat, function):
    """Returns the function, its inner values recomputed if `remat` is the mode."""
    return nn.remat(function) if remat == mode else function


def _survived(branch, factor):
    """Scales a branch in float32: bfloat16 would round the factor itself."""
    if factor is None:
        return branch
    return (factor * branch.astype(jnp.float32)).astype(branch.dtype)


def _mlp(block, x):
    """Returns what the MLP of a block adds to the residual stream."""
    expand = _again("selective", block.remat, lambda b, x: b.mlp.fc1(b.norm2(x)))
    contract = _again("selective", block.remat, lambda b, x: b.mlp.contract(x))
    return contract(block, expand(block, x))
