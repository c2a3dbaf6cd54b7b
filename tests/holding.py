"""Images that are not read as long as somebody waits for them.

As a program, `python -m tests.holding DIGITS WORKDIR CHANGES STEP`, a run of
`tiny`, with these changes, that waits for the images of a step; "": it does not.
"""

import ast
import sys
import threading
import time

from ml_collections import ConfigDict

from crossmae_jax.data import batches, order, sources


def images(config: ConfigDict, step: str) -> None:
    """Holds the images of a run's step back; "" holds none.

    Only from the loader's threads, and until these are left to themselves.
    """
    if not step:
        return
    batches._PATIENCE, read = 0.5, sources.TfdsSource.__getitem__
    number, size = int(step), config.data.batch_size
    held = {
        order.shuffled(sample, num_images=1442, seed=config.seed)
        for sample in range(size * (number - 1), size * number)
    }

    def hold(source, index):
        loading = threading.current_thread().name.startswith("grain")
        while loading and index in held and not batches.any_left_behind():
            time.sleep(0.1)
        return read(source, index)

    sources.TfdsSource.__getitem__ = hold


if __name__ == "__main__":
    from crossmae_jax import train
    from tests import tiny

    run_config = tiny.config(sys.argv[1], **ast.literal_eval(sys.argv[3]))
    images(run_config, sys.argv[4])
    train.run(run_config, sys.argv[2])
