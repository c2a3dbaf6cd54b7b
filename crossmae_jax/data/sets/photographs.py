"""The photographs that come with scikit-image, as folders to train on and to look at.

Crops of some photographs to train on, crops of others to reconstruct: no pixel is in
both. That is enough for a small model to learn how light, edges and textures go on, and
to show how it fills in a photograph that it has never seen; it is no benchmark.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from crossmae_jax import errors, paths
from crossmae_jax.data.sets import writing

TRAIN = (
    "astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "motorcycle_right.png",
)
TEST = ("chelsea.png", "rocket.jpg")


def prepare(directory: str | Path, *, num_train: int = 128, num_test: int = 8) -> None:
    """Writes JPEGs of 160 x 160 pixels to `directory`/train and `directory`/test.

    Always the same ones, so many of each photograph. What is there already stays.

    Raises:
      MissingPackage: if scikit-image is not installed.
    """
    for folder, names, num, smallest in (
        ("train", TRAIN, num_train, 1 / 3), ("test", TEST, num_test, 2 / 3)
    ):
        place = Path(directory).expanduser() / folder
        with writing.into(place):
            _write(place, names, num, smallest)


def _write(place: Path, names: Sequence[str], num: int, smallest: float) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        photograph = read(name)
        random = np.random.default_rng((number, len(names)))
        for i in range(num):
            square = crop(random, photograph, smallest=smallest, size=160)
            path = place / f"{Path(name).stem}_{i:03}.jpg"
            if not path.exists():  # whole or not at all
                file = io.BytesIO()  # PIL does not notice that a disk is full
                square.save(file, "JPEG", quality=92)
                paths.write_whole(path, file.getvalue())


def read(name: str) -> np.ndarray:
    """Returns a photograph of scikit-image, uint8 [height width 3]."""
    try:
        import skimage
    except ImportError:
        raise errors.MissingPackage(
            "The photographs come from scikit-image, which is not installed: pip "
            "install 'crossmae-jax[notebooks]'."
        ) from None
    path = Path(skimage.__file__).parent / "data" / name
    with Image.open(path, formats=("JPEG", "PNG")) as image:
        return np.asarray(image.convert("RGB"))


def crop(
    random: np.random.Generator, photograph: np.ndarray, *, smallest: float, size: int
) -> Image.Image:
    """Returns a square of `smallest` to all of the shorter side, in the given size."""
    height, width, _ = photograph.shape
    side = int(random.uniform(smallest, 1) * min(height, width))
    top, left = (random.integers(0, edge - side + 1) for edge in (height, width))
    square = Image.fromarray(photograph[top : top + side, left : left + side])
    return square.resize((size, size), Image.Resampling.BICUBIC)
