"""How weights and moments lie on the devices: whole on each, or cut over some.

The mesh has two axes, data x fsdp, and a batch is cut over both. With fsdp = 1 every
device holds the whole state. With more, each group of that many devices shares one
copy: kernels of linear layers, and what an optimiser keeps for each, are cut along
their inputs (fully sharded data parallelism: ZeRO, arXiv 1910.02054, stage 3), or along
their outputs where the inputs do not divide. What else there is, is small, and whole
everywhere.

A layer calls `gathered` where it multiplies by a kernel. So one layer's kernel is whole
at a time, in the type that it computes in, for the forward pass and again for the
gradient where that is inside of what is computed again (config.model.remat); the
gradient goes back to where the weights lie. Beside this only kernels of attention know
of the mesh (crossmae_jax/ops/attention_tpu.py).

Devices of a group lie side by side: in the same host or slice of TPUs, where the group
fits in; the sums over the groups are what crosses to others.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from crossmae_jax.distributed import hardware, parallel

# What is cut, of parameters and of the moments that go by the same names.
_CUT = re.compile(r"(?<!fusion)/kernel$")
_STATE_SHARE = 0.25  # of a device's memory, gradients included; the rest: activations


def _spec(name: str, shape: Sequence[int], fsdp: int) -> PartitionSpec:
    """Returns how a tensor is cut: along its first axis that divides, if at all."""
    if fsdp == 1 or len(shape) != 2 or not _CUT.search(name):
        return PartitionSpec()
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if not axes:
        return PartitionSpec()
    return PartitionSpec(*[None] * axes[0], parallel.FSDP_AXIS)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of every tensor of a state, or of a part of one.

    Args:
      tree: arrays or their shapes, parameters under their names.

    Example:
      shardings(mesh, jax.eval_shape(init, key))
    """
    fsdp = mesh.shape[parallel.FSDP_AXIS]

    def sharding(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _spec(name, x.shape, fsdp))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def gathered(
    kernel: Float[Array | np.ndarray, "i o"], dtype: DTypeLike
) -> Float[Array | np.ndarray, "i o"]:
    """Returns the kernel of a linear layer, whole, in the type to compute in.

    The mesh is the one in use while the layer is traced (`parallel.within`); without
    one, or where the state is whole everywhere, this is the cast alone.
    """
    kernel = kernel.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    fsdp = dict(mesh.shape).get(parallel.FSDP_AXIS, 1)
    spec = _spec("/kernel", kernel.shape, fsdp)
    if spec == PartitionSpec():
        return kernel
    return _gathered(NamedSharding(mesh, spec), kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(cut, kernel):
    # First as it lies, or the compiler might gather before it casts.
    kernel = jax.lax.with_sharding_constraint(kernel, cut)
    whole = NamedSharding(cut.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(kernel, whole)


_gathered.defvjp(
    lambda cut, kernel: (_gathered(cut, kernel), None),
    lambda cut, _, gradient: (jax.lax.with_sharding_constraint(gradient, cut),),
)


def make_mesh(
    config: ConfigDict,
    abstract_state: Any,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Mesh, str]:
    """Returns the mesh that `config.mesh` asks for, and a line on it for the log.

    With `mesh.fsdp=0` the state is cut over as few devices as leave three quarters of
    each one's memory to activations; over one, wherever that is enough. Only such
    numbers are taken as keep a copy within a host, or a slice, or fill whole ones.

    Args:
      abstract_state: shapes of `variables` and of what an optimiser keeps.
      devices: those of the mesh, if not all; they need not be there.

    Raises:
      ValueError: if `mesh.fsdp` does not divide the number of devices.
    """
    if devices is None:
        devices, memory = jax.devices(), _least_memory()
    else:
        memory = hardware.memory(devices[0])
    fsdp, num_devices = config.mesh.fsdp, len(devices)
    if fsdp < 0 or (fsdp and num_devices % fsdp):
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        raise ValueError(
            f"mesh.fsdp={fsdp} does not divide {num_devices} devices; give one of "
            f"{', '.join(map(str, divisors))}, or 0 for an automatic choice."
        )
    compact, reason = _compact(devices), "as config.mesh.fsdp says"
    if not fsdp:
        needed = num_bytes(abstract_state)
        needed += num_bytes(abstract_state.variables["params"])  # gradients
        fsdp, reason = _automatic(needed, memory, compact)
    elif fsdp not in compact:
        reason += "; copies lie across hosts, whose links gathering takes time of"
    mesh = parallel.make_mesh(devices, fsdp=fsdp)
    placement = "whole on every device" if fsdp == 1 else f"cut over {fsdp} devices"
    return mesh, (
        f"{num_devices // fsdp} data x {fsdp} fsdp; weights and moments {placement}, "
        f"{reason}"
    )


def num_bytes(tree: Any) -> int:
    """Returns how much memory the arrays of a tree take, all of each."""
    return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _least_memory() -> int | None:
    """Returns the memory of a device, the least of any host; None if it is not known.

    Only hosts with a device know about it, and all have to come to the same mesh.
    """
    here = hardware.memory(jax.local_devices()[0])
    if jax.process_count() == 1:
        return here
    memories = multihost_utils.process_allgather(np.float32(here or 0))
    return int(memories.min()) or None


def _compact(devices: Sequence[jax.Device]) -> list[int]:
    """Returns sizes of groups that divide the devices and straddle nothing."""
    host = sum(d.process_index == devices[0].process_index for d in devices)
    slices = [getattr(d, "slice_index", 0) for d in devices]
    in_slice, num = slices.count(slices[0]), len(devices)

    def fits(size, unit):
        return unit % size == 0 or size % unit == 0

    return [
        n for n in range(1, num + 1)
        if num % n == 0 and fits(n, host) and fits(n, in_slice)
    ]


def _automatic(
    needed: int, memory: int | None, sizes: list[int]
) -> tuple[int, str]:
    """Returns over how many devices to cut so many bytes of state, and why."""
    if memory is None:
        return 1, (
            "since the memory of these devices is not known (cut them with "
            "config.mesh.fsdp)"
        )
    enough = [n for n in sizes if needed / n <= _STATE_SHARE * memory]
    fsdp = enough[0] if enough else sizes[-1]
    bound = f"at most {_STATE_SHARE:.0%}"
    if not enough:
        bound = f"more than {_STATE_SHARE:.0%}, but there are no more devices"
    return fsdp, (
        f"automatically: with gradients {needed / fsdp / 1e9:.2f} GB of a device's "
        f"{memory / 1e9:.0f} GB, {bound}"
    )
