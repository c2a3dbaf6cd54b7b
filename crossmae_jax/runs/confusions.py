"""Which classes a classifier takes for which: counted, kept in a file, and shown.

A file has a row for each pair that occurs, of a thousand classes some thousand rows:

    class,taken_for,images
    cat,cat,41
    cat,dog,9

The images of a class are the sum of its rows, the share of those where both are the
same is top-1. Names are as the data set has them, in UTF-8.
"""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from crossmae_jax import errors, paths
from crossmae_jax.paths import AnyPath
from crossmae_jax.tables import Table, counted

FOLDER = "confusions"  # of a run; a report of one state has one file, FOLDER.csv
_HEADER = ["class", "taken_for", "images"]
_SHOWN = 5


class Pair(NamedTuple):
    """How many images of a class were taken for another, or for itself."""

    name: str
    taken_for: str
    images: int


class Frequent(NamedTuple):
    """How many images of a class, of how many, were taken for another."""

    name: str
    taken_for: str
    images: int
    of: int


def count(
    labels: Int[np.ndarray, "n"], taken: Int[np.ndarray, "n"], classes: Sequence[str]
) -> list[Pair]:
    """Counts the pairs that occur, in the order of the classes.

    Args:
      labels: numbers of the true classes; `taken` of those that ranked first.
    """
    pairs, images = np.unique(
        np.stack([labels, taken], axis=1), axis=0, return_counts=True
    )
    return [
        Pair(classes[label], classes[first], number)
        for (label, first), number in zip(pairs.tolist(), images.tolist(), strict=True)
    ]


def write(path: AnyPath, pairs: Sequence[Pair]) -> None:
    """Writes a file, whole."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_HEADER, *pairs])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of folders need not be text.
    paths.write_whole(path, text.getvalue().encode(errors="surrogateescape"))


def read(path: AnyPath) -> list[Pair]:
    """Reads a file.

    Raises:
      SetupError: if it is none of these.
    """
    text = path.read_bytes().decode(errors="surrogateescape")
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        if header != _HEADER:
            raise ValueError(f"it begins with {header}")
        return [Pair(*row[:-1], int(row[-1])) for row in rows]
    except (csv.Error, IndexError, TypeError, ValueError) as error:
        raise errors.SetupError(
            f"{path} is no table of {','.join(_HEADER)}: {error}; remove it, the next "
            "evaluation writes it again."
        ) from error


def newest(directory: AnyPath) -> AnyPath | None:
    """Returns the newest file of a run, by its step."""
    folder = directory / FOLDER
    files = folder.iterdir() if folder.is_dir() else ()
    return max(
        (file for file in files if file.suffix == ".csv"),
        key=lambda file: file.name, default=None,
    )


def most_frequent(pairs: Sequence[Pair]) -> list[Frequent]:
    """Returns the few pairs of different classes that have most images, these first."""
    total: dict[str, int] = {}
    for pair in pairs:
        total[pair.name] = total.get(pair.name, 0) + pair.images
    wrong = [pair for pair in pairs if pair.name != pair.taken_for]
    wrong.sort(key=lambda pair: -pair.images)  # of as many: in the classes' order
    return [Frequent(*pair, total[pair.name]) for pair in wrong[:_SHOWN]]


def recalled(path: AnyPath | None) -> list[Frequent]:
    """Returns the most frequent of a file; none of one that is damaged, and says so."""
    try:
        return most_frequent(read(path)) if path is not None else []
    except errors.SetupError as error:
        logging.warning("%s It is left out.", error)
        return []


def table(rows: Sequence[Frequent]) -> Table:
    """Lays them out for people."""
    return Table(("most often taken for another", "images"), tuple(
        (_printable(f"{name} for {taken_for}"), counted(images, of))
        for name, taken_for, images, of in rows
    ))


def _printable(text: str) -> str:
    """Returns names without what is no text in them."""
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(letter if letter.isprintable() else " " for letter in text)
