"""Random access to images on disk: prepared TFDS sets, image folders, the digits.

A source has

    len(source)             the number of images
    source[i]               {"image": encoded bytes or uint8 [height width c],
                             "label": int (-1: none), "name": str}
    source.num_classes      0 without labels
    source.fingerprint      changes when the images or their order change

It never decodes, it is cheap to pickle, and files are opened where they are read: the
loader sends a source to worker processes. Neither TensorFlow nor JAX is imported.

A directory may be `gs://bucket/folder`. A folder of images is listed once and each
image is one request; of a prepared set each record is one, which ArrayRecord makes.
"""

import collections
import functools
import hashlib
import json
import os
import resource
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from crossmae_jax import paths

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
_ENDINGS = tuple(os.fsencode(extension) for extension in EXTENSIONS)
_OPEN_FILES = 10_240  # the most that macOS grants


class FolderSource:
    """All images under a directory, nested in any way.

    Images are ordered by their path below the directory, byte by byte. When every one
    of them lies in a first-level folder and there are two such folders or more, those
    are the classes, numbered in the same order. Links to directories are followed, but
    each directory is read once, under its real path if that lies below the root; so
    loops end. Names that begin with a dot are skipped. A bucket has no links.

    Args:
      classes: the class names of another split, which decide the numbers here too;
        an empty tuple means that labels are not wanted.
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
        found = tuple(sorted({f for f in folders if f is not None}))
        if None in folders or len(found) < 2:
            found = ()
        found = tuple(os.fsdecode(folder) for folder in found)
        self.classes = found if classes is None else classes
        self._labels = None
        if found and self.classes:
            unknown = sorted(set(found) - set(self.classes))
            if unknown:
                raise ValueError(
                    f"{self.directory} has {len(unknown)} class folders that the "
                    f"training folder lacks, first {unknown[0]!r}; it has "
                    f"{len(self.classes)} classes, first {self.classes[0]!r}. Give "
                    "both folders the same class folders."
                )
            number = {os.fsencode(name): k for k, name in enumerate(self.classes)}
            self._labels = np.array([number[f] for f in folders], np.int32)
        self.num_classes = len(self.classes) if self._labels is not None else 0

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.name(index)
        if paths.is_remote(path):
            image = self._bucket.cat_file(path)
        else:
            with open(path, "rb") as file:
                image = file.read()
        label = -1 if self._labels is None else int(self._labels[index])
        return {"image": image, "label": label, "name": path}

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
            f"{self.num_classes} classes)"
        )


class TfdsSource:
    """A split of a TFDS data set that was prepared in ArrayRecord form.

    Args:
      name: as for `tfds.builder`, such as "imagenet2012" or "name/config:1.0.0".
      split: as TFDS writes it, "train[:10%]" included.
    """

    def __init__(self, name: str, *, data_dir: str | None, split: str):
        builder = _prepared(name, data_dir)
        features = builder.info.features
        if "image" not in features:
            raise ValueError(
                f"TFDS data set {name!r} has no feature 'image'; it has "
                f"{', '.join(sorted(features))}. Choose a data set of images."
            )
        self.directory = os.fspath(builder.data_path)
        self.full_name = builder.info.full_name
        self.split = split
        label = features["label"] if "label" in features else None
        labelled = isinstance(label, tfds.features.ClassLabel)
        self.num_classes = (label.num_classes or 0) if labelled else 0
        splits = builder.info.splits
        try:
            chosen = splits[split]
        except (KeyError, ValueError):
            known = [f"{key} ({info.num_examples})" for key, info in splits.items()]
            raise ValueError(
                f"TFDS data set {self.full_name} has no split {split!r}. It has "
                f"{', '.join(known)}. Set data.split or data.eval_split to one of them."
            ) from None
        shards = [
            (os.path.basename(file.filename), file.skip, file.take)
            for file in chosen.file_instructions
        ]
        self._length = chosen.num_examples
        digest = hashlib.sha256(json.dumps([self.full_name, split, shards]).encode())
        self.fingerprint = f"{self._length}-{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._reader[index]
        label = int(record["label"]) if self.num_classes else -1
        name = self.name(index)
        if isinstance(file_name := record.get("file_name"), bytes):
            name = f"{name} {file_name.decode(errors='replace')}"
        return {"image": record["image"], "label": label, "name": name}

    def name(self, index: int) -> str:
        """The data set, the split and the place of an image in it."""
        return f"{self.full_name} {self.split}[{index}]"

    @functools.cached_property
    def _reader(self) -> Any:
        allow_many_files()
        builder = tfds.builder_from_directory(self.directory)
        decoders = None
        if isinstance(builder.info.features["image"], tfds.features.Image):
            decoders = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(self.split, decoders=decoders)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_reader"}

    def __repr__(self) -> str:
        return f"TfdsSource({self.full_name!r}, {self.split!r}, {len(self)} images)"


@runtime_checkable
class Source(Protocol):
    """What the loader reads images from."""

    num_classes: int
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def name(self, index: int) -> str: ...


def make_source(data: ConfigDict, split: str) -> Source | None:
    """Opens the images that the configuration names.

    Args:
      split: "train" or "eval".

    Returns:
      The source, or None for "eval" where no evaluation split is configured.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"Unknown split {split!r}. Known: eval, train.")
    if data.source not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise ValueError(f"Unknown data.source {data.source!r}. Known: {known}.")
    return SOURCES[data.source](data, split)


def _folder(data: ConfigDict, split: str) -> FolderSource | None:
    if not data.dir:
        raise ValueError(
            "data.source='folder' needs data.dir; pass --config.data.dir=DIR."
        )
    if split == "train":
        return FolderSource(data.dir)
    if not data.eval_dir:
        return None
    return FolderSource(data.eval_dir, classes=FolderSource(data.dir).classes)


def _tfds(data: ConfigDict, split: str) -> TfdsSource | None:
    name = data.split if split == "train" else data.eval_split
    if not name and split == "eval":
        return None
    return TfdsSource(data.name, data_dir=data.data_dir, split=name)


def _digits(data: ConfigDict, split: str) -> TfdsSource | None:
    from crossmae_jax.data.sets import digits  # the only source that may have to build

    name = data.split if split == "train" else data.eval_split
    if not name and split == "eval":
        return None
    data_dir = digits.prepare(data.data_dir)
    return TfdsSource(digits.NAME, data_dir=data_dir, split=name)


SOURCES = {"digits": _digits, "folder": _folder, "tfds": _tfds}


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
        with os.scandir(here) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
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
    found = [
        f"{count} {extension or 'without extension'}"
        for extension, count in others.most_common(5)
    ]
    if len(others) > 5:
        found.append(f"{sum(others.values())} files in all")
    return (
        f"No images under {directory}. Looked for {' '.join(EXTENSIONS)}. "
        f"Found instead: {', '.join(found) or 'no files at all'}."
    )


def _prepared(name: str, data_dir: str | None) -> Any:
    """Finds a prepared ArrayRecord set, or says how to make it one."""
    where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    where = os.path.expanduser(where)
    if paths.is_remote(where):
        where = str(paths.path(where))
    try:
        builder = tfds.builder(name, data_dir=where)
    except (tfds.core.registered.DatasetNotFoundError, ImportError) as error:
        # TFDS appends the list of all sets it knows: one line is enough.
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(_not_there(name, where, reason)) from None
    if not builder.is_prepared():
        reason = f"{builder.data_path} has no dataset_info.json"
        raise ValueError(_not_there(name, where, reason))
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise ValueError(
            f"TFDS data set {builder.info.full_name} is stored as {file_format}, which "
            "has no random access. Prepare it as array_record, in another data_dir: "
            f"{_how_to_prepare(name, 'OTHER_DIR')}."
        )
    return builder


def _not_there(name: str, where: str, reason: str) -> str:
    try:
        below = paths.path(where).iterdir()
        entries = sorted(e.name for e in below if e.name != "downloads")
    except OSError as error:
        entries = [f"nothing ({error.strerror or 'no such folder'})"]
    return (
        f"TFDS data set {name!r} is not prepared under {where}: {reason}. Found there: "
        f"{', '.join(entries[:20]) or 'nothing'}. Set data.data_dir, or prepare it: "
        f"{_how_to_prepare(name, where)}."
    )


def _how_to_prepare(name: str, data_dir: str) -> str:
    if name.split(":")[0].split("/")[0] == "imagenet2012":
        return (
            "python -m crossmae_jax data prepare imagenet2012 --manual_dir=TARS "
            f"--data_dir={data_dir}"
        )
    return (
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
        f"data_dir='{data_dir}').download_and_prepare(file_format='array_record')\" "
        "(TFDS may need TensorFlow for that; reading needs none)"
    )


def allow_many_files() -> None:
    """Lets this process hold every shard open: ImageNet's 1024 exceed usual limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
