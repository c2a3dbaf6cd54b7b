"""A TFDS data set that was prepared in ArrayRecord form, read without TensorFlow.

A directory may be `gs://bucket/folder`; each record is then one request.
"""

import functools
import hashlib
import json
import os
import resource
from typing import Any

import tensorflow_datasets as tfds

from crossmae_jax import errors, paths
from crossmae_jax.data import tfds_features
from crossmae_jax.data.classes import numbers
from crossmae_jax.data.transforms import Record

_OPEN_FILES = 10_240  # the most that macOS grants


class TfdsSource:
    """A split of a TFDS data set that was prepared in ArrayRecord form.

    Args:
      name: as for `tfds.builder`, such as "imagenet2012" or "name/config:1.0.0".
      split: as TFDS writes it, "train[:10%]" included.
      classes: names of which labels shall be numbers; the set's own if not given, and
        if empty labels are not wanted.

    Raises:
      ValueError: if there is no such set or split, or it cannot be read here.
      SetupError: if its files name code to run, or files outside of its directory.
    """

    def __init__(
        self, name: str, *, data_dir: str | None, split: str,
        classes: tuple[str, ...] | None = None,
    ):
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
        own = tuple(label.names) if labelled and label.num_classes else ()
        self.classes = () if not own else own if classes is None else classes
        self.kinds = frozenset({"label"}) if self.classes else frozenset()
        self._numbers = None  # of each of the set's own classes, where they differ
        if self.classes not in ((), own):
            self._numbers = numbers(own, self.classes, what=self.full_name)
        splits = builder.info.splits
        try:
            chosen = splits[split]
        except (KeyError, ValueError):
            known = [f"{key} ({info.num_examples})" for key, info in splits.items()]
            raise ValueError(
                f"TFDS data set {self.full_name} has no split {split!r}. It has "
                f"{', '.join(known)}. Set data.split or data.eval_split to one of them."
            ) from None
        _check_inside(self.directory, [f.filename for f in chosen.file_instructions])
        shards = [
            (os.path.basename(file.filename), file.skip, file.take)
            for file in chosen.file_instructions
        ]
        self._length = chosen.num_examples
        digest = hashlib.sha256(json.dumps([self.full_name, split, shards]).encode())
        self.fingerprint = f"{self._length}-{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        features = self._reader[index]
        name = self.name(index)
        if isinstance(file_name := features.get("file_name"), bytes):
            name = f"{name} {file_name.decode(errors='replace')}"
        record = {"name": name, "image": features["image"]}
        if "label" in self.kinds:
            label = int(features["label"])
            if self._numbers is not None and 0 <= label < len(self._numbers):
                label = int(self._numbers[label])
            record["label"] = label
        return record

    def name(self, index: int) -> str:
        """The data set, the split and the place of an image in it."""
        return f"{self.full_name} {self.split}[{index}]"

    @functools.cached_property
    def _reader(self) -> Any:
        allow_many_files()
        with tfds_features.only_own(self.full_name):
            builder = tfds.builder_from_directory(self.directory)
        decoders = None
        if isinstance(builder.info.features["image"], tfds.features.Image):
            decoders = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(self.split, decoders=decoders)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_reader"}

    def __repr__(self) -> str:
        return f"TfdsSource({self.full_name!r}, {self.split!r}, {len(self)} images)"


def _prepared(name: str, data_dir: str | None) -> Any:
    """Finds a prepared ArrayRecord set, or says how to make it one."""
    where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    where = os.path.expanduser(where)
    if paths.is_remote(where):
        where = str(paths.path(where))
    try:
        with tfds_features.only_own(name):
            builder = tfds.builder(name, data_dir=where)
    except (tfds.core.registered.DatasetNotFoundError, ImportError) as error:
        # TFDS appends the list of all sets it knows: one line is enough.
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(_not_there(name, where, reason)) from None
    except (errors.UserError, OSError):
        raise
    except Exception as error:  # what damaged metadata does to TFDS is past listing
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"The files of TFDS data set {name!r} under {where} cannot be read "
            f"({type(error).__name__}: {reason}). Copy them again, or prepare the set "
            "again."
        ) from error
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


def _check_inside(directory: str, shards: list[str]) -> None:
    """Refuses shards that `dataset_info.json` has outside of the set's directory."""
    for shard in map(os.fspath, shards):
        below = shard.removeprefix(f"{directory}/")
        if below == shard or ".." in below.split("/"):
            raise errors.SetupError(
                f"dataset_info.json in {directory} names the shard {shard}; expected "
                "a file below it. Prepare the set again, or copy it again."
            )


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
