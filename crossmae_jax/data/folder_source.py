"""A folder of images, on a disk or in a bucket, listed once.

A directory may be `gs://bucket/folder`; each image is then one request.
"""

import collections
import functools
import hashlib
import os
from typing import Any

import numpy as np

from crossmae_jax import paths
from crossmae_jax.data.classes import numbers
from crossmae_jax.data.transforms import Record

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
_ENDINGS = tuple(os.fsencode(extension) for extension in EXTENSIONS)


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
    """

    def __init__(self, directory: str, *, classes: tuple[str, ...] | None = None):
        if paths.is_remote(directory):
            self.directory = str(paths.path(directory))
            images, others = _list(self.directory)
        else:
            self.directory = os.path.abspath(os.path.expanduser(directory))
            images, others = _walk(self.directory)
        if not images:
            raise ValueError(_nothing_found(self.directory, others))
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
            f"{len(self.classes)} classes)"
        )


def _is_image(name: bytes) -> bool:
    return name.lower().endswith(_ENDINGS)


def _list(directory: str) -> tuple[list[bytes], collections.Counter]:
    """Returns what `_walk` returns, of a folder in a bucket."""
    bucket = paths.system(directory)
    root = directory.removeprefix("gs://") + "/"
    images, others = [], collections.Counter()
    names = bucket.find(directory)
    if not names or names == [root[:-1]]:
        what = "is an object" if names else "does not exist"
        raise ValueError(f"{directory} {what}; expected a folder of images.")
    for name in names:
        below = os.fsencode(name.removeprefix(root))
        if any(part.startswith(b".") for part in below.split(b"/")):
            continue
        if _is_image(below):
            images.append(below)
        else:
            others[os.path.splitext(os.fsdecode(below))[1].lower()] += 1
    return sorted(images), others


def _walk(directory: str) -> tuple[list[bytes], collections.Counter]:
    """Returns the sorted image paths below a directory, and what else there is."""
    if not os.path.isdir(directory):
        what = "is a file" if os.path.exists(directory) else "does not exist"
        raise ValueError(f"{directory} {what}; expected a directory of images.")
    root = os.fsencode(directory)
    images, others = [], collections.Counter()
    seen: set[tuple[int, int]] = set()
    pending, links = [b""], []
    while pending or links:
        # Links wait until everything real is read, so that a real path wins.
        below = pending.pop() if pending else links.pop(0)
        here = os.path.join(root, below)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            path = os.path.join(below, entry.name)
            if entry.is_dir():
                (links if entry.is_symlink() else pending).append(path)
            elif _is_image(entry.name):
                images.append(path)
            else:
                others[os.fsdecode(os.path.splitext(entry.name)[1].lower())] += 1
    return sorted(images), others


def _nothing_found(directory: str, others: collections.Counter) -> str:
    counts = [
        f"{count} {extension or 'without extension'}"
        for extension, count in others.most_common(5)
    ]
    if len(others) > 5:
        counts.append(f"{sum(others.values())} files in all")
    return (
        f"No images under {directory}. Looked for {' '.join(EXTENSIONS)}. "
        f"Found instead: {', '.join(counts) or 'no files at all'}."
    )
