"""Attention and norms: against float64, and in float32 where bfloat16 would not do.

Kernels of the TPU run step by step here ("interpret") and are compiled for real in
test_tpu_compile.py; those of cuDNN, which need a GPU to run, in gpu_compile.py.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_triton
from crossmae_jax.distributed import parallel
from crossmae_jax.models import layers
from crossmae_jax.ops import attention, attention_tpu, attention_xla
from tests import attention_cases

# Of the largest number of an output or gradient. In bfloat16 the weights and their
# gradients are rounded to 8 bits before the second product.
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}


def _random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _exact(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("queries, keys, dim", [(50, 50, 64), (49, 50, 32), (7, 1, 80)])
def test_attention_is_the_weighted_mean_of_the_values(queries, keys, dim):
    q = _random(2, queries, 3, dim)
    k, v = _random(2, keys, 3, dim, seed=1), _random(2, keys, 3, dim, seed=2)
    out = attention.attention(q, k, v)
    np.testing.assert_allclose(out, _exact(q, k, v), atol=2e-6)


def test_softmax_is_taken_in_float32():
    # Logits of 30 that differ by less than bfloat16 can tell apart there (0.125).
    q = jnp.ones((1, 1, 1, 64), jnp.bfloat16)
    k = jnp.full((1, 2, 1, 64), 3.75, jnp.bfloat16).at[0, 1, 0, :8].add(0.0625)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    v = jnp.broadcast_to(v, (1, 2, 1, 64))
    out = attention.attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out, _exact(q, k, v), atol=4e-3)  # half an ulp at 0.5


@pytest.mark.parametrize(
    "dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float32, 2e-4)]
)
def test_norm_statistics_survive_a_large_mean(dtype, tolerance):
    x = (_random(4, 64) + (100.0 if dtype == jnp.bfloat16 else 1000.0)).astype(dtype)
    norm = layers.LayerNorm(dtype)
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=tolerance)


IMPLEMENTATIONS = {
    "xla": attention_xla.attention,
    "tpu": functools.partial(attention_tpu.attention, interpret=True),
}


def _arrays(case, batch, dtype):
    q, k = (batch, case.queries), (batch, case.keys)
    heads = (case.num_heads, case.dim)
    arrays = [
        _random(*n, *heads, seed=seed).astype(dtype)
        for seed, n in enumerate((q, k, k, q))
    ]
    if case.bias is None:
        return *arrays, None
    images = {"shared": 1, "per image": batch}[case.bias]
    shape = (images, case.num_heads, case.queries, case.keys)
    return *arrays, _random(*shape, seed=4)


def _reference(q, k, v, bias):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


def _run(function, q, k, v, g, bias):
    """Returns output and gradients by name, computed twice to the same bits."""
    def run(*arrays):
        out, transposed = jax.vjp(function, *arrays)
        return out, transposed(g.astype(out.dtype))

    run = jax.jit(run)
    out, (dq, dk, dv, dbias) = first = run(q, k, v, bias)
    jax.tree.map(np.testing.assert_array_equal, first, run(q, k, v, bias))
    named = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return named if bias is None else named | {"dbias": dbias}


def _assert_close(found, expected, dtype):
    for part, exact in expected.items():
        assert found[part].dtype == (jnp.float32 if part == "dbias" else dtype)
        np.testing.assert_allclose(
            found[part].astype(jnp.float32), exact.astype(jnp.float32), rtol=0,
            atol=TOLERANCES[dtype] * float(jnp.abs(exact).max()), err_msg=part,
        )


def test_every_shape_of_the_models_is_tested():
    real, tested = (
        {(case.queries, case.keys, case.dim, case.bias) for case in cases}
        for cases in (attention_cases.CASES, attention_cases.SMALL)
    )
    assert tested == real


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["f32", "bf16"])
@pytest.mark.parametrize("case", attention_cases.SMALL, ids=lambda case: case.name)
def test_every_implementation_is_attention_at_every_shape(case, dtype):
    arrays = _arrays(case, 1 if case.queries > 147 else 2, dtype)
    expected = _run(_reference, *arrays)
    for function in IMPLEMENTATIONS.values():
        _assert_close(_run(function, *arrays), expected, dtype)


@pytest.mark.parametrize("shape, dtype", [
    ((1, 1, 5, 7), "float32"), ((3, 1, 5, 7), "float32"), ((1, 2, 5, 7), "bfloat16"),
    ((3, 2, 5, 7), "float32"),
])
def test_a_bias_may_be_shared_by_images_and_heads(shape, dtype):
    case = attention_cases.Case("", 5, 7, 2, 8)
    *arrays, _ = _arrays(case, 3, jnp.float32)
    bias = _random(*shape, seed=5).astype(dtype)
    bias = bias.at[..., 1, :].set(jnp.finfo(dtype).min)  # equal weights for all keys
    bias = bias.at[..., 2, 3:].set(-jnp.inf)
    found = _run(attention_xla.attention, *arrays, bias)
    expected = _run(_reference, *arrays, bias)
    assert found["dbias"].dtype == dtype
    for part, exact in expected.items():
        tolerance = 2e-6 if part != "dbias" else 2 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            found[part].astype(jnp.float32), exact.astype(jnp.float32),
            rtol=0, atol=tolerance * float(jnp.abs(exact).max()), err_msg=part,
        )


def test_gradients_have_the_types_of_their_arrays():
    q, k = _random(1, 3, 1, 8).astype(jnp.bfloat16), _random(1, 4, 1, 8)
    v = k.astype(jnp.float16)
    gradients = jax.grad(
        lambda *x: attention_xla.attention(*x).astype(jnp.float32).sum(), (0, 1, 2)
    )(q, k, v)
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32, jnp.float16]


@pytest.mark.parametrize("case", [
    case for case in attention_cases.SMALL if case.keys <= 256 and case.bias is None
], ids=lambda case: case.name)
def test_the_candidate_for_gpus_is_attention_at_short_shapes(case):
    arrays = _arrays(case, 2, jnp.bfloat16)
    candidate = functools.partial(attention_triton.attention, interpret=True)
    _assert_close(_run(candidate, *arrays), _run(_reference, *arrays), jnp.bfloat16)


def test_the_candidate_for_gpus_says_what_it_does_not_take():
    q = _random(1, 257, 1, 32).astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="up to 256 keys, not 257"):
        attention_triton.attention(q, q, q)
    few, bias = q[:, :8], jnp.zeros((1, 1, 8, 8))
    with pytest.raises(NotImplementedError, match="bfloat16, not float32"):
        attention_triton.attention(*[q[:, :8].astype(jnp.float32)] * 3)
    with pytest.raises(NotImplementedError, match="no bias"):
        attention_triton.attention(few, few, few, bias)


def test_sums_go_over_all_programs_of_a_kernel(monkeypatch):
    monkeypatch.setattr(attention_tpu, "_IMAGES", 2)
    monkeypatch.setattr(attention_tpu, "_QUERIES", 16)
    case = attention_cases.Case("", 16, 7, 2, 8, "shared")
    arrays = _arrays(case, 6, jnp.float32)  # 3 programs of 2 images
    _assert_close(
        _run(IMPLEMENTATIONS["tpu"], *arrays), _run(_reference, *arrays), jnp.float32
    )
    case = attention_cases.Case("", 41, 7, 2, 8)  # 3 programs of 16 queries
    arrays = _arrays(case, 2, jnp.float32)
    _assert_close(
        _run(IMPLEMENTATIONS["tpu"], *arrays), _run(_reference, *arrays), jnp.float32
    )


@pytest.mark.parametrize("bias", [None, "shared", "per image"])
def test_devices_take_their_parts_of_the_images(bias):
    mesh = parallel.make_mesh()
    case = attention_cases.Case("", 9, 10, 2, 8, bias)
    arrays = _arrays(case, 16, jnp.float32)
    cut = parallel.batch_sharding(mesh)
    shardings = [
        cut if x is not None and x.shape[0] == 16 else parallel.replicated(mesh)
        for x in arrays
    ]

    def kernel(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, transposed = jax.vjp(IMPLEMENTATIONS["tpu"], *arrays[:3], arrays[4])
            return out, transposed(arrays[3])

    compiled = jax.jit(kernel, in_shardings=tuple(shardings)).lower(*arrays).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert ("all-reduce" in text) == (bias == "shared")
    on_mesh = [
        x if x is None else jax.device_put(x, sharding)
        for x, sharding in zip(arrays, shardings)
    ]
    out, gradients = compiled(*on_mesh)
    assert out.sharding.is_equivalent_to(cut, 4)
    names = ("dq", "dk", "dv", "dbias")[:len(arrays) - (bias is None)]
    found = {"out": out, **dict(zip(names, gradients))}
    _assert_close(
        {name: np.asarray(x) for name, x in found.items() if x is not None},
        _run(_reference, *arrays), jnp.float32,
    )


def _lowered(platform, dtype, mesh=None, **kwargs):
    """Returns what a gradient through attention becomes on a platform."""
    x = jax.ShapeDtypeStruct((8, 50, 2, 64), dtype)

    def loss(q, k, v):
        with jax.sharding.use_abstract_mesh(mesh or jax.sharding.get_abstract_mesh()):
            return attention.attention(q, k, v, **kwargs).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return jax.export.export(gradient, platforms=[platform])(x, x, x).mlir_module()


@pytest.fixture
def libtpu(monkeypatch):
    """Lets the TPU's kernels be chosen where their compiler is not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name: find_spec("jax") if name == "libtpu" else find_spec(name),
    )


def test_the_platform_that_is_compiled_for_chooses(libtpu, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for dtype in (jnp.bfloat16, jnp.float32):
        assert "tpu_custom_call" in _lowered("tpu", dtype)
        assert "custom_call" not in _lowered("cpu", dtype)
        assert "tpu_custom_call" not in _lowered("cuda", dtype)


def test_kernels_need_the_mesh_of_several_devices(libtpu):
    assert "tpu_custom_call" not in _lowered("tpu", jnp.float32)
    q = _random(8, 50, 2, 64)
    with pytest.raises(NotImplementedError, match="8 devices, but no mesh is in use"):
        attention.IMPLEMENTATIONS["tpu"].check(q, q, q, None)
    mesh = parallel.make_mesh().abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        attention.IMPLEMENTATIONS["tpu"].check(q, q, q, None)
        with pytest.raises(NotImplementedError, match="multiple of the mesh's 8"):
            attention.IMPLEMENTATIONS["tpu"].check(q[:6], q[:6], q[:6], None)
    alone = parallel.make_mesh(jax.devices()[:1]).abstract_mesh
    with jax.sharding.use_abstract_mesh(alone):
        attention.IMPLEMENTATIONS["tpu"].check(q[:6], q[:6], q[:6], None)


def test_with_no_other_compiler_attention_is_plain_xla():
    q = _random(2, 50, 2, 64)
    plain = jax.make_jaxpr(attention_xla.attention)(q, q, q, None)
    assert str(jax.make_jaxpr(attention.attention)(q, q, q)) == str(plain)


@pytest.mark.parametrize("impl", ["tpu", "cudnn"])
def test_a_forced_implementation_says_why_it_cannot_run(impl):
    q = _random(2, 50, 2, 20)
    with pytest.raises(NotImplementedError, match="20|float32"):
        attention.attention(q, q, q, impl=impl)
    q = _random(2, 50, 2, 64).astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="cpu|not found|no mesh"):
        attention.attention(q, q, q, impl=impl)


@pytest.mark.parametrize("shape, bias, reason", [
    ((2, 50, 2, 64), "float16", "float32 or bfloat16"),
    ((2, 50, 2, 20), None, "multiple of 8 up to 128, not 20"),
    ((2, 785, 2, 64), "bias", "up to 256 queries, not 785"),
    ((1, 20_000, 2, 64), None, "keep all keys on the chip: 20000 x 20000"),
])
def test_kernels_say_what_they_do_not_take(shape, bias, reason):
    dtype = jnp.float16 if bias == "float16" else jnp.float32
    q = jax.ShapeDtypeStruct(shape, dtype)
    bias = jax.ShapeDtypeStruct((1, 2, 785, 785), dtype) if bias == "bias" else None
    with pytest.raises(NotImplementedError, match=reason):
        attention_tpu.check(q, q, q, bias)


def test_an_unknown_implementation_is_named():
    q = _random(1, 2, 1, 8)
    with pytest.raises(ValueError, match="Unknown impl='flash'. Known: cudnn, tpu"):
        attention.attention(q, q, q, impl="flash")
