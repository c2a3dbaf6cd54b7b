"""Small image files and configurations for the tests of the data side."""

import io
import os

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from crossmae_jax.data import decoding


def pixels(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth random pixels: something that JPEG keeps."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, channels)).astype(np.uint8)
    bands = [Image.fromarray(coarse[..., c]) for c in range(channels)]
    bands = [b.resize((width, height), Image.Resampling.BICUBIC) for b in bands]
    return np.stack([np.asarray(b) for b in bands], axis=-1)


def encode(array: np.ndarray, form: str = "PNG", **options) -> bytes:
    """Encodes [height width c] pixels as a file."""
    if array.shape[-1] == 1:
        array = array[..., 0]
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def write(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file and the directories above it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def write_folder(root: os.PathLike, count: int) -> str:
    """Writes JPEGs and PNGs of several sizes in three classes."""
    for k in range(count):
        form = "JPEG" if k % 2 else "PNG"
        content = encode(pixels(k, 20 + k, 50 - k), form)
        write(os.path.join(root, f"class{k % 3}", f"{k:02d}.{form.lower()}"), content)
    return str(root)


def config(**changes) -> ConfigDict:
    """A `data` configuration: a folder of colour images, 16 x 16, batches of 8."""
    return ConfigDict(dict(
        source="folder", name="", data_dir=None, split="train", eval_split="", dir=None,
        eval_dir=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3,
        batch_size=8, transform="classification", crop="ten_tries",
        crop_scale=(0.2, 1.0), flip=True, randaug_ops=0, randaug_magnitude=9.0,
        eval_crop_ratio=0.875, workers=0, max_bad_share=0.001,
        max_pixels=decoding.MAX_PIXELS, max_skipped_share=0.05, interpolation="bicubic",
    ) | changes)
