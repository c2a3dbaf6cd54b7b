"""One step: loss -> gradient -> parameters, for every objective alike.

The step is one program over all devices. It knows an objective's `init` and `loss` and
nothing of what they compute. What is not finite is left out, see `optim.guard`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from crossmae_jax.distributed import parallel, sharding
from crossmae_jax.optim import guard, layerwise


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step.

    Attributes:
      skipped: how many steps changed nothing but the step, see `optim.guard`.
    """

    step: Any  # i32[]; like the rest, an array or what stands for one in a tree
    variables: dict[str, Any]
    opt_state: optax.OptState
    skipped: Any = flax.struct.field(default_factory=guard.none_skipped)


Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]


def init_state(
    objective: Any, tx: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """Draws the parameters and makes an empty optimiser state."""
    variables = objective.init(key)
    return TrainState(jnp.zeros((), jnp.int32), variables, tx.init(variables["params"]))


@functools.lru_cache(maxsize=1)
def _drawing(
    objective: Any, tx: optax.GradientTransformation
) -> Callable[[Key[Array, ""]], TrainState]:
    """Returns `init_state` of these two: one function, which JAX traces once."""
    return functools.partial(init_state, objective, tx)


def abstract_state(
    objective: Any, tx: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """Returns the shapes of the state that `init_state` draws."""
    return jax.eval_shape(_drawing(objective, tx), key)


def _split(batch: dict[str, Array], parts: int) -> dict[str, Array]:
    """Cuts a batch into micro-batches, each spread over all devices like the batch."""

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def make_train_step(
    objective: Any,
    tx: optax.GradientTransformation,
    *,
    max_skipped_in_a_row: int | None = None,
    **options: Any,
) -> Step:
    """Returns the step of `make_update`, of which only what is finite counts.

    Args:
      max_skipped_in_a_row: see `optim.guard`.
      options: those of `make_update`.
    """
    update = make_update(objective, tx, **options)
    return guard.guarded(update, max_in_a_row=max_skipped_in_a_row)


def make_update(
    objective: Any,
    tx: optax.GradientTransformation,
    *,
    schedule: Callable[[Array], Array],
    key: Key[Array, ""],
    accum_steps: int = 1,
    log_norms: bool = False,
) -> Step:
    """Returns `step(state, batch) -> (state, metrics)`: one update of the parameters.

    With `accum_steps` the batch is worked through in that many parts, one after the
    other, whose gradients are averaged in float32, and so is what the loss gives
    beside its value. It is still one step: schedule, logs and checkpoints do not change
    their meaning.

    With `log_norms` the metrics have lengths of gradient and update for each part of
    the model, "grad_norm/encoder/blocks_3": see `layerwise.norms`. The update is what
    is added to the weights; of a step that is skipped, what would have been.
    """

    def step(state, batch):
        def loss(params, part):
            value, aux = objective.loss(
                {**state.variables, "params": params}, part, key
            )
            return value, aux._replace(metrics={"loss": value, **aux.metrics})

        def part_gradient(total, part):
            gradient, aux = jax.grad(loss, has_aux=True)(params, part)
            return jax.tree.map(jnp.add, total, (gradient, aux)), None

        params = state.variables["params"]
        if accum_steps == 1:
            gradient, aux = jax.grad(loss, has_aux=True)(params, batch)
        else:
            parts = _split(batch, accum_steps)
            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(jax.grad(loss, has_aux=True), params, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(part_gradient, zeros, parts)
            gradient, aux = jax.tree.map(lambda x: x / accum_steps, total)
        updates, opt_state = tx.update(gradient, state.opt_state, params)
        new = {"params": optax.apply_updates(params, updates), **aux.collections}
        variables = {**state.variables, **new}
        logged = aux.metrics | {
            "lr": schedule(state.step), "grad_norm": optax.tree.norm(gradient)
        }
        if log_norms:
            logged |= layerwise.norms(gradient, prefix="grad_norm/")
            logged |= layerwise.norms(updates, prefix="update_norm/")
        new_state = state.replace(
            step=state.step + 1, variables=variables, opt_state=opt_state
        )
        return new_state, logged

    return step


def compile_steps(
    objective: Any,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    schedule: Callable[[Array], Array],
    key: Key[Array, ""],
    make: Callable[..., Step] = make_train_step,
    **options: Any,
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Returns `init(key) -> state` and the step of `make_train_step`, both jitted.

    Options are those of `make_train_step`, or of `make_update` if that is to `make` it.

    The state lies on the mesh as `sharding` says. A step takes the memory of the state
    that it is given, which cannot be used any more.
    """
    draw = _drawing(objective, tx)
    shardings = sharding.shardings(mesh, jax.eval_shape(draw, key))
    init = jax.jit(draw, out_shardings=shardings)
    step = make(objective, tx, schedule=schedule, key=key, **options)
    step = jax.jit(
        parallel.within(mesh, step), donate_argnums=0,
        out_shardings=(shardings, parallel.replicated(mesh)),
    )
    return init, step
