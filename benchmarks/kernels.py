"""What the device of this process can do at most: for benchmarks.gpu.

The ceiling is measured, not taken from a data sheet: the bytes a second of a copy, and
the operations a second of bf16 matrix products, at the shapes of the models and at one
large enough for nothing else to matter. Values are random: on zeros a GPU draws less
power and is faster.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks import step

# What an implementation, a compiler or an allocator raises when it declines. JAX's and
# NotImplementedError are RuntimeErrors; a plain one comes from Pallas.
REFUSALS = (RuntimeError, ValueError)

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
