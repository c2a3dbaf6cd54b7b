"""Which steps of a run were skipped, as far as the device has come; see `optim.guard`.

Steps run ahead on the device, and whoever looks at a number waits for its step. So each
step is looked at some steps later, when it is nearly always done. It is the same number
of steps in all processes: what they decide by it they decide at the same step.
"""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

_BEHIND = 4


class Skipped(NamedTuple):
    """A step that was skipped: how many that makes in a row, and in all."""

    step: int
    in_a_row: int
    total: int
    loss: float
    grad_norm: float


class Skips:
    """Finds the steps that were skipped.

    Example:
      skips = Skips()
      found = skips.stepped(7, logged)    # of steps up to 3
      found += skips.look()               # of all
    """

    def __init__(self):
        self._waiting: collections.deque[tuple[int, Mapping[str, Any]]] = (
            collections.deque()
        )

    def stepped(self, step: int, logged: Mapping[str, Any]) -> list[Skipped]:
        """Takes note of a step's metrics; returns those skipped some steps before."""
        logged["skipped_in_a_row"].copy_to_host_async()
        self._waiting.append((step, logged))
        return self._look(_BEHIND)

    def look(self) -> list[Skipped]:
        """Waits for all steps that were made; returns those that were skipped."""
        return self._look(0)

    def _look(self, left: int) -> list[Skipped]:
        found = []
        while len(self._waiting) > left:
            step, logged = self._waiting.popleft()
            if in_a_row := int(logged["skipped_in_a_row"]):
                total = int(logged["skipped_steps"])
                loss, grad_norm = float(logged["loss"]), float(logged["grad_norm"])
                found.append(Skipped(step, in_a_row, total, loss, grad_norm))
        return found
