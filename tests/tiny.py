"""Runs of 15 steps on real digits, and what is read of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from configs import digits_cross
from crossmae_jax import train_step
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.distributed import parallel
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.optim import optimizers

ROOT = Path(__file__).parent.parent
# 96 images a step and 1442 in all: 15.02 steps an epoch.
TINY = {
    "epochs": 1.0, "log_every_steps": 4, "baselines": False,
    "model.encoder.size": "W16-D2-H2/4", "model.decoder.dim": 16,
    "model.decoder.depth": 1, "model.decoder.num_heads": 2,
    "optim.warmup_epochs": 0.2, "data.batch_size": 96,
    "data.image_size": (16, 16), "checkpoint.every_epochs": 0.4,
}


def config(digits_dir, evals=None, **changes):
    """Returns the settings of a run of 15 steps; `a__b=c` sets config.a.b."""
    config = digits_cross.get_config()
    config.update_from_flattened_dict(TINY | {"data.data_dir": digits_dir})
    config.evals = evals or {}
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def final_state(config, workdir, steps):
    """Returns the newest saved state, which is of that step."""
    objective = Pretrain(config)
    schedule = optimizers.make_schedule(config, steps_per_epoch=1442 / 96)
    tx = optimizers.make_optimizer(config, schedule)
    abstract = jax.eval_shape(
        lambda key: train_step.init_state(objective, tx, key), jax.random.key(0)
    )
    checkpoints = checkpointer.Checkpoints(workdir / "checkpoints", keep=2)
    everywhere = parallel.replicated(parallel.make_mesh())
    abstract = parallel.with_sharding(abstract, everywhere)
    step, state = checkpoints.restore_latest(abstract)
    checkpoints.close()
    assert step == steps == state.step
    return state


def lines(workdir):
    """Returns what the run has logged."""
    return list(map(json.loads, text(workdir / "metrics.jsonl").splitlines()))


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def start(digits_dir, workdir, devices=8, hold="", **changes):
    """Starts a run in a process of its own, with so many devices; see `holding`."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1", XLA_FLAGS=flags,
        JAX_DEFAULT_MATMUL_PRECISION="highest",
    )
    return subprocess.Popen(
        [
            sys.executable, "-m", "tests.holding", digits_dir, str(workdir),
            repr(changes), hold,
        ],
        cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def text(path):
    """Returns what a file says, "" before there is one."""
    return path.read_text() if path.exists() else ""
