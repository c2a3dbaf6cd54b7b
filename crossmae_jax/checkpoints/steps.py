"""The steps in a directory of checkpoints: which are complete, and which are no more.

On a disk a step is complete once it has its last name. In a bucket it has that from the
start, and is complete once Orbax has put an object beside the arrays that says so.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import orbax.checkpoint as ocp

from crossmae_jax import errors, paths
from crossmae_jax.checkpoints import digests
from crossmae_jax.paths import AnyPath

_FOR_GOOD = "FOR_GOOD"
_REPLACED = ".replaced"
# Names in a directory of checkpoints that are of our making; any other is not.
_NUMBER = r"(?P<step>0|[1-9][0-9]*)"
_FORMS = {
    "complete": _NUMBER,
    "unfinished": rf"{_NUMBER}{re.escape(ocp.utils.TMP_DIR_SUFFIX)}.*",
    "put aside": rf"{_NUMBER}\.damaged[0-9]*",
    "replaced": rf"{_NUMBER}{re.escape(_REPLACED)}",
}


class Found(NamedTuple):
    """A directory of a step.

    Attributes:
      kind: "complete", damaged or not; "unfinished", of a save that was cut short;
        "put aside", as it was found damaged; "replaced", of a save that takes the place
        of others.
    """

    path: AnyPath
    step: int
    kind: str


def found(directory: AnyPath) -> list[Found]:
    """Returns what saves have left in a directory, ordered by step.

    What has other names is not listed: it is somebody else's.
    """
    if not directory.is_dir():
        return []
    listed = []
    for path in directory.iterdir():
        for kind, form in _FORMS.items():
            if (name := re.fullmatch(form, path.name)) and path.is_dir():
                if kind == "complete" and _is_marked_unfinished(path):
                    kind = "unfinished"
                listed.append(Found(path, int(name["step"]), kind))
    return sorted(listed, key=lambda one: (one.step, one.path.name))


def committed(directory: AnyPath) -> list[int]:
    """Returns the complete steps, damaged ones included, in ascending order."""
    return [one.step for one in found(directory) if one.kind == "complete"]


def mark_for_good(path: AnyPath, every: int) -> None:
    """Notes in a step that it stays, also once the settings of its run are others."""
    text = f"one of every {every} steps, which checkpoint.keep_every_epochs keeps\n"
    paths.write_whole(path / _FOR_GOOD, text)


def for_good(directory: AnyPath) -> list[int]:
    """Returns the complete steps that are noted to stay, in ascending order."""
    return [
        step for step in committed(directory)
        if (directory / str(step) / _FOR_GOOD).exists()
    ]


def check_place(directory: AnyPath) -> None:
    """Finds out whether a step's directory can be made.

    Orbax makes it in the background; where it cannot, other threads of its wait for
    that for minutes, and so does the end of the program.

    Raises:
      FileError: if it cannot: a disk has become read-only, the directory is gone.
    """
    if paths.is_remote(directory):
        return
    probe = directory / ".probe"
    with errors.using_files("Nothing was saved; the same command goes on from before."):
        probe.mkdir(exist_ok=True)
        probe.rmdir()


def unfinished(directory: AnyPath) -> list[AnyPath]:
    """Returns what is left of saves that were never completed."""
    return [one.path for one in found(directory) if one.kind == "unfinished"]


def _is_marked_unfinished(path: AnyPath) -> bool:
    return (
        paths.is_remote(path) and path.is_dir()
        and not (path / paths.COMMITTED).exists()
    )


def put_aside(path: AnyPath) -> AnyPath:
    """Renames a damaged step, so that it can be written again; returns its new path."""
    target = path.with_name(f"{path.name}.damaged")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged{number}")
    paths.move(path, target)
    return target


def remove(path: AnyPath) -> None:
    """Removes a step's directory.

    It is no complete step any more before its first file goes: an end in between leaves
    what the next start of the run clears away, and no step that misses files.
    """
    if not paths.is_remote(path) and path.name.isdecimal():
        path = path.rename(path.with_name(path.name + ocp.utils.TMP_DIR_SUFFIX))
    paths.remove(path)


def step_out(directory: AnyPath, first: int) -> None:
    """Renames the steps from `first` on: another save is to take their place."""
    for step in committed(directory):
        if step >= first:
            path = directory / str(step)
            paths.move(path, path.with_name(f"{step}{_REPLACED}"))


def settle(directory: AnyPath, items: Iterable[str]) -> None:
    """Removes the steps that stepped out, or takes them back if nothing replaced them.

    So an end at any moment leaves the old steps or the new one.

    Args:
      items: what must be intact of a step for it to have replaced them.
    """
    replaced = sorted(directory.glob(f"*{_REPLACED}")) if directory.is_dir() else []
    # In a bucket a rename can end half-way, and leave damage on either side.
    done = replaced and any(
        digests.damage(directory / str(step), tuple(items)) is None
        for step in committed(directory)
    )
    for path in replaced:
        target = path.with_name(path.name.removesuffix(_REPLACED))
        if done:
            paths.remove(path)
            continue
        if target.exists():
            paths.remove(target)
        paths.move(path, target)


def contents(directory: AnyPath) -> str:
    """Says what lies in a directory where checkpoints are missed."""
    if not directory.is_dir():
        return "there is no such directory"
    names = sorted(path.name for path in directory.iterdir())
    listing = f"found {digests.shorten(names, 5)} instead" if names else "it is empty"
    return f"{listing}. Give the directory `checkpoints` of a run"
