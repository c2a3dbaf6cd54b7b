"""Compiles attention, with gradients, at every shape for devices that are not there.

    python -m benchmarks.attention --target=v5e:2x2 --target=v6e:2x2 --target=h200

The table says which implementation each target's compiler took for the shapes that the
models train with (tests/attention_cases.py), or why it refused. The batch is cut over
the target's devices. Nothing is executed and no time is known. TPU targets need the
package libtpu, GPU targets jax[cuda13].
"""

import argparse
import time

from crossmae_jax.distributed import hardware

if __name__ == "__main__":
    hardware.without_devices()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import kernels, step  # noqa: E402
from crossmae_jax.cost import collectives  # noqa: E402
from crossmae_jax.distributed import parallel  # noqa: E402
from crossmae_jax.ops import attention  # noqa: E402
from tests import attention_cases  # noqa: E402

KERNELS = {"tpu": "tpu_custom_call", "cudnn": "__cudnn$fmha"}


def compile_case(
    case, *, dtype, mesh, images: int, attend=attention.attention
) -> jax.stages.Compiled:
    """Compiles output and gradients of a case, its images cut over the mesh."""
    batch = images * mesh.size
    q, k = ((batch, n, case.num_heads, case.dim) for n in (case.queries, case.keys))
    cut, whole = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    arrays = [jax.ShapeDtypeStruct(x, dtype, sharding=cut) for x in (q, k, k, q)]
    if case.bias is None:
        bias = None
    else:
        count, sharding = {"shared": (1, whole), "per image": (batch, cut)}[case.bias]
        shape = (count, case.num_heads, case.queries, case.keys)
        bias = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def gradients(q, k, v, g, bias):
        out, transposed = jax.vjp(
            lambda q, k, v, bias: attend(q, k, v, bias=bias), q, k, v, bias
        )
        return out, transposed(g)

    gradients = jax.jit(parallel.within(mesh, gradients))
    return gradients.lower(*arrays, bias).compile()


def _cells(case, **options) -> list[str]:
    """Returns the cells of a case: what it compiled to, collectives, memory, time."""
    begin = time.perf_counter()
    try:
        compiled = compile_case(case, **options)
    except kernels.REFUSALS as error:
        return [kernels.refusal(error), "", "", ""]
    seconds, text = time.perf_counter() - begin, compiled.as_text()
    taken = [name for name, call in KERNELS.items() if call in text] or ["xla"]
    exchanged = collectives.read(text, options["mesh"].size)
    memory = compiled.memory_analysis()  # of one from the cache perhaps None
    return [
        " ".join(taken),
        ", ".join(f"{total.count} {total.kind}" for total in exchanged) or "none",
        f"{memory.temp_size_in_bytes / 2**20:.0f}" if memory else "unknown",
        f"{seconds:.1f}",
    ]


def main(argv: list[str] | None = None) -> None:
    """Prints a table for the targets named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--target", action="append", required=True)
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32"])
    parser.add_argument("--images", type=int, default=32, help="per device")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    args = parser.parse_args(argv)
    print(step.conditions([], f"{args.images} images a device: compiled, not run"))
    head = ["target", "case", "queries x keys", "heads", "bias", "type", "compiled to",
            "collectives", "temporaries, MiB", "compile, s"]
    print(step.row(head))
    print(step.row(["---"] * len(head)))
    for target in args.target:
        mesh = parallel.make_mesh(hardware.target_devices(target))
        for case in attention_cases.CASES:
            for dtype in args.dtype or ["bfloat16", "float32"]:
                if args.case not in case.name:
                    continue
                print(step.row([
                    target, case.name, f"{case.queries} x {case.keys}",
                    f"{case.num_heads} x {case.dim}", case.bias or "none", dtype,
                    *_cells(case, dtype=dtype, mesh=mesh, images=args.images),
                ]), flush=True)


if __name__ == "__main__":
    main()
