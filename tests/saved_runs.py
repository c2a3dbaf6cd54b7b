"""Runs for tests of what follows training: drawn weights, saved as a run saves them."""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import step
from crossmae_jax import train_step
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.distributed import parallel
from crossmae_jax.objectives import OBJECTIVES
from crossmae_jax.optim import optimizers
from crossmae_jax.runs import workdir
from tests.test_benchmarks import TINY

STEP = 3


def tiny_config(name: str, *overrides: str) -> ConfigDict:
    """Returns the settings of an experiment with a model of one block."""
    return step.load_config(f"configs/{name}.py", overrides=[*TINY, *overrides])


def save_run(directory: Path, name: str, *overrides: str) -> Path:
    """Makes the workdir of a run of 3 steps, of which none was made."""
    config = tiny_config(name, *overrides)
    schedule = optimizers.make_schedule(config, steps_per_epoch=1.0)
    init, _ = train_step.compile_steps(
        OBJECTIVES[config.objective](config),
        optimizers.make_optimizer(config, schedule),
        parallel.make_mesh(), schedule=schedule, key=jax.random.key(0),
    )
    state = init(jax.random.key(1)).replace(step=jnp.asarray(STEP, jnp.int32))
    workdir.claim(directory, config, dataset={}, resuming=False)
    checkpoints = checkpointer.Checkpoints(directory / "checkpoints", keep=1)
    checkpoints.save(STEP, state, wait=True)
    checkpoints.close()
    return directory
