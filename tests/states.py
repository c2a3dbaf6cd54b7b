"""Small states as training saves them, their checkpoints, and damage to these."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crossmae_jax.checkpoints import checkpointer


@flax.struct.dataclass
class State:
    step: jax.Array
    variables: dict[str, Any]
    opt_state: Any


def make_state(value=1.0, *, width=4, dtype=jnp.float32, extra=()):
    """Weights of several dtypes, and the optimiser states that training uses."""
    params = {
        "encoder": {"kernel": jnp.full((8, width), value, dtype),
                    "bias": jnp.array([value, -0.0, jnp.nan, 1e-40], jnp.float32)},
        "head": {"kernel": jnp.full((width, 2), value, jnp.bfloat16)},
        **{name: {"kernel": jnp.ones(3)} for name in extra},
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),  # EmptyState
        optax.adamw(
            lambda step: 0.1 / (step + 1), weight_decay=0.1,
            mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),  # MaskedNode
        ),
    )
    gradient = jax.tree.map(lambda x: jnp.full_like(x, value / 3), params)
    _, opt_state = tx.update(gradient, tx.init(params), params)
    variables = {"params": params, "constants": {"pos_embed": jnp.arange(6.0)}}
    return State(jnp.int32(value), variables, opt_state)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(tree):
    return jax.tree.map(lambda x: (x.dtype.name, x.shape, np.array(x).tobytes()), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert bits(a) == bits(b)


def save_two(directory):
    """Saves steps 10 and 20 of a run, which then has ended."""
    checkpoints = reopen(directory)
    for value in (1, 2):
        checkpoints.save(value * 10, make_state(value))
    checkpoints.close()


@pytest.fixture
def saved(tmp_path):
    """A directory with two steps."""
    save_two(tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def reopen(directory):
    return checkpointer.Checkpoints(directory, keep=2)


def payload(step_directory, item="variables"):
    """The largest file of an item: the one with the arrays."""
    files = [path for path in (step_directory / item).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
