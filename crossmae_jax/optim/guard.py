"""Steps whose loss or gradient is not finite change nothing, and are counted.

    finite    loss, length of the gradient, and new statistics such as a batch norm's
    skipped   what is not: weights, moments and statistics stay as they were

It is decided inside the compiled step, by numbers that all devices have anyway; nobody
waits for anybody. The price is that no weight can be changed before the last gradient
is there, so that all gradients are in memory at once. A gradient whose length overflows
counts as not finite: its square, a moment, would be infinite. Of a batch in
micro-batches one bad part makes the whole step bad.

The step itself is counted, skipped or not: which images come next is a function of it,
and so is the learning rate. An optimiser keeps a count for its schedule; that one goes
on, too, or the rate that is applied would stay behind the one that is logged. (The
count that corrects Adam's moments for their start is one of theirs, and stays.)

A run can be left alone: with a limit the state does not change any more once so many
steps in a row were skipped. Whoever looks later finds the weights that they were
skipped with.

What is not seen: an update that overflows though its gradient is finite, which takes a
rate of some 1e30. The steps after it are skipped.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from crossmae_jax import ranges

Step = Callable[[Any, dict[str, Array]], tuple[Any, dict[str, Array]]]


def none_skipped() -> dict[str, Int[Array, ""]]:
    """Returns the counts of a state that is new: in all, and in a row until now."""
    return {name: jnp.zeros((), jnp.int32) for name in ("total", "in_a_row")}


def guarded(step: Step, *, max_in_a_row: int | None = None) -> Step:
    """Returns the step, of which only what is finite counts.

    Args:
      step: (state, batch) -> (state, metrics), with "loss" and "grad_norm" among the
        metrics. The state has `step`, `variables`, `opt_state`, and in `skipped` what
        `none_skipped` returns.
      max_in_a_row: after so many skipped steps in a row the state stays as it is,
        `step` included; None: never.

    Returns:
      The step; its metrics also have "skipped_steps" and "skipped_in_a_row".

    Raises:
      ValueError: if the limit is below 1.
    """
    if max_in_a_row is not None:
        ranges.check("optim.max_skipped_in_a_row", max_in_a_row, least=1)

    def guarded_step(state, batch):
        new, logged = step(state, batch)
        total, in_a_row = state.skipped["total"], state.skipped["in_a_row"]
        going = jnp.asarray(True)
        if max_in_a_row is not None:
            going = in_a_row < max_in_a_row
        finite = _finite(new, state, logged)
        good, bad = going & finite, going & ~finite
        skipped = {
            "total": total + bad, "in_a_row": jnp.where(good, 0, in_a_row + bad)
        }
        state = state.replace(
            step=jnp.where(going, new.step, state.step),
            variables=_chosen(good, new.variables, state.variables),
            opt_state=_chosen_state(good, going, new.opt_state, state.opt_state),
            skipped=skipped,
        )
        return state, logged | {
            "skipped_steps": skipped["total"], "skipped_in_a_row": skipped["in_a_row"]
        }

    return guarded_step


def _finite(new: Any, old: Any, logged: dict[str, Array]) -> Bool[Array, ""]:
    finite = jnp.isfinite(logged["loss"]) & jnp.isfinite(logged["grad_norm"])
    for name, tree in new.variables.items():
        if name == "params":  # finite if what they come from is
            continue
        before = map(id, jax.tree.leaves(old.variables.get(name)))
        for leaf in _changed(tree, set(before)):
            finite &= jnp.isfinite(leaf).all()
    return finite


def _changed(tree: Any, before: set[int]) -> list[Array]:
    return [
        leaf for leaf in jax.tree.leaves(tree)
        if id(leaf) not in before and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def _chosen(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns one of two trees; what is the same in both is not touched."""
    return jax.tree.map(
        lambda x, y: x if x is y else jnp.where(condition, x, y), new, old
    )


def _chosen_state(
    good: Bool[Array, ""], going: Bool[Array, ""], new: Any, old: Any
) -> Any:
    """Returns the new state of an optimiser or the old; counts of schedules go on."""

    def is_count(node):
        return isinstance(node, optax.ScaleByScheduleState)

    def chosen(x, y):
        return _chosen(going if is_count(x) else good, x, y)

    return jax.tree.map(chosen, new, old, is_leaf=is_count)
