"""What a device can do, and what attention makes of it: for benchmarks.gpu.

The ceiling is measured, not taken from a data sheet: the bytes a second of a copy, and
the operations a second of bf16 matrix products, at the shapes of the models and at one
large enough for nothing else to matter. Values are random: on zeros a GPU draws less
power and is faster.

Attention is checked before it is timed: results and gradients of every implementation
against those of float32, as the largest difference over the largest value.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks import attention_triton, step
from crossmae_jax.ops import attention
from tests import attention_cases

# What an implementation, a compiler or an allocator raises when it declines.
REFUSALS = (jax.errors.JaxRuntimeError, NotImplementedError, ValueError)

# Linear layers of ViT-B as training meets them: name, tokens of an image, from, to.
# The encoder sees 49 of 196 patches and the class token.
LAYERS = (
    ("encoder qkv", 50, 768, 2304),
    ("encoder proj", 50, 768, 768),
    ("encoder fc1", 50, 768, 3072),
    ("encoder fc2", 50, 3072, 768),
    ("CrossMAE 0.25 kv", 50, 768, 1024),
    ("CrossMAE 0.25 fc1", 49, 512, 2048),
    ("MAE decoder qkv", 197, 512, 1536),
    ("MAE decoder fc1", 197, 512, 2048),
    ("MAE decoder fc2", 197, 2048, 512),
)


def seconds(call: Callable[..., jax.Array], *arguments, runs: int, times: int) -> float:
    """Returns the seconds of a call: the median of several series of them.

    The calls of a series are handed over one after the other without waiting, so that
    the device does not wait for Python.
    """
    jax.block_until_ready(call(*arguments))
    measured = []
    for _ in range(times):
        begin = time.perf_counter()
        for _ in range(runs):
            result = call(*arguments)
        jax.block_until_ready(result)
        measured.append((time.perf_counter() - begin) / runs)
    return statistics.median(measured)


def refusal(error: Exception) -> str:
    """Returns the first line of what was raised, fit for a cell of a table."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"refused: {lines[0][:80]}".replace("|", "/")


def copy_gigabytes(num_bytes: int) -> float:
    """Returns the GB/s of copying an array on the device, read and written."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 4,))
    return 2 * num_bytes / seconds(jax.jit(jnp.copy), x, runs=10, times=5) / 1e9


def matmul_tflops(m: int, k: int, n: int) -> float:
    """Returns the TFLOP/s of a bf16 product of [m, k] and [k, n]."""
    x, y = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate([(m, k), (k, n)])
    )
    return 2 * m * k * n / seconds(jax.jit(jnp.dot), x, y, runs=20, times=5) / 1e12


def ceiling(*, images: int, quick: bool) -> Iterator[str]:
    """Yields the lines of a table of copies and matrix products."""
    yield step.row(["what", "shape", "measured"])
    yield step.row(["---"] * 3)
    num_bytes = 2**20 if quick else 2**31
    yield step.row([
        "copy, read and written", f"{num_bytes / 2**20:.0f} MiB",
        f"{copy_gigabytes(num_bytes):.1f} GB/s",
    ])
    side = 64 if quick else 8192
    shapes = [("largest product", side, side, side)]
    shapes += [(name, images * tokens, k, n) for name, tokens, k, n in LAYERS]
    for name, m, k, n in shapes:
        if quick:
            m, k, n = (min(x, 64) for x in (m, k, n))
        try:
            result = f"{matmul_tflops(m, k, n):.3g} TFLOP/s"
        except REFUSALS as error:
            result = refusal(error)
        yield step.row([name, f"{m} x {k} x {n}", result])


def _inputs(case: attention_cases.Case, images: int):
    """Returns q, k, v, the gradient of the result, and the bias or None; float32."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k = ((images, n, case.num_heads, case.dim) for n in (case.queries, case.keys))
    arrays = [
        jax.random.normal(key, shape)
        for key, shape in zip(keys, (q, k, k, q), strict=False)
    ]
    if case.bias is None:
        return *arrays, None
    count = 1 if case.bias == "shared" else images
    shape = (count, case.num_heads, case.queries, case.keys)
    return *arrays, jax.random.normal(keys[4], shape)


def _with_gradients(call):
    """Returns a function that runs attention forward and backward."""

    def run(q, k, v, g, bias):
        if bias is None:
            out, transposed = jax.vjp(lambda *x: call(*x, None), q, k, v)
        else:
            out, transposed = jax.vjp(call, q, k, v, bias)
        return out, *transposed(g)

    return run


def _ours(impl: str):
    return lambda q, k, v, bias: attention.attention(q, k, v, bias=bias, impl=impl)


def _jax(q, k, v, bias):
    return jax.nn.dot_product_attention(q, k, v, bias, implementation="xla")


def _tokamax(impl: str):
    tokamax = importlib.import_module("tokamax")  # of no extra

    return lambda q, k, v, bias: tokamax.dot_product_attention(
        q, k, v, bias=bias, implementation=impl
    )


def implementations() -> dict[str, Callable]:
    """Returns the implementations to compare; those of tokamax if it is installed."""
    kernels = {
        "cudnn": _ours("cudnn"), "xla": _ours("xla"),
        "triton": attention_triton.attention,
    }
    if importlib.util.find_spec("tokamax") is not None:
        kernels |= {
            f"tokamax {impl}": _tokamax(impl) for impl in ("mosaic", "triton")
        }
    return kernels


def errors(
    results: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]
) -> list[float]:
    """Returns the largest difference over the largest value, of each pair of arrays."""
    return [
        float(jnp.abs(value.astype(jnp.float32) - target).max() / jnp.abs(target).max())
        for value, target in zip(results, expected, strict=True)
    ]


def attention_row(case, name, call, *, images: int, quick: bool) -> list[str]:
    """Returns the cells of a case: errors of results and gradients, and times.

    The numbers that bfloat16 takes are the same for the float32 reference: what is
    compared is the arithmetic, not the rounding of its input.
    """
    rounded = [
        x if x is None else x.astype(jnp.bfloat16) for x in _inputs(case, images)
    ]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(_with_gradients(_jax))(
            *(x if x is None else x.astype(jnp.float32) for x in rounded)
        )
    runs = {"runs": 1, "times": 1} if quick else {"runs": 20, "times": 5}
    q, k, v, _, bias = rounded
    try:
        both = jax.jit(_with_gradients(call))
        wrong = errors(both(*rounded), expected)
        forward = seconds(jax.jit(call), q, k, v, bias, **runs)
        total = seconds(both, *rounded, **runs)
    except REFUSALS as error:
        return [case.name, name, refusal(error), "", "", ""]
    gradients = ", ".join(f"{x:.1e}" for x in wrong[1:])
    return [
        case.name, name, f"{wrong[0]:.1e}", gradients,
        f"{forward * 1e6:.0f}", f"{total * 1e6:.0f}",
    ]


def attention_table(*, images: int, quick: bool) -> Iterator[str]:
    """Yields the lines of a table of every case and implementation."""
    if importlib.util.find_spec("tokamax") is None:
        yield "tokamax is not installed: not compared.\n"
    yield step.row([
        "case", "implementation", "error of the result", "of dq, dk, dv, dbias",
        "forward, us", "forward and backward, us",
    ])
    yield step.row(["---"] * 6)
    for case in attention_cases.SMALL[::5] if quick else attention_cases.CASES:
        for name, call in implementations().items():
            yield step.row(
                attention_row(case, name, call, images=images, quick=quick)
            )
