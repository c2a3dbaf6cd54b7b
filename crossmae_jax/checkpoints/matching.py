"""In what a checkpoint and a model differ, in words; and what only seems to differ."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from crossmae_jax.paths import AnyPath

_MAX_NAMES = 10  # tensors named per kind of difference

Name = tuple[str, ...]  # the item, then the tensor's path in it
Tensors = Mapping[Name, tuple[tuple[int, ...], Any]]  # shape and type


def absent(
    wanted: dict[Name, Any], stored: Callable[[], Iterable[Name]],
    younger: Iterable[str],
) -> dict[Name, jax.Array]:
    """Takes what a step lacks of some fields out of `wanted`, and returns zeros for it.

    Args:
      wanted: `jax.ShapeDtypeStruct`s with shardings, by path.
      stored: returns the paths that the step has; called if they matter.
      younger: fields, the first names of paths, that older steps do not have.
    """
    zeros = {}
    asked = {name for name in wanted if name[0] in younger}
    for name in asked.difference(stored()) if asked else ():
        leaf = wanted.pop(name)
        blank = np.zeros(leaf.shape, leaf.dtype)
        zeros[name] = jax.make_array_from_callback(
            leaf.shape, leaf.sharding, blank.__getitem__
        )
    return zeros


def differences(path: AnyPath, stored: Tensors, wanted: Tensors) -> str:
    """Returns what differs both ways, the likely reason, and what to do about it.

    Args:
      path: of the checkpoint.
      stored: the tensors that it holds.
      wanted: the tensors that the model asks for.
    """
    both = wanted.keys() & stored.keys()
    only_stored = sorted(stored.keys() - wanted.keys())
    only_wanted = sorted(wanted.keys() - stored.keys())
    shapes = sorted(name for name in both if wanted[name][0] != stored[name][0])
    dtypes = sorted(name for name in both if wanted[name][1] != stored[name][1])
    reason = _likely_reason(only_stored + only_wanted, shapes, dtypes)
    return (
        f"Checkpoint {path} does not fit the model: {len(both)} tensors have the same "
        f"name, {len(only_stored)} are only in the checkpoint, {len(only_wanted)} only "
        "in the model."
        + _section("only in the checkpoint", only_stored, lambda n: stored[n][0])
        + _section("only in the model", only_wanted, lambda n: wanted[n][0])
        + _section("other shape", shapes, lambda n:
                   f"checkpoint {stored[n][0]}, model {wanted[n][0]}")
        + _section("other dtype", dtypes, lambda n:
                   f"checkpoint {stored[n][1]}, model {wanted[n][1]}")
        + f"\nLikely reason: {reason}."
        + "\nUse the configuration that the run was started with (config.json in its "
        "workdir), or a new --workdir."
    )


def _section(
    title: str, names: Sequence[Name], describe: Callable[[Name], Any]
) -> str:
    if not names:
        return ""
    lines = [f"\n    {'/'.join(name[1:])}  {describe(name)}" for name in
             names[:_MAX_NAMES]]
    rest = len(names) - _MAX_NAMES
    more = f"\n    ... and {rest} more" if rest > 0 else ""
    return f"\n  {title} ({len(names)}):{''.join(lines)}{more}"


def _likely_reason(
    missing: list[Name], shapes: list[Name], dtypes: list[Name]
) -> str:
    if all(name[0] == "optimizer" for name in missing + shapes + dtypes):
        return "the optimiser changed (optim.*); the weights fit"
    if not missing and not shapes:
        return "the weights are kept in another precision"
    if not missing:
        return (
            "the model has other widths, patches, image size or channels "
            "(model.encoder.size, model.decoder.dim, data.image_size, data.channels)"
        )
    return (
        "the model has other parts or another depth (model.encoder.size, "
        "model.decoder.depth, model.fusion.maps, or the kind of one of them)"
    )
