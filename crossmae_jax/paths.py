"""Paths in a bucket of Google Cloud Storage: `gs://bucket/folder`, beside local ones.

A bucket is no disk. An object appears whole, under its last name, and at once for
everybody; but nothing can be appended to, there are no directories, and renaming a
folder means to copy each object and then to delete it. What relies on a rename on a
disk must rely on the order of writing here.

Nothing is remembered of what a bucket holds: other processes, and other libraries in
this one, write to it too.
"""

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

AnyPath = Path | epath.Path
COMMITTED = "commit_success.txt"  # the name that Orbax gives to what commits a step

_SCHEME = re.compile(r"gs://?")  # pathlib makes one slash of two
_NEEDED = ("gcsfs", "fsspec")


def is_remote(path: Any) -> bool:
    """Says whether a path lies in a bucket."""
    return bool(_SCHEME.match(os.fspath(path)))


def path(name: str | AnyPath) -> AnyPath:
    """Returns a path with the methods of `pathlib.Path`, in a bucket or on a disk.

    Raises:
      ValueError: if it lies in a bucket and cannot be read from here, or names none.
    """
    if not is_remote(name):
        return Path(name)
    text = _SCHEME.sub("gs://", os.fspath(name), count=1).rstrip("/")
    if not re.match(r"gs://[^/]", text):
        raise ValueError(f"{name} names no bucket; write gs://BUCKET/FOLDER.")
    if missing := [need for need in _NEEDED if importlib.util.find_spec(need) is None]:
        raise ValueError(
            f"{text} lies in a bucket, for which {' and '.join(missing)} is needed, "
            "but not installed: pip install -e '.[gcs]'. Or give a path on a disk."
        )
    import fsspec

    # Set before the first use: file systems are made once, with these options.
    for protocol in ("gs", "gcs"):
        options = fsspec.config.conf.setdefault(protocol, {})
        options["use_listings_cache"] = False
    return epath.Path(text)


def absolute(name: str | AnyPath) -> AnyPath:
    """Returns a path that means the same from any working directory."""
    return path(name) if is_remote(name) else Path(name).absolute()


@contextlib.contextmanager
def named(file: AnyPath) -> Iterator[None]:
    """Names a file in the OSErrors about it, which those of an open one do not do."""
    try:
        yield
    except OSError as error:
        error.filename = os.fspath(file)
        raise


def write_whole(file: AnyPath, content: str | bytes) -> None:
    """Writes a file in one step: whoever reads it meanwhile sees all of it or none.

    And whoever reads it after a power failure: its text is on the disk before its name.
    Where it cannot be written, because a disk is full, the one before stays as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(file):
        file.write_bytes(data)
        return
    with writing_whole(file) as out:
        out.write(data)


@contextlib.contextmanager
def writing_whole(file: Path) -> Iterator[BinaryIO]:
    """Yields what is renamed to a file on a disk at the end, as `write_whole` does.

    Of what ends in an error nothing is left.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    with named(file):
        try:
            with open(temporary, "wb") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def files(directory: AnyPath, *, nested: bool = False) -> list[AnyPath]:
    """Returns all files below a directory, ordered; with `nested`, not its own."""
    if not is_remote(directory):
        pattern = "*/**/*" if nested else "**/*"
        return sorted(file for file in directory.glob(pattern) if file.is_file())
    names = system(directory).find(os.fspath(directory))
    entries = [path(f"gs://{name}") for name in sorted(names)]
    return [file for file in entries if not nested or file.parent != directory]


def move(directory: AnyPath, target: AnyPath) -> None:
    """Renames a checkpoint's directory.

    In a bucket what commits it comes first and goes last: an end in between leaves two
    checkpoints that miss files, which are found damaged, and none that Orbax takes for
    unfinished and removes.
    """
    if not is_remote(directory):
        directory.rename(target)
        return
    bucket = system(directory)
    names = [os.fspath(file.relative_to(directory)) for file in files(directory)]
    names.sort(key=lambda name: name != COMMITTED)
    for name in names:
        bucket.cp_file(os.fspath(directory / name), os.fspath(target / name))
    for name in reversed(names):
        bucket.rm_file(os.fspath(directory / name))


def remove(directory: AnyPath) -> None:
    """Removes a checkpoint's directory, what commits it first."""
    if not is_remote(directory):
        shutil.rmtree(directory)
        return
    bucket = system(directory)
    for file in sorted(files(directory), key=lambda file: file.name != COMMITTED):
        bucket.rm_file(os.fspath(file))


def system(directory: str | AnyPath) -> Any:
    """Returns the file system of a bucket, fsspec's; it holds connections.

    Threads may share it, processes may not.
    """
    path(directory)
    import fsspec

    return fsspec.filesystem("gs")
