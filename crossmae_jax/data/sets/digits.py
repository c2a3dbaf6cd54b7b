"""The 1,797 handwritten digits of scikit-learn as a TFDS data set.

The images (8 x 8, values 0..16; from the UCI optical recognition set, Alpaydin and
Kaynak 1998) are scaled to 0..255 and stored losslessly as PNG. Of every class each
fifth image, in scikit-learn's order, goes to "test", the rest to "train"; nothing is
drawn at random. They are written in ArrayRecord form without TensorFlow and read back
like any other TFDS set, so that the smallest demo and ImageNet share one path.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from crossmae_jax import errors, paths
from crossmae_jax.data.sets import writing

NAME = "sklearn_digits"


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """Builds the data set from the copy inside scikit-learn."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The handwritten digits that scikit-learn ships, 8 x 8.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(8, 8, 1), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        images, labels = _load()
        test = np.zeros(len(labels), bool)
        for label in range(10):
            test[np.flatnonzero(labels == label)[4::5]] = True
        return {
            "train": self._generate_examples(images, labels, np.flatnonzero(~test)),
            "test": self._generate_examples(images, labels, np.flatnonzero(test)),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows.tolist():
            # Encoded here because TFDS would call TensorFlow to encode an array.
            file = io.BytesIO()
            Image.fromarray(images[row]).save(file, "PNG")
            file.seek(0)
            yield row, {"image": file, "label": int(labels[row])}


def prepare(data_dir: str | None = None) -> str:
    """Writes the data set unless it is there.

    It is built beside its place and moved there in one step: several processes may
    call this at once, and none sees half of it.

    Args:
      data_dir: where TFDS sets lie; `~/.cache/crossmae_jax` when None.

    Returns:
      That directory, with `~` resolved.
    """
    if paths.is_remote(data_dir or ""):
        raise errors.SetupError(
            f"data.data_dir={data_dir!r} lies in a bucket, but the digits are written "
            "there first; give a directory on a disk, or leave it out."
        )
    data_dir = os.path.expanduser(data_dir or "~/.cache/crossmae_jax")
    version = os.path.join(data_dir, NAME, str(SklearnDigits.VERSION))
    if os.path.exists(os.path.join(version, "dataset_info.json")):
        return data_dir
    with writing.into(data_dir):
        _build(data_dir, version)
    return data_dir


def _build(data_dir: str, version: str) -> None:
    os.makedirs(os.path.dirname(version), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{NAME}.") as building:
        builder = SklearnDigits(data_dir=building)
        tfds.disable_progress_bar()
        # TFDS announces a download that does not take place.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                file_format="array_record", download_dir=f"{building}/downloads"
            )
        try:
            os.rename(os.path.join(building, NAME, os.path.basename(version)), version)
        except OSError:
            # Another process was first; anything else is a real error.
            if not os.path.exists(os.path.join(version, "dataset_info.json")):
                raise


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 images [1797 8 8] and their labels."""
    try:
        from sklearn import datasets
    except ImportError:
        raise errors.MissingPackage(
            "The digits come from scikit-learn, which is not installed; it is needed "
            "once, to prepare them: pip install 'crossmae-jax[demo]'."
        ) from None
    values, labels = datasets.load_digits(return_X_y=True)
    images = np.rint(values.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    return images, labels
