"""The tensors of an item of a step (weights, optimiser), as Orbax has written them."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util

from crossmae_jax.paths import AnyPath

VARIABLES = "variables"
OPTIMIZER = "optimizer"

Leaves = dict[tuple[str, ...], Any]  # by their paths

# Of an array that several devices hold each writes a part. To cut small ones, with one
# operation for each part of each, took most of what a run on eight devices waits for.
_LEAST_PART = 1 << 20  # bytes
_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)  # it warns of what is done on purpose
ocp.type_handlers.register_type_handler(
    jax.Array,
    ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART),
    override=True,
)
logging.set_verbosity(_verbosity)


def stored(item: AnyPath) -> dict[tuple[str, ...], tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of every tensor of an item, by its path."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        tree = handler.metadata(item).tree
    return {
        names: (tuple(leaf.shape), jnp.dtype(leaf.dtype))
        for names, leaf in traverse_util.flatten_dict(tree).items()
    }


def read(item: AnyPath, leaves: Leaves | None = None) -> Leaves:
    """Returns tensors of an item.

    Args:
      leaves: `jax.ShapeDtypeStruct`s with shardings. Default: of all that there are, on
        one device of this process.
    """
    if leaves is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        leaves = {
            names: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
            for names, (shape, dtype) in stored(item).items()
        }
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(item, traverse_util.unflatten_dict(leaves))
    restored = traverse_util.flatten_dict(tree)
    return {names: restored[names] for names in leaves}


def leaf_names(state: Any) -> list[tuple[str, ...]]:
    """Returns the paths of a state's leaves, as names, in the order of its leaves."""
    return [
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]


def by_item(state: Any) -> dict[str, Leaves]:
    """Returns a state's leaves by the item that they are saved in, and their paths.

    Raises:
      ValueError: if it has no field `variables` with arrays in it.
    """
    items: dict[str, Leaves] = {}
    for path, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True):
        if path[:1] == (VARIABLES,):
            items.setdefault(VARIABLES, {})[path[1:]] = leaf
        else:
            items.setdefault(OPTIMIZER, {})[path] = leaf
    bare = any(() in leaves for leaves in items.values())
    if VARIABLES not in items or bare:
        raise ValueError(
            "A state to save or restore needs a field `variables` with arrays in it; "
            f"got {type(state).__name__}."
        )
    return items
