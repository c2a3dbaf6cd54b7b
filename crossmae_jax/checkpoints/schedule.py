"""At which steps a run saves itself, and which of these checkpoints stay.

The settings count epochs, of which a step is not a whole part. So what stays for good
is counted in saves: with `every_epochs=1.0, keep_every_epochs=50.0` every fiftieth of
them, whatever steps the epochs are rounded to.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from crossmae_jax import ranges


class Schedule(NamedTuple):
    """Steps between two saves, and between two that stay for good; 0: none do."""

    every: int
    keep_every: int

    def saves(self, step: int) -> bool:
        """Says whether a checkpoint is due after a step; one always is at the end."""
        return step % self.every == 0


def of(
    checkpoint: ConfigDict, *, steps_per_epoch: float, total: int
) -> Schedule:
    """Returns the schedule of a run.

    Args:
      checkpoint: `config.checkpoint`.
      total: steps of the whole run.

    Raises:
      ValueError: for a setting that is out of range, or if what is to stay is not one
        of every so many saves.
    """
    epochs, kept = checkpoint.every_epochs, checkpoint.keep_every_epochs
    ranges.check("checkpoint.every_epochs", epochs, least=0)
    ranges.check("checkpoint.keep_every_epochs", kept, least=0)
    every = max(1, round(epochs * steps_per_epoch)) if epochs else total
    if not kept:
        return Schedule(every, 0)
    ratio = kept / epochs if epochs else 0.0
    if round(ratio) < 1 or not math.isclose(ratio, round(ratio), rel_tol=1e-6):
        raise ValueError(
            f"config.checkpoint.keep_every_epochs={kept} must be a multiple of "
            f"checkpoint.every_epochs={epochs}, of whose saves it keeps some for good; "
            "or 0 to keep the newest ones only."
        )
    return Schedule(every, every * round(ratio))
