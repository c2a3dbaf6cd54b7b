"""Which image a sample is, and what is drawn for it: functions of (seed, sample).

Samples s = 0, 1, 2, ... are counted over the whole run; with n images

    epoch, position = divmod(s, n)
    image           = permutation(seed, epoch)[position]
    crop, flip, ... = drawn from Philox(key=(seed, s))

Nothing here may ever change: runs that are under way would go on with other batches.
"""

import functools

import numpy as np

from crossmae_jax import ranges


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed from which JAX and NumPy cannot draw alike."""
    ranges.check("seed", seed, least=0, below=2**63)


def shuffled(sample: int, *, num_images: int, seed: int) -> int:
    """Returns the image of a training sample: a new permutation every epoch."""
    epoch, position = divmod(sample, num_images)
    return int(_permutation(num_images, seed, epoch)[position])


def times_met(
    image: int, *, num_samples: int, batch_size: int, process: tuple[int, int],
    num_images: int, seed: int,
) -> int:
    """Returns how many of the first samples of a run were an image, in one process.

    Of several processes only whole epochs of each image are known, not whose they were:
    of an image that this one has met it is then what is to be expected, rounded up.

    Args:
      process: its number and how many there are; each has a slice of every batch.
    """
    number, processes = process
    epoch, done = divmod(num_samples, num_images)
    place = int(np.argmax(_permutation(num_images, seed, epoch) == image))
    row = (epoch * num_images + place) % batch_size
    is_ours = row * processes // batch_size == number
    return -(-epoch // processes) + (place < done and is_ours)


def evenly(sample: int, *, num_images: int, count: int) -> int:
    """Returns the image of an evaluation sample; -1 is padding."""
    return sample * num_images // count if sample < count else -1


def draws(sample: int, *, seed: int) -> np.random.Generator:
    """Returns the random numbers of a training sample, from the first one on."""
    return np.random.Generator(_philox(seed, sample, stream=1))


@functools.lru_cache(maxsize=4)
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    # Raw bits are sorted because NumPy promises a stable stream of bits, but not that
    # permutation() will always make the same use of it.
    bits = _philox(seed, epoch, stream=0).random_raw(num_images)
    return np.argsort(bits, kind="stable").astype(np.uint32)


def _philox(seed: int, number: int, *, stream: int) -> np.random.Philox:
    """Bits for (seed, number); `stream` keeps permutations and crops apart."""
    return np.random.Philox(
        key=np.array([seed, number], np.uint64),
        counter=np.array([0, 0, 0, stream], np.uint64),
    )
