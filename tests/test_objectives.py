"""The seam between an objective and what trains, evaluates and starts it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from benchmarks import step
from crossmae_jax import objectives, train_step
from crossmae_jax.convert import opening, starting
from crossmae_jax.distributed import parallel
from crossmae_jax.objectives.objective import Aux, Objective, Output, Outputs
from tests.saved_runs import save_run, tiny_config


class Counting:
    """An objective that fits a number to the images and counts what it has seen."""

    model, outputs = None, {}
    starts = {"params": ""}

    def init(self, key):
        return {"params": {"w": jnp.zeros(())}, "seen": {"sum": jnp.zeros(())}}

    def loss(self, variables, batch, key):
        error = variables["params"]["w"] - batch["image"]
        seen = variables["seen"]["sum"] + batch["image"].mean()
        return (error**2).mean(), Aux({"error": error.mean()}, {"seen": {"sum": seen}})


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_step_replaces_collections_and_averages_them_over_micro_batches(accum_steps):
    objective, tx = Counting(), optax.sgd(0.25)
    mesh = parallel.make_mesh()
    init, update = train_step.compile_steps(
        objective, tx, mesh, schedule=lambda step: 0.25, key=jax.random.key(0),
        accum_steps=accum_steps,
    )
    image = np.arange(16, dtype=np.float32)
    state, logged = update(
        init(jax.random.key(0)), parallel.place_batch(mesh, {"image": image})
    )
    mean = image.mean()
    assert set(logged) == {
        "loss", "error", "lr", "grad_norm", "skipped_steps", "skipped_in_a_row"
    }
    np.testing.assert_allclose(logged["error"], -mean, rtol=1e-6)
    np.testing.assert_allclose(logged["loss"], (image**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(state.variables["params"]["w"], mean / 2, rtol=1e-6)
    np.testing.assert_allclose(state.variables["seen"]["sum"], mean, rtol=1e-6)


@pytest.mark.parametrize("name, outputs", [
    ("digits_mae", {
        "attention_map", "features", "class_token", "reconstruction",
    }),
    ("finetune_digits", {"features", "class_token", "logits"}),
])
def test_every_objective_keeps_the_protocol(name, outputs):
    config = step.load_config(f"configs/{name}.py", overrides=["init_from=weights"])
    if "num_classes" in config.data:
        config.data.num_classes = 10
    objective = objectives.make(config)
    assert isinstance(objective, Objective)
    assert objective.starts == {"params": "weights"}
    assert set(objective.outputs) == outputs


def test_each_collection_begins_with_its_own_weights(tmp_path):
    first, second = (
        save_run(tmp_path / f"{seed}", "digits_mae", f"seed={seed}") for seed in (1, 2)
    )
    config = tiny_config("digits_mae")
    variables = jax.jit(objectives.make(config).init)(jax.random.key(0))
    table = variables["constants"]["encoder"]
    variables["teacher"] = {"encoder": variables["params"]["encoder"] | table}
    starts = {"params": str(first), "teacher": str(second)}
    begun = variables
    for start in starting.plan_all(starts, variables, config):
        begun = start.apply(begun)
    for collection, path in (("params", first), ("teacher", second)):
        tensors = opening.open_weights(str(path)).tensors
        flat = traverse_util.flatten_dict(begun[collection], sep="/")
        for name, value in flat.items():
            np.testing.assert_array_equal(value, tensors[name].read(), err_msg=name)
    assert starting.plan_all({"params": ""}, variables, config) == []


def test_outputs_of_one_function_are_computed_once():
    calls = []

    def features(variables, batch):
        calls.append("features")
        return {"mean": batch["x"].mean(), "sum": batch["x"].sum()}

    def pictures(variables, batch, key):
        calls.append("pictures")
        return batch["x"] + jax.random.uniform(key)

    outputs = Outputs({
        "mean": Output(features, "mean"), "sum": Output(features, "sum"),
        "pictures": Output(pictures, draws=True),
    })
    batch, key = {"x": jnp.arange(4.0)}, jax.random.key(0)
    found = outputs.together(outputs)({}, batch, key)
    assert calls == ["features", "pictures"]
    assert (found["mean"], found["sum"]) == (1.5, 6.0)
    alone = outputs["pictures"]({}, batch, key)
    np.testing.assert_array_equal(found["pictures"], alone)
    assert outputs["sum"]({}, batch) == 6.0
    with pytest.raises(ValueError, match="No output logits; the model has mean, pict"):
        outputs.together(["mean", "logits"])
