"""Whose a directory is, asked before anything is written into it.

What runs, sweeps and evaluations write has names that others use, too: a folder of
transformers has a config.json, anybody may have a results.json. So a directory is
written into if it is new, empty, or of the kind that is going to write there; of which
kind it is, a file says that every one of them has. In any other, nothing is touched.

Logs, in which a shell notes what a run prints, and hidden files may lie in any.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from crossmae_jax import errors
from crossmae_jax.checkpoints import digests
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import records

_ANYWHERE = r"\..*|.*\.(log|out|err)"
_SHOWN = 5  # names of what lies in a directory


class Kind(NamedTuple):
    """What a directory can be.

    Attributes:
      title: what people call it, such as "a run".
      mark: the name of the file that all of them have, once they have begun.
      keys: what the object in that file has at least, and nobody else's.
      early: a pattern of names that may be there before the mark is.
      cure: what to do if that file is damaged.
    """

    title: str
    mark: str
    keys: frozenset[str]
    early: str
    cure: str


def check(directory: AnyPath, kinds: Sequence[Kind]) -> None:
    """Refuses a directory that is somebody else's, or that cannot be written into.

    Args:
      kinds: what it may be; the first is what is going to be written.

    Raises:
      SetupError: if it holds something and is none of these.
      DamagedRecord: if nobody can tell, since the file that says so is damaged.
      FileError: if it is a file, or may not be written into.
    """
    with errors.using_files():
        if isinstance(directory, Path):
            _check_writable(directory)
        if not directory.is_dir():
            return
        names = sorted(entry.name for entry in directory.iterdir())
        _check_kind(directory, names, kinds)
        for name in names:  # a save that fails later costs the steps before it
            if isinstance(directory, Path) and (directory / name).is_dir():
                _check_access(directory / name)


def _check_kind(
    directory: AnyPath, names: Sequence[str], kinds: Sequence[Kind]
) -> None:
    for kind in kinds:
        if kind.mark in names:
            mark = records.read(directory / kind.mark, cure=kind.cure)
            if kind.keys <= mark.keys():
                return
    patterns = "|".join([_ANYWHERE, *(kind.early for kind in kinds)])
    if others := [name for name in names if not re.fullmatch(patterns, name)]:
        raise errors.SetupError(
            f"{directory} is not empty and not {kinds[0].title} of ours, so what lies "
            f"there is left alone: {digests.shorten(others, _SHOWN)}. Give a --workdir "
            f"that is new, empty, or that of {kinds[0].title}."
        )


def _check_writable(directory: Path) -> None:
    """Raises FileError unless a process may make files in a directory, or make it."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise errors.FileError(
            f"{place} is a file, no directory; give another --workdir."
        )
    _check_access(place)


def _check_access(path: Path) -> None:
    effective = os.access in os.supports_effective_ids
    if not os.access(path, os.W_OK, effective_ids=effective):
        raise errors.FileError(
            f"{path} cannot be written: it is read-only, at least for this user; give "
            "another --workdir, or change its permissions."
        )
