"""Room on the disk of a run, and what may be deleted where there is none.

A disk that is full, has become read-only or is gone ends a run in one line that names
the file, the room, and which steps may go. What was whole before stays whole: files are
written under another name first, and a step counts once it is complete. Nothing is ever
deleted to make room. A bucket has no end, so nothing is asked of one.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from crossmae_jax import errors, paths
from crossmae_jax.checkpoints import digests, steps, tensors
from crossmae_jax.distributed import cluster
from crossmae_jax.paths import AnyPath

# A quota and a limit of the size of files are full disks to whoever writes.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_SHOWN = 4  # steps that may be deleted
_LONGEST = 400  # letters of a library's error


class DiskError(errors.FileError):
    """A disk is full, read-only or gone; what was whole before still is."""


def free(place: AnyPath) -> int | None:
    """Returns how many bytes are free on a disk; None of a bucket.

    Args:
      place: need not exist yet.
    """
    if paths.is_remote(place):
        return None
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def num_bytes(directory: AnyPath) -> int:
    """Returns the size of all files below a directory; 0 if it is gone."""
    if paths.is_remote(directory):
        return paths.system(directory).du(os.fspath(directory))
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def shown(number: int) -> str:
    """Returns a number of bytes as "1.23 GB", small ones as "45.6 kB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if number >= size / 10:
            return f"{number / size:.2f} {unit}"
    return f"{number / 1000:.1f} kB"


def check(directory: AnyPath, *, step: int, needed: int) -> bool:
    """Returns whether a step and another one after it fit on the disk of a directory.

    Asks nothing of a bucket.

    Raises:
      DiskError: if the first does not fit; says what may be deleted.
    """
    there = free(directory)
    if there is None:
        return True
    if there < needed:
        raise DiskError(
            f"Step {step} needs {shown(needed)}, so it was not saved in {directory}: "
            f"{cure(directory)}"
        )
    return there >= 2 * needed


def cure(directory: AnyPath) -> str:
    """Says how much room there is for checkpoints, and what may be deleted of them."""
    told = []
    try:
        there, complete = free(directory), steps.committed(directory)
        if there is not None:
            told.append(f"{shown(there)} are free on the disk of {directory}.")
            told.append(_deletable(directory))
    except OSError as error:
        return f"The disk cannot be reached ({_line(error)}): mount it again."
    if complete:
        told.append(f"The same command goes on from step {complete[-1]}.")
    return " ".join(told)


def _deletable(directory: AnyPath) -> str:
    """Names what nothing goes on from.

    Not the newest step that has all its files, what is newer, or stays for good.
    """
    complete, others = [], []
    for one in steps.found(directory):
        if one.kind == "complete":
            complete.append(one.path)
        elif one.kind != "replaced":
            others.append(one.path)
    newest = max((n for n, path in enumerate(complete) if _has_all(path)), default=0)
    for_good = steps.for_good(directory)
    old = [path for path in complete[:newest] if int(path.name) not in for_good]
    sizes = [f"{path.name} ({shown(num_bytes(path))})" for path in others + old]
    if not sizes:
        return "No checkpoint there may be deleted: make room elsewhere on the disk."
    return (
        f"What may be deleted there: {digests.shorten(sizes, _SHOWN)}; python -m "
        f"crossmae_jax checkpoints prune {directory} --keep=1 shows it."
    )


def _has_all(step: AnyPath) -> bool:
    parts = tensors.VARIABLES, tensors.OPTIMIZER
    return digests.damage(step, parts, hashed=False) is None


@contextlib.contextmanager
def saving(directory: AnyPath, step: int | None) -> Iterator[None]:
    """Tells of a save that failed in the background in a line.

    What Orbax raises there is of files: tensorstore's errors of the system are
    ValueErrors.
    """
    try:
        yield
    except errors.UserError:
        raise
    except (OSError, ValueError) as error:
        if jax.process_count() > 1 and cluster.is_lost(error):
            raise
        raise DiskError(
            f"Step {step} could not be saved in {directory}: {_line(error)}. "
            f"{cure(directory)}"
        ) from error


@contextlib.contextmanager
def writing(workdir: AnyPath) -> Iterator[None]:
    """Tells in a line of what cannot be written into a workdir, or on a full disk."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        cause = error.__cause__ if isinstance(error, errors.FileError) else error
        full = getattr(cause, "errno", None) in _OF_DISKS
        if isinstance(error, errors.UserError) and not full:
            raise
        gone = _is_gone(workdir)
        if not (full or gone or _is_below(workdir, error.filename)):
            raise
        why = f"{workdir} is gone: {_line(error)}" if gone else _line(error)
        advice = "" if gone else f" {cure(workdir / 'checkpoints')}"
        raise DiskError(f"{why}.{advice}") from error


def _is_gone(workdir: AnyPath) -> bool:
    """Says whether a directory cannot be reached; a dead mount answers with errors."""
    try:
        return isinstance(workdir, Path) and not workdir.is_dir()
    except OSError:
        return True


def _is_below(workdir: AnyPath, name: object) -> bool:
    named = isinstance(name, str) and isinstance(workdir, Path)
    return named and Path(name).absolute().is_relative_to(workdir.absolute())


def _line(error: Exception) -> str:
    """Returns an error in one line that is not too long."""
    text = " ".join(str(error).split()).rstrip(".")
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST // 2]} ... {text[-_LONGEST // 2:]}"
