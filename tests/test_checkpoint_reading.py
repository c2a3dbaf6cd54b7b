"""Checkpoints are read by name, for another model not at all, and damaged ones never.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import struct

from crossmae_jax.checkpoints import checkpointer
from tests.states import (
    abstract,
    assert_same,
    flip,
    make_state,
    payload,
    reopen,
    saved,
)

__all__ = ["saved"]  # a fixture

ROOT = Path(__file__).parent.parent


@struct.dataclass
class Large:
    """A state of 226 MB, in the shapes of a model's."""

    variables: dict
    opt_state: dict

    @classmethod
    def make(cls, leaf):
        """Makes weights and two moments of them, each array by `leaf(shape)`."""
        mu, nu, params = (
            {f"kernel_{i}": leaf((1024, 768)) for i in range(24)} for _ in range(3)
        )
        return cls({"params": params}, {"mu": mu, "nu": nu})


def _megabytes(key):
    """Returns what the system says of this process' memory."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1e3


def restore_large(directory):
    """Restores such a state, in a process of its own; prints what it took, in MB."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = Large.make(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)
    )
    checkpoints = checkpointer.Checkpoints(directory, keep=1)
    before = _megabytes("VmRSS")
    _, state = checkpoints.restore_latest(like)
    assert all(leaf[0, 0] == 1 for leaf in jax.tree.leaves(state))
    print(_megabytes("VmHWM") - before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_to_restore_takes_no_second_copy_of_the_state(tmp_path):
    """A step takes its gradients beside the state, and a save a copy of all of it."""
    state = Large.make(jnp.ones)
    checkpoints = checkpointer.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, wait=True)
    checkpoints.close()
    code = (
        "from tests import test_checkpoint_reading\n"
        f"test_checkpoint_reading.restore_large({str(tmp_path)!r})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert ran.returncode == 0, ran.stderr
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    # And some 100 MB that its libraries take when they are first used.
    assert size < float(ran.stdout) < 2 * size


MISMATCHES = {
    "wider model": (
        dict(width=5), ["other shape (6)", "encoder/kernel  checkpoint (8, 4), model "
                        "(8, 5)", "model.encoder.size"]),
    "other dtype": (
        dict(dtype=jnp.bfloat16), ["other dtype (3)", "checkpoint float32, model "
                                   "bfloat16", "another precision"]),
    "more parts": (
        dict(extra=["decoder"]), ["only in the model (3)", "model.decoder",
                                  "params/decoder/kernel  (3,)"]),
    "many more parts": (
        dict(extra=[f"block_{i}" for i in range(20)]),
        ["only in the model (60)", "... and 50 more"]),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_other_model_is_an_error_that_prints_the_difference(saved, mismatch):
    changes, texts = MISMATCHES[mismatch]
    with pytest.raises(checkpointer.MismatchError) as caught:
        reopen(saved).restore_latest(abstract(make_state(**changes)))
    for text in texts:
        assert text in str(caught.value)
    # Not taken for damage: nothing older was tried, nothing was put aside.
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20"]


def test_tensors_only_in_the_checkpoint_are_named(saved):
    state = make_state()
    smaller = state.replace(
        variables={"params": state.variables["params"]}, opt_state=()
    )
    with pytest.raises(checkpointer.MismatchError) as caught:
        reopen(saved).restore_latest(abstract(smaller))
    assert "only in the checkpoint" in str(caught.value)
    assert "constants/pos_embed  (6,)" in str(caught.value)


def test_changed_optimiser_is_told_from_a_changed_model(saved):
    with pytest.raises(checkpointer.MismatchError, match="optimiser changed"):
        reopen(saved).restore_latest(abstract(make_state().replace(opt_state=())))


def test_variables_are_read_without_config_or_optimiser(saved):
    shutil.rmtree(saved / "20" / "optimizer")  # weights alone are enough
    variables = checkpointer.restore_variables(saved)
    assert_same(variables, make_state(2).variables)
    assert_same(checkpointer.restore_variables(saved, step=10), make_state(1).variables)
    target = abstract(make_state().variables)
    assert_same(checkpointer.restore_variables(saved, target), make_state(2).variables)
    with pytest.raises(checkpointer.MismatchError, match="encoder/kernel"):
        checkpointer.restore_variables(saved, abstract(make_state(width=5).variables))


def test_variables_of_a_damaged_step_are_not_returned(saved, capsys):
    flip(payload(saved / "20"))
    assert_same(checkpointer.restore_variables(saved), make_state(1).variables)
    assert "Skipping checkpoint 20" in capsys.readouterr().out
    assert (saved / "20").exists()  # reading changes nothing on disk
    with pytest.raises(
        checkpointer.RestoreError, match="Step 20 .* is damaged: digest"
    ):
        checkpointer.restore_variables(saved, step=20)


def test_reading_from_a_directory_without_checkpoints_says_what_is_there(saved):
    with pytest.raises(checkpointer.RestoreError, match="found checkpoints instead"):
        checkpointer.restore_variables(saved.parent)
    with pytest.raises(checkpointer.RestoreError, match="no such directory"):
        checkpointer.restore_variables(saved / "nowhere")
    with pytest.raises(
        checkpointer.RestoreError, match=r"No step 5 .* steps \[10, 20\]"
    ):
        checkpointer.restore_variables(saved, step=5)
