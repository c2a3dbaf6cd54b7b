"""One mesh over all devices, and how arrays lie on it; the only file that makes meshes.

A batch is cut along its first axis over all devices; `sharding` says how parameters and
optimiser state lie. With that the compiled step is one global program: a mean over the
batch is a mean over all devices, on all hosts.

Axes are of type Auto: the compiler chooses the shardings inside the step. Differences
between versions of JAX belong here. One that matters: `jax.make_mesh` makes Explicit
axes in some versions and Auto ones in others, so the mesh is built from its parts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"  # over copies of the state
FSDP_AXIS = "fsdp"  # within one copy of it (crossmae_jax/distributed/sharding.py)


def announce() -> str:
    """Prints and returns `host 0/1, 8 local of 8 devices (cpu)`."""
    line = (
        f"host {jax.process_index()}/{jax.process_count()}, "
        f"{jax.local_device_count()} local of {jax.device_count()} devices "
        f"({jax.default_backend()})"
    )
    print(line, flush=True)
    return line


def say(text: str) -> None:
    """Prints lines for a run, from its first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def make_mesh(
    devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1
) -> Mesh:
    """Returns the mesh of all devices, with those of a slice and a host side by side.

    The data pipeline hands each host a contiguous slice of the batch; in this order the
    slices make up the batch in the order of its sample numbers.

    Args:
      devices: those of the mesh, if not all.
      fsdp: how many devices, side by side, share one copy of the state.
    """
    devices = jax.devices() if devices is None else devices
    # Slices of TPUs are numbered, and so are groups of GPUs with fast links.
    devices = sorted(
        devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id)
    )
    return Mesh(
        np.array(devices).reshape(-1, fsdp), (DATA_AXIS, FSDP_AXIS),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with the mesh in use while it is traced.

    Kernels learn from it how a batch is shared (crossmae_jax/ops/attention_tpu.py). So
    whatever runs a model on the devices of a mesh is jitted as

        jax.jit(within(mesh, function))

    Every call returns another function, whose traces JAX keeps by themselves.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec((DATA_AXIS, FSDP_AXIS)))


def with_sharding(tree: Any, sharding: Any) -> Any:
    """Returns the shapes and dtypes of a tree as abstract arrays that lie so.

    Args:
      sharding: one for all, or a tree of them like `tree`.

    Example:
      with_sharding(jax.eval_shape(init, key), replicated(mesh))
    """
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
        tree, sharding,
    )


def check_batch_size(
    batch_size: int, num_devices: int, *, accum_steps: int = 1
) -> None:
    """Checks that a global batch divides over the devices, and into micro-batches.

    Raises:
      ValueError: if it does not; names the nearest sizes that do.
    """
    if accum_steps < 1:
        raise ValueError(f"accum_steps={accum_steps}; expected at least 1.")
    unit = num_devices * accum_steps
    if batch_size > 0 and batch_size % unit == 0:
        return
    below = batch_size // unit * unit
    nearest = [below, below + unit] if below > 0 else [unit]
    parts = f"{num_devices} devices" + (
        f" x {accum_steps} micro-batches" if accum_steps > 1 else ""
    )
    raise ValueError(
        f"batch_size={batch_size} does not divide over {parts}; nearest: "
        f"{', '.join(map(str, nearest))}."
    )


def place_batch(
    mesh: Mesh, host_batch: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    """Puts this host's slice of a batch on its devices, as part of the global batch.

    Raises:
      ValueError: if the arrays differ in length or do not divide over the devices.
    """
    lengths = {name: len(array) for name, array in host_batch.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"The arrays of a batch must be equally long; got {lengths}.")
    local = next(iter(lengths.values()))
    check_batch_size(local * jax.process_count(), mesh.size)
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in host_batch.items()
    }
