"""The train loop: loss -> parameters.

One loop for every objective. A run is described by its config and lives in its workdir;
started again it goes on from its newest checkpoint, and ends with the same weights, bit
for bit, as if it had never stopped: the data order and the masks are functions of
(seed, sample number), and the state holds the rest.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from crossmae_jax import checkpoint, environment, metrics, optim, parallel, workdir
from crossmae_jax.data import pipeline, sources
from crossmae_jax.objectives import OBJECTIVES

REQUEUE = 75  # exit status after SIGTERM: saved, run the same command again


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step."""

    step: Int[Array, ""]
    variables: dict[str, Any]
    opt_state: optax.OptState


def init_state(
    objective: Any, tx: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """Draws the parameters and makes an empty optimiser state."""
    variables = objective.init(key)
    return TrainState(jnp.zeros((), jnp.int32), variables, tx.init(variables["params"]))


def _split(batch: dict[str, Array], parts: int) -> dict[str, Array]:
    """Cuts a batch into micro-batches, each spread over all devices like the batch."""

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def make_train_step(
    objective: Any,
    tx: optax.GradientTransformation,
    *,
    schedule: Callable[[Array], Array],
    key: Key[Array, ""],
    accum_steps: int = 1,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Returns `step(state, batch) -> (state, metrics)`: one update of the parameters.

    With `accum_steps` the batch is worked through in that many parts, one after the
    other, whose gradients are averaged in float32. It is still one step: schedule,
    logs and checkpoints do not change their meaning.
    """

    def step(state, batch):
        def loss(params, part):
            value, aux = objective.loss(
                {**state.variables, "params": params}, part, key
            )
            return value, {"loss": value, **aux}

        def part_gradient(total, part):
            gradient, aux = jax.grad(loss, has_aux=True)(params, part)
            return jax.tree.map(jnp.add, total, (gradient, aux)), None

        params = state.variables["params"]
        if accum_steps == 1:
            gradient, logged = jax.grad(loss, has_aux=True)(params, batch)
        else:
            parts = _split(batch, accum_steps)
            shapes = jax.eval_shape(
                jax.grad(loss, has_aux=True), params, jax.tree.map(lambda x: x[0], parts)
            )
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(part_gradient, zeros, parts)
            gradient, logged = jax.tree.map(lambda x: x / accum_steps, total)
        updates, opt_state = tx.update(gradient, state.opt_state, params)
        variables = {**state.variables, "params": optax.apply_updates(params, updates)}
        logged |= {
            "lr": schedule(state.step), "grad_norm": optax.global_norm(gradient)
        }
        return TrainState(state.step + 1, variables, opt_state), logged

    return step


def _check_finite(logged: dict[str, float], step: int, since: int) -> None:
    bad = [name for name, value in logged.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} not finite at step {step} (still finite at step {since});"
            " nothing was saved since. Usual cures: lower config.optim.base_lr, "
            "config.optim.clip_norm=1.0, config.model.dtype=float32."
        )
