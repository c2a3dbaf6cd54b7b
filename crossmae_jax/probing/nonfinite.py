"""Makes a step again whose loss or gradient was not finite, and finds what was first.

Every tensor between the modules of a model is looked at, in the order in which they are
computed: batch and weights, what goes into each module and what comes out, the loss,
new statistics; then, from the last module back, the gradient of what came out of each,
and at last the gradients of the weights. Rows of a tensor are images, so the first
tensor that is not finite also names the images it is not finite for.

The gradient of an output is that of zeros that are added to it. Nothing is computed
again to save memory (`model.remat`), or nobody could see inside a block; results are
the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array

from crossmae_jax import errors, objectives, tables
from crossmae_jax.optim import layerwise
from crossmae_jax.runs.replay import Replay

_AROUND = 3  # tensors that are shown before the first bad one, and after it
_MOST_IMAGES = 20
_GRADIENT, _LENGTH = "gradient of ", "length of the gradient"


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """What is known of a tensor of the step.

    Attributes:
      name: "encoder/blocks_3/attn: gradient of the output", for people.
      part: of the model, see `layerwise.part`; "" outside of it.
      largest: the largest magnitude of what is finite.
      finite: whether all of it is, [b] for each image, or one for the whole.
    """

    name: str
    part: str
    largest: float
    finite: np.ndarray

    @property
    def is_bad(self) -> bool:
        """Says whether anything in it is not finite."""
        return not self.finite.all()

    @property
    def rows(self) -> np.ndarray:
        """The images that it is not finite for; none where it is not of images."""
        return np.flatnonzero(~self.finite) if self.finite.ndim else np.array([], int)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All tensors of the step, in the order in which they are computed."""

    replay: Replay
    tensors: list[Tensor]

    @property
    def first_bad(self) -> Tensor | None:
        """The first tensor that is not finite."""
        return next((tensor for tensor in self.tensors if tensor.is_bad), None)

    @property
    def images(self) -> list[int]:
        """Places in the batch of the images that the first bad tensor is bad for.

        All, where it is not of images, such as a parameter; none if there is no such
        tensor.
        """
        bad = self.first_bad
        if bad is None:
            return []
        rows = bad.rows if bad.finite.ndim else range(len(self.replay.names))
        return list(map(int, rows))

    def __str__(self) -> str:
        replay, bad, size = self.replay, self.first_bad, len(self.replay.names)
        lines = [
            f"Step {replay.step}, {size} images, the first of {replay.in_a_row} in a "
            f"row that were not finite; made with JAX {replay.versions['jax']}."
        ]
        if bad is None:
            largest = max(self.tensors, key=lambda tensor: tensor.largest)
            return "\n".join([
                *lines, f"Here, with JAX {jax.__version__} on {_device()}, all "
                f"{len(self.tensors)} tensors are finite: try again on the device that "
                "the run was on, and with its version of JAX. The largest number is "
                f"{largest.largest:.3g}, in {largest.name}.",
            ])
        where = f" (block {bad.part})" if "blocks_" in bad.part else ""
        lines.append(f"First bad tensor: {bad.name}{where}")
        named = self.images if len(self.images) < size else []
        lines.append(f"Images: {len(named) or 'all'} of {size}")
        lines += ["", tables.markdown(self._around())]
        if named:
            lines += ["", tables.markdown(self._named(named))]
        return "\n".join(lines)

    def _around(self) -> tables.Table:
        at = self.tensors.index(self.first_bad)
        shown = self.tensors[max(0, at - _AROUND):at + _AROUND + 1]
        if self.first_bad.name == _LENGTH:  # so what makes it long is of interest
            parts = [x for x in self.tensors if x.name.startswith(_GRADIENT)]
            parts.sort(key=lambda tensor: tensor.largest, reverse=True)
            shown = [*parts[:2 * _AROUND], self.first_bad]
        return tables.Table(
            ("tensor, in the order of computation", "largest finite", "not finite"),
            tuple((x.name, f"{x.largest:.3g}", _extent(x)) for x in shown),
        )

    def _named(self, rows: list[int]) -> tables.Table:
        sample, names = self.replay.batch["sample"], self.replay.names
        lines = [(names[i], str(i), str(sample[i])) for i in rows[:_MOST_IMAGES]]
        if len(rows) > _MOST_IMAGES:
            lines.append((f"and {len(rows) - _MOST_IMAGES} more", "", ""))
        return tables.Table(("image", "place in the batch", "sample"), tuple(lines))


def _extent(tensor: Tensor) -> str:
    if not tensor.is_bad:
        return "-"
    return f"{len(tensor.rows)} images" if tensor.finite.ndim else "yes"


def _device() -> str:
    return jax.local_devices()[0].device_kind


def diagnose(replay: Replay, *, parts: int | None = None) -> Diagnosis:
    """Makes a step again and looks at all of its tensors.

    Args:
      parts: works through the batch in so many; by default as the run did. More take
        less memory, but what images have in common (a batch norm, mixup, a shared mask)
        is then another.

    Raises:
      SetupError: if the batch does not divide into so many.
    """
    config = replay.config.copy_and_resolve_references()
    config.model.remat = "none"
    objective, size = objectives.make(config), len(replay.names)
    parts = config.optim.accum_steps if parts is None else parts
    if parts < 1 or size % parts:
        raise errors.SetupError(
            f"--parts={parts}: expected a number that divides the {size} images of the "
            "batch."
        )
    looked, titles = _looking(objective, replay)
    found, total = [], None
    for part in range(parts):
        batch = {name: array[part::parts] for name, array in replay.batch.items()}
        seen, gradient = jax.device_get(looked(batch))
        found.append(seen)
        total = gradient if total is None else jax.tree.map(np.add, total, gradient)
    joined = jax.tree.map(lambda *x: _joined(x, size), *found, is_leaf=_is_look)
    mean = jax.tree.map(lambda x: np.float32(x / parts), total)
    return Diagnosis(replay, list(_in_order(replay, joined, mean, titles)))


class _Titles(NamedTuple):
    """Module and what of it, of all that is looked at; forward, and in the order of
    the modules' ends.
    """

    forward: list[tuple[str, str]]
    back: list[tuple[str, str]]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Look:
    """What is kept of a tensor: `Tensor` without its name."""

    largest: Any
    finite: Any

    def tree_flatten(self):
        return (self.largest, self.finite), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def _is_look(node: Any) -> bool:
    return isinstance(node, _Look)


def _floats(tree: Any) -> list[Array]:
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _look(tree: Any, size: int | None = None) -> _Look:
    """Looks at all numbers of a tree; by image where they are of so many images."""
    leaves = _floats(tree)
    of_images = bool(leaves) and size is not None and all(
        leaf.ndim and leaf.shape[0] == size for leaf in leaves
    )
    finite = jnp.ones((size,) if of_images else (), bool)
    largest = jnp.zeros(())
    for leaf in leaves:
        is_finite = jnp.isfinite(leaf)
        magnitude = jnp.where(is_finite, jnp.abs(leaf), 0).astype(jnp.float32)
        largest = jnp.maximum(largest, magnitude.max(initial=0.0))
        axes = tuple(range(1, leaf.ndim)) if of_images else None
        finite &= is_finite.all(axis=axes)
    return _Look(largest, finite)


def _joined(looks: tuple[_Look, ...], size: int) -> _Look:
    """Joins what was seen of the parts of a batch, as they were cut."""
    finite = [np.asarray(look.finite) for look in looks]
    if finite[0].ndim:
        finite = np.stack(finite, axis=1).reshape(size)
    else:
        finite = np.all(finite)
    return _Look(np.max([look.largest for look in looks]), finite)


class _Watch:
    """Looks at what goes into the modules of a model and what comes out.

    Args:
      zeros: for each call what is added to its floating outputs; none: nothing is.

    Attributes:
      seen: what was looked at, in order, and `titles` module and what of it that is.
      outputs: titles of the gradients of what came out, and `shapes` zeros like that.
    """

    def __init__(self, size: int, zeros: list[list[Array]] | None = None):
        self.size, self.zeros = size, zeros
        self.titles: list[tuple[str, str]] = []
        self.seen: list[_Look] = []
        self.outputs: list[tuple[str, str]] = []
        self.shapes: list[list[Array]] = []

    def __call__(self, function: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return function(*args, **kwargs)
        module = "/".join(context.module.path) or "model"
        before = self.titles.count((module, "input"))
        self.titles.append((module, "input"))
        self.seen.append(_look((args, kwargs), self.size))
        out = function(*args, **kwargs)
        number = len(self.outputs)
        again = f" (call {before + 1})" if before else ""
        self.titles.append((module, f"output{again}"))
        self.seen.append(_look(out, self.size))
        self.outputs.append((module, f"gradient of the output{again}"))
        self.shapes.append([jnp.zeros(x.shape, x.dtype) for x in _floats(out)])
        if self.zeros is None:
            return out
        added = iter(self.zeros[number])
        return jax.tree.map(
            lambda x: x + next(added)
            if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, out,
        )


def _looking(objective: Any, replay: Replay) -> tuple[Callable[..., Any], _Titles]:
    """Returns a function that looks at all of the step of a batch, and what at.

    The function returns what it saw, and the gradient of the weights. The titles are
    there once the function was called.
    """
    titles = _Titles([], [])
    params = replay.variables["params"]

    def loss(params, zeros, batch):
        watch = _Watch(len(batch["sample"]), zeros)
        with nn.intercept_methods(watch):
            value, aux = objective.loss(
                {**replay.variables, "params": params}, batch, replay.key
            )
        titles.forward[:], titles.back[:] = watch.titles, watch.outputs
        seen = {
            "batch": {name: _look(x, watch.size) for name, x in batch.items()},
            "modules": watch.seen,
            "results": {"loss": _look(value)} | {
                name: _look(x) for name, x in _flat(aux.metrics | aux.collections)
            },
        }
        return value, (seen, watch.shapes)

    @jax.jit
    def looked(params, batch):
        unseen = functools.partial(loss, zeros=None)
        _, (_, shapes) = jax.eval_shape(unseen, params, batch=batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradient, back), (seen, _) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            params, zeros, batch
        )
        size = len(batch["sample"])
        return seen | {"back": [_look(x, size) for x in back]}, gradient

    return functools.partial(looked, params), titles


def _flat(tree: Any) -> list[tuple[str, Any]]:
    """Returns what is in nested dicts by whole names, in the order of the dicts."""
    return list(traverse_util.flatten_dict(dict(tree), sep="/").items())


def _in_order(
    replay: Replay, seen: dict[str, Any], gradient: Any, titles: _Titles
) -> Iterator[Tensor]:
    """Yields all tensors in the order in which they are computed."""

    def tensor(name: str, look: _Look, part: str = "") -> Tensor:
        return Tensor(name, part, float(look.largest), np.asarray(look.finite))

    def of_module(title: tuple[str, str], look: _Look) -> Tensor:
        module, what = title
        return tensor(f"{module}: {what}", look, layerwise.part(f"{module}/"))

    def place(name_and_value: tuple[str, Any]) -> int:
        """When the module of a parameter is called: the innermost that is known."""
        modules = name_and_value[0].split("/")[:-1]
        while modules and "/".join(modules) not in called:
            modules.pop()
        return called["/".join(modules)] if modules else -1

    called: dict[str, int] = {}
    for i, (module, _) in enumerate(titles.forward):
        called.setdefault(module, i)
    for name, look in seen["batch"].items():
        yield tensor(f"batch: {name}", look)
    for collection, tree in replay.variables.items():
        title = "parameter" if collection == "params" else collection
        for name, value in sorted(_flat(tree), key=place):
            yield tensor(f"{title} {name}", _look(value), layerwise.part(name))
    yield from map(of_module, titles.forward, seen["modules"])
    for name, look in seen["results"].items():
        yield tensor(name, look)
    yield from map(of_module, reversed(titles.back), reversed(seen["back"]))
    for name, value in sorted(_flat(gradient), key=place, reverse=True):
        yield tensor(f"{_GRADIENT}{name}", _look(value), layerwise.part(name))
    yield tensor(_LENGTH, _look(optax.tree.norm(gradient)))
