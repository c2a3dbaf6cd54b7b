"""A candidate for short sequences on a GPU: a program holds all keys of a head at once.

cuDNN's kernels go through the keys block by block with a running maximum, as long
sequences need it; of ours a program can hold them all. So here a program of the forward
pass takes a block of queries of one head of an image and every key; one of the backward
pass goes through the blocks of queries and sums the gradients of keys and values. It
needs nothing from the forward pass but its inputs, with P the weights and G the
gradient of the output O = P V:

    dV = P^T G,   dS = P * (G V^T - rowsum(P * G V^T)),   dQ = dS K,   dK = dS^T Q.

Written in Pallas for Triton, whose blocks have powers of two for extents: 50 keys take
the room of 64, 197 that of 256, and what is outside is masked. bfloat16 only, no bias.

It is no part of the library: benchmarks.gpu compares it with cuDNN on a GPU, and it
joins crossmae_jax/ops only if it is faster there; then it must also be shared over the
devices of a mesh, as the TPU's kernels are, and JAX calls the Triton backend of Pallas
deprecated (0.11.2): what wins would be written for Mosaic GPU. Tests run it step by
step ("interpret"), and `make test-gpu-compile` compiles it for an H200.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16

_KEYS = 256  # most keys: logits of 64 queries take 64 KiB, as does the sum for dK or dV
_QUERIES = 64  # most queries of a block


class _Sizes(NamedTuple):
    """Extents of a problem, and of the blocks of its programs, powers of two."""

    queries: int
    keys: int
    num_heads: int
    dim: int
    rows: int
    columns: int
    width: int

    @classmethod
    def of(cls, q, k):
        _, queries, num_heads, dim = q.shape
        keys = k.shape[1]
        rows = min(max(pl.next_power_of_2(queries), 16), _QUERIES)
        columns = max(pl.next_power_of_2(keys), 16)
        width = max(pl.next_power_of_2(dim), 16)
        return cls(queries, keys, num_heads, dim, rows, columns, width)

    @property
    def blocks(self) -> int:
        """The number of blocks of queries."""
        return pl.cdiv(self.queries, self.rows)


def attention(
    q: BFloat16[Array, "b q h d"],
    k: BFloat16[Array, "b k h d"],
    v: BFloat16[Array, "b k h d"],
    bias: None = None,
    *,
    interpret: bool = False,
) -> BFloat16[Array, "b q h d"]:
    """Computes attention by the kernels, or raises NotImplementedError.

    Args:
      interpret: whether to run the kernels step by step, which any platform can.
    """
    if bias is not None:
        raise NotImplementedError("The Triton kernels take no bias.")
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(
            f"The Triton kernels take bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if k.shape[1] > _KEYS:
        raise NotImplementedError(
            f"The Triton kernels take up to {_KEYS} keys, not {k.shape[1]}."
        )
    return _attention(q, k, v, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, interpret):
    sizes = _Sizes.of(q, k)
    queries = pl.BlockSpec(
        (None, sizes.rows, None, sizes.width), lambda b, h, i: (b, i, h, 0)
    )
    keys = pl.BlockSpec(
        (None, sizes.columns, None, sizes.width), lambda b, h, i: (b, 0, h, 0)
    )
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes),
        grid=(q.shape[0], sizes.num_heads, sizes.blocks),
        in_specs=[queries, keys, keys],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_options(sizes),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v)


def _attention_fwd(q, k, v, interpret):
    return _attention(q, k, v, interpret), (q, k, v)


def _attention_bwd(interpret, saved, g):
    q, k, v = saved
    sizes = _Sizes.of(q, k)
    queries, keys = (
        pl.BlockSpec((None, length, None, sizes.width), lambda b, h: (b, 0, h, 0))
        for length in (sizes.blocks * sizes.rows, sizes.columns)
    )
    return tuple(pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes),
        grid=(q.shape[0], sizes.num_heads),
        in_specs=[queries, keys, keys, queries],
        out_specs=[queries, keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in saved],
        compiler_params=_options(sizes),
        interpret=interpret,
        name="attention_backward",
    )(q, k, v, g))


_attention.defvjp(_attention_fwd, _attention_bwd)


def _options(sizes):
    # Two stages would load the next block of queries ahead; most shapes have one.
    return plgpu.CompilerParams(num_warps=4 if sizes.columns <= 64 else 8, num_stages=1)


def _inside(start, rows, length, sizes):
    """Returns which numbers of a block, from a row on, belong to the array."""
    row = start + jnp.arange(rows)
    return (row < length)[:, None] & (jnp.arange(sizes.width) < sizes.dim)[None, :]


def _read(ref, inside):
    return plgpu.load(ref, mask=inside, other=0.0)


def _weights(q, k, sizes):
    logits = plgpu.dot(q, k.T) * (sizes.dim ** -0.5 * math.log2(math.e))
    is_key = jnp.arange(sizes.columns) < sizes.keys
    logits = jnp.where(is_key[None, :], logits, -jnp.inf)
    weights = jnp.exp2(logits - logits.max(-1)[:, None])
    return weights * (1 / weights.sum(-1))[:, None]


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, sizes):
    keys = _inside(0, sizes.columns, sizes.keys, sizes)
    k, v = _read(k_ref, keys), _read(v_ref, keys)
    rows = _inside(pl.program_id(2) * sizes.rows, sizes.rows, sizes.queries, sizes)
    weights = _weights(_read(q_ref, rows), k, sizes)
    out = plgpu.dot(weights.astype(v.dtype), v)
    plgpu.store(out_ref, out.astype(out_ref.dtype), mask=rows)


def _backward_kernel(q_ref, k_ref, v_ref, g_ref, dq_ref, dk_ref, dv_ref, *, sizes):
    keys = _inside(0, sizes.columns, sizes.keys, sizes)
    k, v = _read(k_ref, keys), _read(v_ref, keys)

    def add(block, sums):
        start = block * sizes.rows
        rows = _inside(start, sizes.rows, sizes.queries, sizes)
        here = pl.ds(start, sizes.rows)
        q, g = _read(q_ref.at[here, :], rows), _read(g_ref.at[here, :], rows)
        weights = _weights(q, k, sizes)
        dweights = plgpu.dot(g, v.T)
        dlogits = weights * (dweights - (weights * dweights).sum(-1)[:, None])
        scaled = (dlogits * sizes.dim ** -0.5).astype(q.dtype)
        dq = plgpu.dot(scaled, k).astype(dq_ref.dtype)
        plgpu.store(dq_ref.at[here, :], dq, mask=rows)
        dk, dv = sums
        return (
            dk + plgpu.dot(scaled.T, q),
            dv + plgpu.dot(weights.astype(g.dtype).T, g),
        )

    zeros = jnp.zeros((sizes.columns, sizes.width), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, sizes.blocks, add, (zeros, zeros))
    plgpu.store(dk_ref, dk.astype(dk_ref.dtype), mask=keys)
    plgpu.store(dv_ref, dv.astype(dv_ref.dtype), mask=keys)
