"""A run's kernels against float32, on its own devices and shapes, before it trains.

Tests run kernels on other machines; a new chip, driver or compiler may still get one of
them wrong, and a model trains on, worse, on a wrong gradient. So the output and all
gradients of each attention that a run will compute are compared with those of plain
XLA in float32, on random input. The error of an array a that should be b is

    max |a - b| / max |b|

and may be as large as rounding makes it in the type of computation.

The numbers of the queries get a common part, those of the keys its opposite, which puts
the logits around -5. A row of zeros that pads the keys then outweighs them all, should
it not be hidden; among logits around zero one key of 51 would pass for rounding.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from crossmae_jax import errors
from crossmae_jax.distributed import parallel
from crossmae_jax.ops import attention, attention_xla

TOLERANCES = {"bfloat16": 2e-2, "float32": 1e-5}
_IMAGES = 16  # most per device: a program of the TPU's kernels takes no more
_LOWERED = 5.0
_PARTS = (
    "the output", "the gradient of q", "the gradient of k", "the gradient of v",
    "the gradient of the bias",
)


class KernelError(errors.UserError, RuntimeError):
    """A kernel computes something else than attention; nothing was trained."""


def check(choices: Sequence[attention.Choice], *, mesh: jax.sharding.Mesh) -> None:
    """Prints each choice once, and compares those that are not "xla" with float32.

    On several hosts all must call it; the first one prints.

    Args:
      choices: what `attention.recording` gave.
      mesh: the run's; every device computes on images of its own.

    Raises:
      KernelError: if an error is above the type's tolerance, or not finite.
    """
    distinct = {str(choice): choice for choice in choices}
    first = jax.process_index() == 0
    if distinct and first:
        print("\n".join(distinct), flush=True)
    compared = [choice for choice in distinct.values() if choice.impl != "xla"]
    worst = [_compare(choice, mesh) for choice in compared]
    if compared and first:
        names = ", ".join(sorted({choice.impl for choice in compared}))
        limit = max(TOLERANCES[str(choice.arrays[0].dtype)] for choice in compared)
        print(
            f"checked {names} against float32 on {len(compared)} kinds of attention,"
            f" output and gradients: off by {max(worst):.1e} of the largest number at"
            f" most, allowed {limit:g}", flush=True,
        )


def _compare(choice, mesh):
    """Returns the largest error of a choice; raises KernelError if it is too large."""
    errors = dict(zip(_PARTS, _errors(choice, mesh), strict=False))
    limit = TOLERANCES[str(choice.arrays[0].dtype)]
    wrong = [f"{part} by {e:.2g}" for part, e in errors.items() if not e <= limit]
    if wrong:
        raise KernelError(
            f"The kernel is wrong on this machine. {choice}. Compared with float32 on"
            f" random input, {', '.join(wrong)} of its largest number; up to {limit:g}"
            " is rounding. Nothing was trained. Install the versions of"
            " constraints.txt, or other ones of jax and its plugin (`python -m"
            " crossmae_jax doctor` lists them), and please report this with them."
        )
    return max(errors.values())


def _errors(choice, mesh):
    """Returns the errors of output and gradients, in the order of `_PARTS`."""
    arrays = _draw(choice, mesh)

    def chosen(q, k, v, bias):
        return attention.attention(q, k, v, bias=bias)

    def errors(results, *arrays):
        arrays = (x if x is None else x.astype(jnp.float32) for x in arrays)
        with jax.default_matmul_precision("highest"):
            expected = _with_gradients(attention_xla.attention, *arrays)
        return [_error(*pair) for pair in zip(results, expected, strict=True)]

    # Drawn, computed and compared one after the other: compiled together, roundings to
    # the type of computation that are turned back at once would be left out.
    with attention.recording() as again:
        results = jax.jit(
            parallel.within(mesh, functools.partial(_with_gradients, chosen))
        )(*arrays)
    assert {x.impl for x in again} == {choice.impl}, (again, choice)
    deviations = jax.jit(
        parallel.within(mesh, errors), out_shardings=parallel.replicated(mesh)
    )(results, *arrays)
    return [float(error) for error in deviations]


def _draw(choice, mesh):
    """Returns q, k, v, the output's gradient and the bias, cut over the mesh."""
    q, k, _, bias = choice.arrays
    images = min(-(-q.shape[0] // mesh.size), _IMAGES) * mesh.size
    common = (_LOWERED / q.shape[3] ** 0.5) ** 0.5
    shapes = [(images, *x.shape[1:]) for x in (q, k, k, q)]
    added, dtypes = [common, -common, 0.0, 0.0], [q.dtype] * 4
    cut, whole = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    shardings = [cut] * 4
    if bias is not None:
        shared = bias.shape[0] == 1
        shapes.append((1 if shared else images, *bias.shape[1:]))
        added.append(0.0)
        dtypes.append(bias.dtype)
        shardings.append(whole if shared else cut)

    def draw(key):
        keys = jax.random.split(key, len(shapes))
        return [
            (jax.random.normal(key, shape) + more).astype(dtype)
            for key, shape, more, dtype in zip(keys, shapes, added, dtypes, strict=True)
        ]

    arrays = jax.jit(draw, out_shardings=shardings)(
        jax.random.key(0, impl="threefry2x32")
    )
    return arrays if bias is not None else [*arrays, None]


def _with_gradients(function, q, k, v, g, bias):
    out, transposed = jax.vjp(function, q, k, v, bias)
    gradients = transposed(g.astype(out.dtype))
    return [x for x in (out, *gradients) if x is not None]


def _error(result, expected):
    largest = jnp.abs(expected).max()
    off = jnp.abs(result.astype(jnp.float32) - expected)
    # The maximum over devices may lose what is not a number.
    off = jnp.nan_to_num(off, nan=jnp.inf).max()
    # Of a single key, the gradients of query and key are zero.
    return off / jnp.where(largest > 0, largest, 1)
