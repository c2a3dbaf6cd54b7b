"""What the model makes of the hidden patches: a picture, and its error in numbers.

The same images and the same masks at every evaluation, so that pictures of two steps
can be laid side by side.
"""

import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np

from crossmae_jax import visualize
from crossmae_jax.evaluators import features


def evaluate(
    reconstruct: Callable[[features.Batch], visualize.Reconstruction],
    batches: Iterable[features.Batch],
    place: Callable[[features.Batch], features.Batch],
    path: str | pathlib.Path,
    *,
    caption: str,
) -> dict[str, float]:
    """Writes the panel of a few images to `path` and returns the mean "mse".

    The error is the training loss on ALL hidden patches of the valid images, in the
    space of the targets. The first process writes the picture; all must call this.
    """
    pictures = []
    for batch in batches:
        batch = place(batch)
        valid, picture = features.to_host((batch["valid"], reconstruct(batch)))
        pictures.append(jax.tree.map(lambda array: array[valid], picture))
    pictures = jax.tree.map(lambda *arrays: np.concatenate(arrays), *pictures)
    if jax.process_index() == 0:
        visualize.reconstruction_panel(pictures, path, caption=caption)
    return {"mse": float(np.mean(pictures.mse, dtype=np.float64))}
