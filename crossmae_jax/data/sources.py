"""Random access to images on disk, by `config.data.source`.

    folder    all images under a directory (`folder_source`)
    tfds      a prepared TFDS set (`tfds_source`)
    digits    the digits of scikit-learn, which become such a set (`sets.digits`)

A source never decodes, it is cheap to pickle, and files are opened where they are read:
the loader sends a source to worker processes. Neither TensorFlow nor JAX is imported.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from ml_collections import ConfigDict

from crossmae_jax import errors, ranges
from crossmae_jax.data import transforms
from crossmae_jax.data.folder_source import FolderSource
from crossmae_jax.data.tfds_source import TfdsSource
from crossmae_jax.data.transforms import Record, Transform

Classes = tuple[str, ...] | None


@runtime_checkable
class Source(Protocol):
    """What the loader reads images from.

    Attributes:
      kinds: what its records hold beside "name" and "image": {"label"}, say, or
        {"boxes", "masks"}; empty where there are images alone.
      classes: what the numbers of its labels stand for, whatever they are of; empty
        without labels.
      fingerprint: changes when the images or their order change.
    """

    kinds: frozenset[str]
    classes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, index: int) -> Record:
        """Reads a record: a value of each kind, and

            "name"     what errors and lists call the image
            "image"    an encoded file, or uint8 [height width c]
            "label"    a place in `classes`

        Other kinds are as the transforms want them that need them. What has a place in
        the image counts it in the image's own pixels, as stored.

        Raises:
          OSError: if it cannot be read; another image will stand in for it.
        """

    def name(self, index: int) -> str:
        """What errors and lists call the image, which need not be read for that."""


def make_source(
    data: ConfigDict, split: str, *, classes: Classes = None
) -> Source | None:
    """Opens the images that the configuration names.

    Args:
      split: "train" or "eval".
      classes: names that labels shall be numbers of, such as those of a model; labels
        are mapped by name. Those of the training split if not given; if empty, labels
        are not wanted.

    Returns:
      The source, or None for "eval" where no evaluation split is configured.

    Raises:
      ValueError: if there are no such images, `config.data.transform` needs more of
        them than they have, or their classes are others.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"Unknown split {split!r}. Known: eval, train.")
    if data.source not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise ValueError(f"Unknown data.source {data.source!r}. Known: {known}.")
    if split == "eval" and classes is None:
        classes = SOURCES[data.source](data, "train", None).classes
    source = SOURCES[data.source](data, split, classes)
    if source is not None:
        transform_for(source, data)  # what does not fit is said when it is opened
        ranges.check("data.max_bad_share", data.max_bad_share, least=0, most=1)
        ranges.check("data.workers", data.workers, least=-1)
    return source


def described(source: Source) -> str:
    """Returns a line on what a source has and, of a folder, what it leaves aside."""
    labels = f"{len(source.classes)} classes" if source.classes else "no labels"
    if not isinstance(source, FolderSource):
        return f"{len(source)} images, {labels}, of {source!r}"
    if source.stray:
        labels += f", since {source.stray}"
    skipped = f"; skipped: {source.skipped}" if source.skipped else ""
    return f"{len(source)} images, {labels}, in {source.directory}{skipped}"


def transform_for(source: Source, data: ConfigDict) -> Transform:
    """Returns the transform that `config.data` asks for.

    Raises:
      SetupError: if there is no such transform, or the source lacks a kind of record
        that it needs.
    """
    transform = transforms.make(data)
    if missing := sorted(transform.needs - source.kinds):
        kinds = ", ".join(sorted(source.kinds)) or "nothing else"
        raise errors.SetupError(
            f"data.transform={data.transform!r} needs {', '.join(missing)} beside each "
            f"image; {source!r} has {kinds}. Choose a data set that has it, or another "
            "data.transform."
        )
    return transform


def _folder(data: ConfigDict, split: str, classes: Classes) -> FolderSource | None:
    if split == "train":
        if not data.dir:
            raise ValueError(
                "data.source='folder' needs data.dir; pass --config.data.dir=DIR."
            )
        return _opened(data.dir, data, classes)
    return _opened(data.eval_dir, data, classes) if data.eval_dir else None


def _opened(directory: str, data: ConfigDict, classes: Classes) -> FolderSource:
    return FolderSource(
        directory, classes=classes, max_skipped_share=data.max_skipped_share
    )


def _tfds(data: ConfigDict, split: str, classes: Classes) -> TfdsSource | None:
    name = data.split if split == "train" else data.eval_split
    if not name and split == "eval":
        return None
    return TfdsSource(data.name, data_dir=data.data_dir, split=name, classes=classes)


def _digits(data: ConfigDict, split: str, classes: Classes) -> TfdsSource | None:
    from crossmae_jax.data.sets import digits  # the only source that may have to build

    name = data.split if split == "train" else data.eval_split
    if not name and split == "eval":
        return None
    data_dir = digits.prepare(data.data_dir)
    return TfdsSource(digits.NAME, data_dir=data_dir, split=name, classes=classes)


SOURCES: dict[str, Callable[[ConfigDict, str, Classes], Source | None]] = {
    "digits": _digits, "folder": _folder, "tfds": _tfds,
}
