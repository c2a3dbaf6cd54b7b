"""A folder of images, on a disk or in a bucket, listed once.

A directory may be `gs://bucket/folder`; each image is then one request.
"""

import functools
import hashlib
import os
from typing import Any

import numpy as np

from crossmae_jax import paths
from crossmae_jax.data import listing
from crossmae_jax.data.classes import numbers
from crossmae_jax.data.transforms import Record

MAX_SKIPPED_SHARE = 0.05


class FolderSource:
    """All images under a directory, nested in any way.

    Images are ordered by their path below the directory, byte by byte. When every one
    of them lies in a first-level folder and there are two such folders or more, those
    are the classes, numbered in the same order. Links to directories are followed, but
    each directory is read once, under its real path if that lies below the root; so
    loops end. Names that begin with a dot are skipped. A bucket has no links.

    Args:
      classes: names of which labels shall be numbers; the folders' own if not given,
        and if empty labels are not wanted.
      max_skipped_share: share of the images that may be of a kind that is not read; 1
        also accepts class folders without an image.

    Attributes:
      skipped: what is left aside, and why; "" if nothing is.
      stray: images for which folders are no classes, by name; "" if there are none.

    Raises:
      ValueError: if there are no images, or what `listing.check` refuses.
    """

    def __init__(
        self,
        directory: str,
        *,
        classes: tuple[str, ...] | None = None,
        max_skipped_share: float = MAX_SKIPPED_SHARE,
    ):
        if paths.is_remote(directory):
            self.directory = str(paths.path(directory))
        else:
            self.directory = os.path.abspath(os.path.expanduser(directory))
        content = listing.listed(self.directory)
        listing.check(self.directory, content, max_skipped_share=max_skipped_share)
        self.skipped, images = listing.skipped(content), content.images
        self.stray = listing.stray(content)
        # One blob and offsets instead of a list: a million paths travel to each worker.
        self._blob = b"".join(images)
        self._ends = np.cumsum([len(path) for path in images], dtype=np.int64)
        folders = [p.split(b"/", 1)[0] if b"/" in p else None for p in images]
        own = sorted({f for f in folders if f is not None})
        own = tuple(os.fsdecode(folder) for folder in own)
        # One folder alone is a class only where its name is known to be one.
        if None in folders or len(own) < 2 and not set(own) <= set(classes or ()):
            own = ()
        names = own if classes is None else classes
        self._labels = None
        if own and names:
            number = dict(zip(
                map(os.fsencode, own),
                numbers(own, names, what=self.directory), strict=True,
            ))
            self._labels = np.array([number[f] for f in folders], np.int32)
        self.kinds = frozenset() if self._labels is None else frozenset({"label"})
        self.classes = names if self.kinds else ()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        path = self.name(index)
        if paths.is_remote(path):
            image = self._bucket.cat_file(path)
        else:
            with open(path, "rb") as file:
                image = file.read()
        record = {"name": path, "image": image}
        if self._labels is not None:
            record["label"] = int(self._labels[index])
        return record

    def name(self, index: int) -> str:
        """The path of an image, without reading it."""
        start = self._ends[index - 1] if index else 0
        path = os.fsdecode(self._blob[start : self._ends[index]])
        return os.path.join(self.directory, path)

    @functools.cached_property
    def _bucket(self) -> Any:
        return paths.system(self.directory)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_bucket"}

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._ends.astype("<i8").tobytes())
        digest.update(self._blob)
        return f"{len(self)}-{digest.hexdigest()[:16]}"

    def __repr__(self) -> str:
        return (
            f"FolderSource({self.directory!r}, {len(self)} images, "
            f"{len(self.classes)} classes{f', since {self.stray}' * bool(self.stray)})"
        )

