"""Compiles the training step for a TPU or GPU that is not there; says what it needs.

    python -m benchmarks.compilation --config=configs/vitb_cross_prmim.py \\
        --target=v5e:2x2 --batch=512
    python -m benchmarks.compilation --config=configs/vitb_cross_prmim.py \\
        --target=h200 --batch=1024

The device's own compiler runs, so what it would refuse is refused here, and memory and
collectives are those of the real program; nothing is executed and no time is known.
TPU targets need the package libtpu, GPU targets jax[cuda13]. On the GPU there is no
autotuning without a device, so matrix products go to cuBLAS.
"""

import argparse
import os
import re
import time
from pathlib import Path

if __name__ == "__main__":  # before JAX is imported, which would look for hardware
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

from benchmarks import step  # noqa: E402
from crossmae_jax import optim, parallel, train  # noqa: E402
from crossmae_jax.objectives import OBJECTIVES  # noqa: E402

# XLA's description of a GPU, from its maker's data sheet.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } threads_per_block_limit: 1024
  threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "H200"
"""
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter")


def target_mesh(target: str) -> Mesh:
    """Returns a mesh of devices that are not there: "h200", or a TPU "v5e:2x2"."""
    if target == "h200":
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="any", topology="1x1x1", target_config=H200
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    devices = np.array(topology.devices)
    return Mesh(devices, (parallel.DATA_AXIS,), axis_types=(AxisType.Auto,))


def compile_step(path: str, *, target: str, overrides: list[str]):
    """Returns the compiled training step of a config."""
    config, mesh = step.load_config(path, overrides=overrides), target_mesh(target)
    data = config.data
    parallel.check_batch_size(
        data.batch_size, mesh, accum_steps=config.optim.accum_steps
    )
    objective = OBJECTIVES[config.objective](config)
    schedule = optim.make_schedule(config, steps_per_epoch=1000.0)
    init, train_step = train.compile_steps(
        objective, optim.make_optimizer(config, schedule), mesh, schedule=schedule,
        key=jax.random.key(0, impl="threefry2x32"),
        accum_steps=config.optim.accum_steps,
    )
    state = jax.eval_shape(init, jax.random.key(0, impl="threefry2x32"))
    shape = (data.batch_size, *data.image_size, data.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "sample": jax.ShapeDtypeStruct((data.batch_size,), jnp.uint32),
    }
    return train_step.lower(
        parallel.with_sharding(state, parallel.replicated(mesh)),
        parallel.with_sharding(batch, parallel.batch_sharding(mesh)),
    ).compile()


def main(argv: list[str] | None = None) -> None:
    """Compiles the configs named on the command line and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compilation", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE")
    parser.add_argument("--target", required=True, help="h200, v5e:2x2, v5p:2x2x1, ...")
    parser.add_argument("--batch", type=int, required=True, help="global batch size")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="setting to change in all of them",
    )
    args = parser.parse_args(argv)
    what = f"{args.target}, batch {args.batch}: compiled, not run"
    print(step.conditions(args.override, what))
    head = ["config", "compile, s", "arguments, GiB", "temporaries, GiB", "collectives"]
    print(step.row(head))
    print(step.row(["---"] * len(head)))
    for path in args.config:
        begin = time.perf_counter()
        compiled = compile_step(
            path, target=args.target,
            overrides=[f"data.batch_size={args.batch}", *args.override],
        )
        seconds = time.perf_counter() - begin
        memory, text = compiled.memory_analysis(), compiled.as_text()
        counts = {
            name: len(re.findall(rf" {name}(?:-start)?\(", text))
            for name in COLLECTIVES
        }
        print(step.row([
            Path(path).stem, f"{seconds:.0f}",
            f"{memory.argument_size_in_bytes / 2**30:.2f}",
            f"{memory.temp_size_in_bytes / 2**30:.2f}",
            ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none",
        ]), flush=True)


if __name__ == "__main__":
    main()
