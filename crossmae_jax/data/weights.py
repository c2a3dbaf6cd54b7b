"""Weights of the patches of training images, an array for each, kept in a file.

    numpy.load("step_00012512.npy")    f16 [images rows columns], in the source's order

They lie on a grid over the whole image, whatever part of it a sample shows: see
`transforms.Weighted`. Rows are read where images are, in the loader's processes, and
never the whole file.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from crossmae_jax.data.transforms import Record


# What helps where they are not there or damaged.
CURE = (
    "They belong to the checkpoints from this step on: put the file back, or remove "
    "these checkpoints, so that the run goes on from an earlier one and makes it again."
)


class WithWeights:
    """A source whose records have "weights", too; see `sources.Source`.

    Args:
      source: of the images.
      file: a row for each image.

    Raises:
      ValueError: if the file cannot be read, or is of another number of images.
    """

    def __init__(self, source: Any, file: Path):
        self._source, self._file = source, file
        self._rows: np.ndarray | None = None
        try:
            shape = self._opened().shape
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The weights of the images' patches cannot be read from {file} "
                f"({error}). {CURE}"
            ) from error
        if len(shape) != 3 or shape[0] != len(source):
            raise ValueError(
                f"{file} has weights of the shape {shape}, but there are "
                f"{len(source)} images; expected ({len(source)}, rows, columns)."
            )
        self._rows = None  # each process opens the file itself

    @property
    def kinds(self) -> frozenset[str]:
        return self._source.kinds | {"weights"}

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.classes

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return {**self._source[index], "weights": self._row(index)}

    def name(self, index: int) -> str:
        return self._source.name(index)

    def __repr__(self) -> str:
        return f"{self._source!r} with weights of {self._file}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}  # else pickled as all that it holds

    def _row(self, index: int) -> Float[np.ndarray, "rows columns"]:
        return np.asarray(self._opened()[index], np.float32)

    def _opened(self) -> np.ndarray:
        if self._rows is None:
            self._rows = np.load(self._file, mmap_mode="r", allow_pickle=False)
        return self._rows
