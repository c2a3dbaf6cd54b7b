"""What a data set's images hold, of a few of them: a fingerprint is of names alone.

A run that goes on with other images under the same names would be another run. Reading
all of them takes as long as an epoch; so up to 256 are read, evenly spread over the
data set, and each has a digest of what is stored and of its label. A set that was
scaled, encoded or labelled anew differs in all of them. One image that was changed is
noticed if it is one of these.
"""

import concurrent.futures
import hashlib
from typing import Any

import numpy as np

_NUM_IMAGES = 256
_THREADS = 8  # in a bucket each image is a request
_UNREADABLE = "-"


def digests(source: Any) -> str:
    """Returns a digest of each of a few images of a source, with spaces between them.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        each = pool.map(lambda index: _digest(source, index), _numbers(len(source)))
        return " ".join(each)


def differing(before: str, now: str, *, num_images: int) -> list[int] | None:
    """Returns the numbers of the images whose digests differ.

    None if it cannot be told, because others were looked at then. An image that could
    not be read at one of the times differs from nothing.
    """
    pairs = list(zip(before.split(), now.split()))
    numbers = _numbers(num_images)
    if not len(before.split()) == len(now.split()) == len(numbers):
        return None
    return [
        number for number, pair in zip(numbers, pairs, strict=True)
        if pair[0] != pair[1] and _UNREADABLE not in pair
    ]


def _numbers(num_images: int) -> list[int]:
    count = min(num_images, _NUM_IMAGES)
    return [i * num_images // count for i in range(count)]


def _digest(source: Any, index: int) -> str:
    try:
        record = source[index]
    except OSError:
        return _UNREADABLE
    image = record["image"]
    if isinstance(image, np.ndarray):
        image = f"{image.dtype} {image.shape} ".encode() + image.tobytes()
    digest = hashlib.sha256(f"{record.get('label')} ".encode() + image)
    return digest.hexdigest()[:8]
