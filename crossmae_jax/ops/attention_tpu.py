"""Attention of short sequences on a TPU: the keys of a head lie on the chip as a whole.

With every logit of a query in one place the softmax needs no running maximum. Nor does
the backward pass need anything from the forward pass but its inputs: it computes the
weights P again, and with G the gradient of the output O = P V,

    dV = P^T G,   dS = P * (G V^T - rowsum(P * G V^T)),   dQ = dS K,   dK = dS^T Q,

dQ and dK scaled as the logits are. FlashAttention (arXiv 2205.14135) saves O and the
log-sum-exp instead, because it never holds a row of P.

Heads stay side by side in the last axis, as the projections leave them, and a program
takes as many as fill whole lanes (128 numbers), of several images. So neither arrays
nor programs waste half of each lane on heads of 64, and nothing is transposed outside.
The keys of a block are all keys: the compiler masks the rows that its tiles add.
Queries beyond 256 come in several blocks, whose last one has a tail; it is zeroed here.

The compiler cannot share a kernel's work over devices by itself, and on TPUs it does
not ask `custom_partitioning` (https://github.com/jax-ml/jax/issues/38196). So a batch
over several devices needs the mesh in use when the model is traced
(`parallel.within`), and each device takes its part of the images.
"""

import functools
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

_LANES = 128  # numbers in a row of a TPU's tile
_QUERIES = 256  # most queries of a block
_IMAGES = 16  # most images of a program: the compiler unrolls them
_MEMORY = 8 * 2**20  # bytes of a program of several images, by the estimate below
_MEMORY_OF_ONE = 32 * 2**20  # a TPU v5p has 64 MiB on the chip for all of a program


def attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    bias: Float[Array, "#b #h q k"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b q h d"]:
    """Computes attention by the kernels, or raises NotImplementedError.

    Args:
      interpret: whether to run the kernels step by step, which any platform can.
    """
    check(q, k, v, bias)
    num_heads = q.shape[2]
    if bias is not None:
        bias = jnp.broadcast_to(bias, (bias.shape[0], num_heads, *bias.shape[2:]))
    flat = (_flat(q), _flat(k), _flat(v))
    out = _attention(*flat, bias, num_heads, mesh_in_use(), interpret)
    return einops.rearrange(out, "b q (h d) -> b q h d", h=num_heads)


def check(q, k, v, bias) -> None:
    """Raises NotImplementedError, with the reason, for what the kernels do not take."""
    length, num_heads, dim = q.shape[1:]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            "The TPU kernels take float32 or bfloat16, one type for all, but"
            f" q={q.dtype}, k={k.dtype}, v={v.dtype}."
        )
    if dim % 8 or dim > _LANES:
        raise NotImplementedError(
            f"The TPU kernels take head sizes of a multiple of 8 up to {_LANES},"
            f" not {dim}."
        )
    if bias is not None and length > _QUERIES:
        raise NotImplementedError(
            f"The TPU kernels take a bias with up to {_QUERIES} queries, not {length}."
        )
    mesh = mesh_in_use()
    if mesh is not None and q.shape[0] % mesh.size:
        raise NotImplementedError(
            f"The TPU kernels need a batch of a multiple of the mesh's {mesh.size}"
            f" devices, not {q.shape[0]}."
        )
    needed = _bytes_per_image(_Sizes.of(q, k, num_heads, dim, bias))
    if needed > _MEMORY_OF_ONE:
        raise NotImplementedError(
            f"The TPU kernels keep all keys on the chip: {length} x {k.shape[1]} with"
            f" {num_heads} heads of {dim} needs {needed / 2**20:.0f} MiB, more than"
            f" {_MEMORY_OF_ONE // 2**20}."
        )


def _flat(x):
    return einops.rearrange(x, "b n h d -> b n (h d)")


def mesh_in_use() -> AbstractMesh | None:
    """Returns the mesh whose devices the compiler shares work over; None for one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or AxisType.Auto not in mesh.axis_types:
        return None  # one device, or what runs now is already the part of one
    return mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, bias, num_heads, mesh, interpret):
    run = functools.partial(_forward, num_heads=num_heads, interpret=interpret)
    arrays = (q, k, v) if bias is None else (q, k, v, bias)
    return _on_devices(run, arrays, _bias_kind(bias), mesh)[0]


def _attention_fwd(q, k, v, bias, num_heads, mesh, interpret):
    return _attention(q, k, v, bias, num_heads, mesh, interpret), (q, k, v, bias)


def _attention_bwd(num_heads, mesh, interpret, saved, g):
    q, k, v, bias = saved
    run = functools.partial(_backward, num_heads=num_heads, interpret=interpret)
    arrays = (q, k, v, g) if bias is None else (q, k, v, g, bias)
    dq, dk, dv, *dbias = _on_devices(run, arrays, _bias_kind(bias), mesh)
    return dq, dk, dv, dbias[0].astype(bias.dtype) if dbias else None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _bias_kind(bias):
    if bias is None:
        return None
    return "shared" if bias.shape[0] == 1 else "per image"


def _on_devices(run, arrays, bias, mesh):
    """Runs each device of the mesh on its part of the batch; sums a shared bias's."""
    if mesh is None:
        return run(*arrays)
    cut, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    biases = {None: (), "shared": (whole,), "per image": (cut,)}[bias]
    backward = run.func is _backward

    def part(*arrays):
        outs = run(*arrays)
        if backward and bias == "shared":
            outs = (*outs[:-1], jax.lax.psum(outs[-1], mesh.axis_names))
        return outs

    return jax.shard_map(
        part, mesh=mesh,
        in_specs=(*[cut] * (4 if backward else 3), *biases),
        out_specs=(cut, cut, cut, *biases) if backward else (cut,),
        check_vma=False,  # kernels do not say how their results vary over the mesh
    )(*arrays)


class _Sizes(NamedTuple):
    """Extents of a problem and of the blocks of its programs.

    Attributes:
      heads: heads of a program, side by side in whole lanes if there are enough.
      rows: queries of a program.
    """

    queries: int
    keys: int
    num_heads: int
    dim: int
    heads: int
    rows: int
    itemsize: int
    bias: str | None

    @classmethod
    def of(cls, q, k, num_heads, dim, bias=None):
        queries = q.shape[1]
        heads = next(
            (n for n in range(1, num_heads)
             if num_heads % n == 0 and n * dim % _LANES == 0),
            num_heads,
        )
        blocks = pl.cdiv(queries, _QUERIES)
        rows = queries if blocks == 1 else _up(pl.cdiv(queries, blocks), 16)
        return cls(
            queries, k.shape[1], num_heads, dim, heads, rows, q.dtype.itemsize,
            _bias_kind(bias),
        )


def _up(length, multiple):
    return pl.cdiv(length, multiple) * multiple


def _bytes_per_image(sizes):
    """Returns what one image takes on the chip in the backward pass, about."""
    width = _up(sizes.heads * sizes.dim, _LANES)
    rows, keys = _up(sizes.rows, 16), _up(sizes.keys, 16)
    logits = 4 * rows * _up(sizes.keys, _LANES)
    blocks = 2 * sizes.itemsize * width * (3 * rows + 4 * keys)  # two of each in turn
    sums = 8 * width * keys if sizes.rows < sizes.queries else 0
    biases = 4 * sizes.heads * logits if sizes.bias else 0
    return blocks + sums + 6 * logits + biases


def _grid(sizes, batch):
    """Returns the grid (heads, images, queries), images of a program, its options."""
    per_image_bytes = _bytes_per_image(sizes)
    most = min(_IMAGES, max(1, _MEMORY // per_image_bytes))
    images = max(n for n in range(1, most + 1) if batch % n == 0)
    grid = (
        sizes.num_heads // sizes.heads, batch // images,
        pl.cdiv(sizes.queries, sizes.rows),
    )
    # Sums over images (of a shared bias) and over queries stay on the chip.
    options = pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=max(16 * 2**20, 2 * images * per_image_bytes),
    )
    return grid, images, options


def _specs(sizes, images):
    """Returns the blocks of queries, of keys, and of the bias."""
    width, shared = sizes.heads * sizes.dim, sizes.bias == "shared"
    return (
        pl.BlockSpec((images, sizes.rows, width), lambda h, b, q: (b, q, h)),
        pl.BlockSpec((images, sizes.keys, width), lambda h, b, q: (b, 0, h)),
        pl.BlockSpec(
            (1 if shared else images, sizes.heads, sizes.queries, sizes.keys),
            lambda h, b, q: (0 if shared else b, h, 0, 0),
        ),
    )


def _forward(q, k, v, *bias, num_heads, interpret):
    sizes = _Sizes.of(q, k, num_heads, q.shape[2] // num_heads, *bias)
    grid, images, options = _grid(sizes, q.shape[0])
    queries, keys, biases = _specs(sizes, images)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes),
        grid=grid,
        in_specs=[queries, keys, keys] + [biases] * len(bias),
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=options,
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, *bias)
    return (out,)


def _backward(q, k, v, g, *bias, num_heads, interpret):
    sizes = _Sizes.of(q, k, num_heads, q.shape[2] // num_heads, *bias)
    grid, images, options = _grid(sizes, q.shape[0])
    queries, keys, biases = _specs(sizes, images)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    if bias:
        like.append(jax.ShapeDtypeStruct(bias[0].shape, jnp.float32))
    sums = pltpu.VMEM(keys.block_shape, jnp.float32)
    return tuple(pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes),
        grid=grid,
        in_specs=[queries, keys, keys, queries] + [biases] * len(bias),
        out_specs=[queries, keys, keys] + [biases] * len(bias),
        out_shape=like,
        scratch_shapes=[sums, sums] if grid[2] > 1 else [],
        compiler_params=options,
        interpret=interpret,
        name="attention_backward",
    )(q, k, v, g, *bias))


def _product(equation, x, y):
    # bfloat16 has one precision; float32 would be rounded to it by default.
    precision = "highest" if x.dtype == jnp.float32 else "default"
    return jnp.einsum(
        equation, x, y, precision=precision, preferred_element_type=jnp.float32
    )


def _weights(q, k, bias, head):
    logits = _product("bqd,bkd->bqk", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        logits += bias[:, head].astype(jnp.float32)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights * (1 / weights.sum(-1, keepdims=True))


def _rows(ref, sizes, columns):
    """Reads a head's queries, zeros for those behind the last."""
    block = ref[:, :, columns]
    if sizes.queries % sizes.rows:
        row = jax.lax.broadcasted_iota(jnp.int32, block.shape, 1)
        inside = row < sizes.queries - pl.program_id(2) * sizes.rows
        block = jnp.where(inside, block, jnp.zeros_like(block))
    return block


def _forward_kernel(q_ref, k_ref, v_ref, *refs, sizes):
    *bias, out_ref = refs
    for head in range(sizes.heads):
        columns = slice(head * sizes.dim, (head + 1) * sizes.dim)
        q = _rows(q_ref, sizes, columns)
        k, v = k_ref[:, :, columns], v_ref[:, :, columns]
        weights = _weights(q, k, bias[0] if bias else None, head).astype(v.dtype)
        out_ref[:, :, columns] = _product("bqk,bkd->bqd", weights, v).astype(q.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, g_ref, *refs, sizes):
    has_bias = int(sizes.bias is not None)
    bias, refs = refs[:has_bias], refs[has_bias:]
    dq_ref, dk_ref, dv_ref, *refs = refs
    dbias, sums = refs[:has_bias], refs[has_bias:]
    for head in range(sizes.heads):
        columns = slice(head * sizes.dim, (head + 1) * sizes.dim)
        q = _rows(q_ref, sizes, columns)
        k, v = k_ref[:, :, columns], v_ref[:, :, columns]
        g = _rows(g_ref, sizes, columns)
        weights = _weights(q, k, bias[0] if bias else None, head)
        dweights = _product("bqd,bkd->bqk", g, v)
        dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
        if dbias:
            _add_dbias(dbias[0], dlogits, head, sizes)
        scaled = (dlogits * sizes.dim ** -0.5).astype(q.dtype)
        dq_ref[:, :, columns] = _product("bqk,bkd->bqd", scaled, k).astype(q.dtype)
        dk = _product("bqk,bqd->bkd", scaled, q)
        dv = _product("bqk,bqd->bkd", weights.astype(g.dtype), g)
        if sums:
            _add(sums[0], columns, dk)
            _add(sums[1], columns, dv)
        else:
            dk_ref[:, :, columns] = dk.astype(k.dtype)
            dv_ref[:, :, columns] = dv.astype(v.dtype)
    if sums:
        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            dk_ref[...] = sums[0][...].astype(dk_ref.dtype)
            dv_ref[...] = sums[1][...].astype(dv_ref.dtype)


def _add(ref, columns, x):
    """Adds to a sum over blocks of queries, which the first one starts."""
    first = pl.program_id(2) == 0
    before = ref[:, :, columns]
    ref[:, :, columns] = jnp.where(first, jnp.zeros_like(before), before) + x


def _add_dbias(ref, dlogits, head, sizes):
    """Writes the gradient of each image's bias, or adds to that of the shared one."""
    if sizes.bias == "per image":
        ref[:, head] = dlogits
    else:
        first = pl.program_id(1) == 0
        before = ref[0, head]
        ref[0, head] = jnp.where(first, jnp.zeros_like(before), before) + dlogits.sum(0)
