"""One update: over devices, in micro-batches, in the memory of the state before."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crossmae_jax import train_step
from crossmae_jax.data import pipeline, sources
from crossmae_jax.distributed import parallel
from crossmae_jax.objectives.objective import Aux
from crossmae_jax.objectives.pretrain import Pretrain
from tests import tiny


def _step(config, accum_steps):
    objective = Pretrain(config)
    tx = optax.sgd(1.0)
    key = jax.random.key(0, impl="threefry2x32")
    state = train_step.init_state(objective, tx, key)
    step = train_step.make_train_step(
        objective, tx, schedule=lambda step: 1.0, key=key, accum_steps=accum_steps
    )
    source = sources.make_source(config.data, "train")
    with pipeline.train_batches(
        source, config.data, seed=0, start_step=0, num_steps=1
    ) as batches:
        batch = parallel.place_batch(parallel.make_mesh(), next(batches))
    return jax.jit(step)(state, batch)


def test_compiled_steps_hold_the_state_whole_everywhere_and_reuse_its_memory():
    class Square:
        def init(self, key):
            return {"params": {"w": jax.random.normal(key, (8,))}}

        def loss(self, variables, batch, key):
            return jnp.mean((variables["params"]["w"] - batch["x"]) ** 2), Aux({})

    mesh, key = parallel.make_mesh(), jax.random.key(0)
    init, step = train_step.compile_steps(
        Square(), optax.sgd(1.0), mesh, schedule=lambda step: 1.0, key=key
    )
    state = init(key)
    before = np.asarray(state.variables["params"]["w"]).copy()
    new, _ = step(state, parallel.place_batch(mesh, {"x": np.zeros(8)}))
    # The gradient of the mean of w^2 over 8 entries is w / 4.
    np.testing.assert_allclose(new.variables["params"]["w"], 0.75 * before, rtol=1e-6)
    for leaf in jax.tree.leaves(new):
        assert leaf.sharding.is_equivalent_to(parallel.replicated(mesh), leaf.ndim)
    assert state.variables["params"]["w"].is_deleted()


def test_how_the_state_is_drawn_is_traced_once():
    traced = []

    class Weight:
        def init(self, key):
            traced.append(key)
            return {"params": {"w": jax.random.normal(key, (8,))}}

    objective, tx, key = Weight(), optax.sgd(1.0), jax.random.key(0)
    abstract = train_step.abstract_state(objective, tx, key)
    init, _ = train_step.compile_steps(
        objective, tx, parallel.make_mesh(), schedule=lambda step: 1.0, key=key
    )
    assert jax.tree.map(jnp.shape, init(key)) == jax.tree.map(jnp.shape, abstract)
    assert len(traced) == 1


def test_accumulated_micro_batches_give_the_update_of_the_whole_batch(digits_dir):
    config = tiny.config(digits_dir)
    whole, logged = _step(config, 1)
    parts, logged_parts = _step(config, 4)
    assert parts.step == whole.step == 1
    for name in ("loss", "loss_trivial", "grad_norm"):
        np.testing.assert_allclose(logged[name], logged_parts[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        whole.variables, parts.variables,
    )


def test_micro_batches_are_spread_over_all_devices():
    batch = {"x": jnp.arange(16)}
    parts = train_step._split(batch, 2)["x"]
    np.testing.assert_array_equal(parts, [list(range(0, 16, 2)), list(range(1, 16, 2))])
