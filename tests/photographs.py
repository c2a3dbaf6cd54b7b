"""A labelled folder of real photographs, out of those in scikit-image's own wheel.

A photograph is a class and its images are random crops: from the left part of the
photograph to train on, from the right part to test on. No pixel is in both, but
neighbouring parts of a photograph have the same light, colours and textures.
"""

from pathlib import Path

import numpy as np

from crossmae_jax.data.sets import photographs

NAMES = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "rocket.jpg",
)
_TRAIN_SHARE = 0.6  # of the width


def write(
    directory: Path, *, num_train: int, num_test: int, size: int
) -> tuple[Path, Path]:
    """Writes JPEGs of `size` x `size` pixels, so many of each class, always the same.

    Returns:
      The folders to train on and to test on, each with a folder per class.
    """
    folders = directory / "train", directory / "test"
    for number, name in enumerate(NAMES):
        random = np.random.default_rng(number)
        photograph = photographs.read(name)
        middle = round(_TRAIN_SHARE * photograph.shape[1])
        parts = photograph[:, :middle], photograph[:, middle:]
        for folder, part, count in zip(folders, parts, (num_train, num_test)):
            images = folder / Path(name).stem
            images.mkdir(parents=True)
            for i in range(count):
                square = photographs.crop(random, part, smallest=1 / 3, size=size)
                square.save(images / f"{i:03}.jpg", quality=90)
    return folders
