"""The outputs of an objective, compiled for the devices: what evaluators ask for."""

import functools
from typing import Any

import jax

from crossmae_jax.distributed import parallel
from crossmae_jax.evals import features


class Compiled:
    """Outputs by name, of variables and placed batches.

    Attributes:
      rows: names of those that have a row per image. They are computed in one pass,
        the others one by one.

    Args:
      objective: whose `outputs` they are.
      key: for those that draw, the same at every call: what is drawn, such as masks,
        depends on the samples alone, and pictures of two states can be laid side by
        side.
    """

    def __init__(self, objective: Any, mesh: jax.sharding.Mesh, *, key: jax.Array):
        self._outputs, self._mesh, self._key = objective.outputs, mesh, key
        names = [name for name, output in self._outputs.items() if output.rows]
        self.rows = frozenset(names)
        self._rows = self._jitted(names)
        self._others: dict[str, jax.stages.Wrapped] = {}

    def predict(self, variables: Any, batch: features.Batch) -> dict[str, jax.Array]:
        """Computes all rows."""
        return self._rows(variables, batch, self._key)

    def give(self, variables: Any, name: str, batch: features.Batch) -> Any:
        """Computes one output."""
        return self._other(name)(variables, batch, self._key)[name]

    def of(self, variables: Any) -> dict[str, Any]:
        """Returns what an `Evaluation` of these variables is to be made with."""
        return dict(
            predict=functools.partial(self.predict, variables), rows=self.rows,
            give=functools.partial(self.give, variables),
            captions={name: output.caption for name, output in self._outputs.items()},
        )

    def trace(self, name: str, variables: Any, batch: features.Batch) -> None:
        """Traces what gives an output to an evaluator, without computing it."""
        if name in self.rows:
            self.trace_rows(variables, batch)
        else:
            jax.eval_shape(self._other(name), variables, batch, self._key)

    def trace_rows(self, variables: Any, batch: features.Batch) -> None:
        """Traces the pass for all rows, without computing it."""
        jax.eval_shape(self._rows, variables, batch, self._key)

    def _other(self, name: str) -> jax.stages.Wrapped:
        if name not in self._others:  # a second jit would be traced a second time
            self._others[name] = self._jitted([name])
        return self._others[name]

    def _jitted(self, names: list[str]) -> jax.stages.Wrapped:
        return jax.jit(parallel.within(self._mesh, self._outputs.together(names)))
