"""A look at a few images of a split, before anything is computed.

That a split has no labels, or that none of its images can be decoded, would else be
found where it is first read: for images to evaluate on, after hours of training.
"""

import numpy as np
from ml_collections import ConfigDict

from crossmae_jax import errors
from crossmae_jax.data import sources
from crossmae_jax.data.decoding import BadImage

_NUM_IMAGES = 16


def unlabelled(
    source: sources.Source, data: ConfigDict, *, all_needed: bool
) -> str | None:
    """Says of a split that its images have no labels, as far as a few of them tell.

    They are evenly spread. None if all are well, or if the source has no labels at all.

    Args:
      all_needed: whether each image must have one. Else one of these few is enough:
        evaluations leave out images without a label.

    Raises:
      SetupError: if none of them can be read and decoded, or one has a label that is
        no class.
    """
    transform = sources.transform_for(source, data)
    indices = np.linspace(0, len(source) - 1, min(_NUM_IMAGES, len(source)), dtype=int)
    labels, reasons = {}, []
    for index in indices:
        try:
            record = source[int(index)]
            transform(record, None)
        except (BadImage, OSError) as error:
            reasons.append(str(error))
            continue
        labels[record["name"]] = record.get("label", 0)
    if len(reasons) == len(indices):
        raise errors.SetupError(
            f"None of {len(indices)} images of {source!r} can be decoded, first "
            f"{reasons[0]}. Give a split of images."
        )
    if not source.classes:
        return None
    for name, label in labels.items():
        if label >= len(source.classes):
            raise errors.SetupError(
                f"{name} has label {label}, which is none of the classes 0 to "
                f"{len(source.classes) - 1} of {source!r}. Prepare the data again."
            )
    without = [name for name, label in labels.items() if label < 0]
    if len(without) < (1 if all_needed else len(labels)):
        return None
    return (
        f"{len(without)} of {len(labels)} images of {source!r} that were looked at "
        f"have none, first {without[0]}"
    )
