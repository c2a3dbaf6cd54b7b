"""Runs that stand still somewhere.

As a program, `python -m tests.hanging WHERE DIGITS WORKDIR CHANGES`, a run of
`tiny` with these changes that nothing moves any more in a phase: start, data,
evaluate or save; "" is none. Workers hang as their parent does.
"""

import ast
import multiprocessing
import sys
import threading
import time
from collections.abc import Sequence

from crossmae_jax.commands import session
from crossmae_jax.data import order, pipeline, sources

AT = 4  # the batch that does not come


def _for_ever(*_):
    time.sleep(3600)


def _loading():
    """Says whether this is done for a batch, and not for a look at the data set."""
    of_grain = threading.current_thread().name.startswith("grain")
    return of_grain or multiprocessing.parent_process() is not None


class Held:
    """Digits of which some do not come."""

    def __init__(self, source, held):
        self._source, self._held = source, held

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index in self._held and _loading():
            _for_ever()
        return self._source[index]


@session.command()
def main(argv: Sequence[str]) -> None:
    """Runs, and hangs."""
    from crossmae_jax import train
    from crossmae_jax.checkpoints import checkpointer
    from tests import tiny

    where, digits_dir, workdir, changes = argv
    config = tiny.config(digits_dir, **ast.literal_eval(changes))
    make, size = sources.make_source, config.data.batch_size
    held = {
        order.shuffled(sample, num_images=1442, seed=config.seed)
        for sample in range(size * (AT - 1), size * AT)
    }
    if where == "start":
        sources.make_source = _for_ever
    elif where == "data":
        sources.make_source = lambda data, split, **given: (
            Held(make(data, split, **given), held) if split == "train"
            else make(data, split, **given)
        )
    elif where == "evaluate":
        pipeline.eval_batches = _for_ever
    elif where == "save":
        checkpointer.Checkpoints._write_digests = _for_ever
    with session.joined():
        train.run(config, workdir)


if __name__ == "__main__":
    session.end(main, sys.argv[1:])
