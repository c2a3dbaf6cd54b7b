"""Weights for tests, drawn by NumPy.

How a module draws its own takes a program that is compiled for seconds, and most tests
want any weights at all.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def variables(init: Callable[..., Any], *inputs: Any) -> dict[str, Any]:
    """Returns variables like those of `init(key, *inputs)`, with other weights.

    Kernels are uniform and keep the size of what they are given, scales are 1, biases
    0, whatever else is small. What is no parameter, such as tables of positions, is
    what `init` makes of it.
    """
    like = {}

    def others(key, *inputs):
        made = dict(init(key, *inputs))
        like.update(jax.eval_shape(lambda: made.pop("params")))
        return made

    rest = jax.jit(others)(jax.random.key(0), *inputs)
    random = np.random.default_rng(0)

    def draw(path, x):
        name = path[-1].key
        if name == "scale" or x.ndim < 2 and name != "bias":
            return np.ones(x.shape, x.dtype)
        if name == "bias":
            return np.zeros(x.shape, x.dtype)
        size = (x.size / x.shape[-1] + x.shape[-1]) if name == "kernel" else 1e4
        bound = np.sqrt(6 / size)
        return random.uniform(-bound, bound, x.shape).astype(x.dtype)

    params = jax.tree_util.tree_map_with_path(draw, like)
    return jax.tree.map(jax.numpy.asarray, {"params": params, **rest})
