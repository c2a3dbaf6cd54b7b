"""Attention on the device of this process: how far off it is, and how long it takes.

For benchmarks.gpu. Every implementation is checked before it is timed: results and
gradients against those of float32, as the largest difference over the largest value.

A call from Python takes longer than these kernels, so they are timed in loops on the
device: a program makes many calls, in each of whose inputs stands a number of what the
one before has computed, and hands all results on. No compiler can therefore leave a
call out, or make a part of it once for all. What such a loop takes without attention,
is in the times, and measured as well.

Everything is compiled before anything is timed, by as many threads as there are
processors.
"""

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import attention_triton, kernels, step
from crossmae_jax.ops import attention
from tests import attention_cases

CALLS = 50  # of a loop

Attend = Callable[..., jax.Array]  # of q, k, v and bias


class _Shared(NamedTuple):
    """Programs of a case that are the same for all implementations."""

    inputs: jax.stages.Compiled
    reference: jax.stages.Compiled
    empty: jax.stages.Compiled


class _Own(NamedTuple):
    """Programs of a case and an implementation; the last two are loops."""

    both: jax.stages.Compiled
    forward: jax.stages.Compiled
    total: jax.stages.Compiled


def _ours(impl: str) -> Attend:
    return lambda q, k, v, bias: attention.attention(q, k, v, bias=bias, impl=impl)


def _jax(q, k, v, bias):
    return jax.nn.dot_product_attention(q, k, v, bias, implementation="xla")


def _tokamax(impl: str) -> Attend:
    tokamax = importlib.import_module("tokamax")  # of no extra

    return lambda q, k, v, bias: tokamax.dot_product_attention(
        q, k, v, bias=bias, implementation=impl
    )


def implementations() -> dict[str, Attend]:
    """Returns the implementations to compare; those of tokamax if it is installed."""
    found = {
        "cudnn": _ours("cudnn"), "xla": _ours("xla"),
        "triton": attention_triton.attention,
    }
    if importlib.util.find_spec("tokamax") is not None:
        found |= {f"tokamax {impl}": _tokamax(impl) for impl in ("mosaic", "triton")}
    return found


def _inputs(case: attention_cases.Case, images: int):
    """Returns q, k, v, the bias or None, and the gradient of the result; bfloat16."""
    q, k = ((images, n, case.num_heads, case.dim) for n in (case.queries, case.keys))
    count = {"shared": 1, "per image": images}.get(case.bias)
    bias = count and (count, case.num_heads, case.queries, case.keys)
    return tuple(
        shape and jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 5), (q, k, k, bias, q), strict=True
        )
    )


def _forward(call: Attend):
    return lambda q, k, v, bias, g: (call(q, k, v, bias),)


def _with_gradients(call: Attend):
    """Returns a function that runs attention forward and backward."""

    def run(q, k, v, bias, g):
        if bias is None:
            out, transposed = jax.vjp(lambda *x: call(*x, None), q, k, v)
        else:
            out, transposed = jax.vjp(call, q, k, v, bias)
        return out, *transposed(g)

    return run


def _reference(*inputs):
    """Computes attention and gradients in float32, of the numbers that others take."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    with jax.default_matmul_precision("highest"):
        return _with_gradients(_jax)(*exact)


def _without_attention(*inputs):
    # Behind a barrier they are whole arrays: else a loop would carry a number of each.
    whole = jax.lax.optimization_barrier(inputs)
    return (sum(map(_first, jax.tree.leaves(whole))),)


def _first(x):
    return jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)


def _looped(run, calls: int):
    """Returns a function that runs another many times, each after the one before."""

    def loop(*inputs):
        def body(_, carried):
            inputs, results = carried
            mark = jnp.tanh(sum(_first(x).astype(jnp.float32) for x in results))
            inputs = jax.tree.map(
                lambda x: jax.lax.dynamic_update_slice(
                    x, mark.astype(x.dtype), (0,) * x.ndim
                ), inputs,
            )
            return inputs, run(*inputs)

        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, *inputs)
        )
        return jax.lax.fori_loop(0, calls, body, (inputs, zeros))[1]

    return loop


def _compile(run: Callable, *inputs) -> jax.stages.Compiled:
    return jax.jit(run).lower(*inputs).compile()


def _compile_shared(case, *, images: int, calls: int) -> _Shared:
    make = functools.partial(_inputs, case, images)
    shapes = jax.eval_shape(make)
    return _Shared(
        _compile(make), _compile(_reference, *shapes),
        _compile(_looped(_without_attention, calls), *shapes),
    )


def _compile_own(case, call: Attend, *, images: int, calls: int) -> _Own:
    shapes = jax.eval_shape(functools.partial(_inputs, case, images))
    both = _with_gradients(call)
    return _Own(
        _compile(both, *shapes),
        _compile(_looped(_forward(call), calls), *shapes),
        _compile(_looped(both, calls), *shapes),
    )


@jax.jit
def _errors(results, expected):
    """Returns the largest difference over the largest value, of each pair of arrays."""
    return [
        jnp.abs(value.astype(jnp.float32) - target).max() / jnp.abs(target).max()
        for value, target in zip(results, expected, strict=True)
    ]


def _cells(own: _Own, inputs, expected, time_of: Callable) -> list[str]:
    """Returns errors of results and gradients, and times."""
    first, *others = map(float, _errors(own.both(*inputs), expected))
    return [
        f"{first:.1e}", ", ".join(f"{x:.1e}" for x in others),
        f"{time_of(own.forward, *inputs) * 1e6:.1f}",
        f"{time_of(own.total, *inputs) * 1e6:.1f}",
    ]


HEAD = [
    "case", "implementation", "error of the result", "of dq, dk, dv, dbias",
    "forward, us", "forward and backward, us",
]


def table(
    cases: Sequence[attention_cases.Case], calls: Mapping[str, Attend], *,
    images: int, quick: bool,
) -> Iterator[str]:
    """Yields the lines of a table of every case and implementation.

    Args:
      calls: the implementations by name, called with q, k, v and bias, or None.
      quick: whether a loop makes few calls and is run once: times mean nothing.
    """
    sizes = {"images": images, "calls": 2 if quick else CALLS}
    begin = time.perf_counter()
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        shared = {
            case: pool.submit(_compile_shared, case, **sizes) for case in cases
        }
        own = {
            (case, name): pool.submit(_compile_own, case, call, **sizes)
            for case in cases for name, call in calls.items()
        }
    yield (
        f"{images} images, {sizes['calls']} calls in a loop; compiled in "
        f"{time.perf_counter() - begin:.0f} s.\n"
    )

    def time_of(loop, *inputs):
        passed = kernels.seconds(loop, *inputs, runs=1, times=1 if quick else 7)
        return passed / sizes["calls"]

    yield step.row(HEAD)
    yield step.row(["---"] * len(HEAD))
    for case in cases:
        try:
            programs = shared[case].result()
            inputs = programs.inputs()
            expected = programs.reference(*inputs)
            empty = time_of(programs.empty, *inputs)
        except kernels.REFUSALS as error:
            yield step.row([case.name, "float32", kernels.refusal(error), "", "", ""])
            continue
        yield step.row([
            case.name, "none: an empty loop", "", "", f"{empty * 1e6:.1f}", ""
        ])
        for name in calls:
            try:
                cells = _cells(own[case, name].result(), inputs, expected, time_of)
            except kernels.REFUSALS as error:
                cells = [kernels.refusal(error), "", "", ""]
            yield step.row([case.name, name, *cells])
