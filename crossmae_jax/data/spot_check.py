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


def unlabelled(source: sources.Source, data: ConfigDict) -> str | None:
    """Returns which of a few images, evenly spread, has no label that is a class.

    None if all have one, or if the source has no labels at all.

    Raises:
      SetupError: if none of them can be read and decoded.
    """
    transform = sources.transform_for(source, data)
    indices = np.linspace(0, len(source) - 1, min(_NUM_IMAGES, len(source)), dtype=int)
    named, reasons = None, []
    for index in indices:
        try:
            record = source[int(index)]
            transform(record, None)
        except (BadImage, OSError) as error:
            reasons.append(str(error))
            continue
        label = record.get("label", 0)
        if source.classes and not 0 <= label < len(source.classes) and named is None:
            named = f"{record['name']} has label {label}"
    if len(reasons) == len(indices):
        raise errors.SetupError(
            f"None of {len(indices)} images of {source!r} can be decoded, first "
            f"{reasons[0]}. Give a split of images."
        )
    return named
