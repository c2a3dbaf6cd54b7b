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

_SHOWN = 8  # rows of a panel


def evaluate(
    reconstruct: Callable[[features.Batch], visualize.Reconstruction],
    batches: Iterable[features.Batch],
    place: Callable[[features.Batch], features.Batch],
    path: str | pathlib.Path,
    *,
    caption: str,
) -> dict[str, float]:
    """Writes a panel of the first images to `path`; returns the errors of all.

    "mse" is the mean squared error of ALL hidden patches of the valid images, in the
    space of the targets; where some were thrown, "mse_retained" and "mse_thrown" tell
    them apart. The first process writes the picture; all must call this.
    """
    pictures, errors, num_shown = [], [], 0
    for batch in batches:
        batch = place(batch)
        valid, picture = features.to_host((batch["valid"], reconstruct(batch)))
        picture = jax.tree.map(lambda array: array[valid], picture)
        errors.append((picture.error, picture.mask, picture.thrown))
        if num_shown < _SHOWN:  # pictures of a whole split would fill the memory
            pictures.append(picture)
            num_shown += len(picture.image)
    error, mask, thrown = (np.concatenate(arrays) for arrays in zip(*errors))
    if jax.process_index() == 0:
        shown = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:_SHOWN], *pictures)
        visualize.reconstruction_panel(shown, path, caption=caption)
    groups = {"mse": mask}
    if thrown.any():
        groups |= {"mse_retained": mask & ~thrown, "mse_thrown": thrown}
    error = error.astype(np.float64)
    return {name: float(error[group].mean()) for name, group in groups.items()}
