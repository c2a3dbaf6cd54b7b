"""Lists, verifies, describes and removes the checkpoints of a run.

    python -m crossmae_jax checkpoints ls DIR
    python -m crossmae_jax checkpoints verify DIR
    python -m crossmae_jax checkpoints inspect DIR [--step=N] [--config=FILE]
    python -m crossmae_jax checkpoints prune DIR --keep=N [--keep_every=STEPS] [--yes]

DIR is the --workdir of a run or its `checkpoints`, on a disk or in a bucket; the
devices of the run are not needed. `ls` looks at names and sizes, `verify` reads every
byte. `prune` says what it would delete, and does so with --yes: steps that this library
has written, never the newest N that are whole, those that the run keeps for good, or
anything in `best`.

Exit status 2 if the command line is wrong or there are no checkpoints, 1 if `verify`
finds damage.
"""

import contextlib
import json
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from crossmae_jax import errors, tables
from crossmae_jax.checkpoints import checkpointer, digests, space, steps, tensors
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag
from crossmae_jax.runs import inventory, lock, workdir

_ACTIONS = {
    "ls": "which steps there are, how large, of which model",
    "verify": "whether they are as they were written, to the byte",
    "inspect": "the tensors of one of them, and in what its run differs from a file",
    "prune": "remove old ones",
}
_FLAGS = {
    "ls": {},
    "verify": {},
    "inspect": {
        "step": Flag(int, "which one; default: the newest complete one"),
        "config": Flag(Path, "a file that describes an experiment, to compare with"),
    },
    "prune": {
        "keep": Flag(
            int, "how many of the newest whole checkpoints stay", required=True
        ),
        "keep_every": Flag(
            int, "steps that are a multiple stay, too; 0: none; default: as the run's "
            "checkpoint.keep_every_epochs says",
        ),
        "yes": Flag(bool, "do it, not only say it", default=False),
    },
}


@session.command(error_status=2)  # 1 is damage
def main(argv: Sequence[str]) -> int | None:
    """Runs the command; `argv` holds what follows `checkpoints`."""
    name = flags.action("checkpoints", argv, _ACTIONS, doc=__doc__)
    given = flags.parse(
        f"checkpoints {name}", argv[1:], _FLAGS[name], doc=__doc__, operands=("DIR",)
    )
    jax.config.update("jax_platforms", "cpu")  # others may be busy, or not be there
    return _RUN[name](given)


def _opened(directory: str) -> inventory.Place:
    """Finds checkpoints, and prints whose they are."""
    place = inventory.find(directory)
    print(place.checkpoints)
    try:
        config = place.config
    except errors.UserError as error:  # what can be seen is shown all the same
        print(error)
        return place
    if config is not None:
        parts = (
            f"{part} {' '.join(str(config.model[part][name]) for name in names)}"
            for part, names in (("encoder", ("kind", "size")), ("decoder", ("kind",)))
            if part in config.model
        )
        print(f"{config.objective}: {', '.join(parts)}")
    return place


def _listed(given: types.SimpleNamespace, *, hashed: bool) -> int:
    rows, damaged, total = [], 0, 0
    first = _opened(given.operands[0])
    for prefix, place in (("", first), ("best/", inventory.of_best(first))):
        for one in inventory.look(place, hashed=hashed) if place else ():
            name = f"{prefix}{one.found.path.name}"
            rows.append((name, space.shown(one.num_bytes), one.state))
            damaged += one.damaged
            total += one.num_bytes
    print(tables.markdown(tables.Table(("step", "size", "state"), tuple(rows))))
    line = f"{space.shown(total)} in all"
    if (free := space.free(first.checkpoints)) is not None:
        line += f", {space.shown(free)} are free on the disk"
    print(line)
    return damaged


def _ls(given: types.SimpleNamespace) -> None:
    _listed(given, hashed=False)


def _verify(given: types.SimpleNamespace) -> int:
    damaged = _listed(given, hashed=True)
    print(f"{damaged} damaged" if damaged else "none is damaged")
    return 1 if damaged else 0


def _inspect(given: types.SimpleNamespace) -> None:
    place = _opened(given.operands[0])
    complete = steps.committed(place.checkpoints)
    step = given.step if given.step is not None else max(complete, default=None)
    if step not in complete:
        raise errors.SetupError(
            f"No complete step {'' if step is None else step} in {place.checkpoints}; "
            f"it holds {complete or 'none'}."
        )
    path = place.checkpoints / str(step)
    parts = inventory.parts(path)
    wrong = digests.damage(path, parts, hashed=False)
    print(f"step {step}: {wrong or f'{space.shown(space.num_bytes(path))} on disk'}")
    for item in parts[:2]:
        if (path / item).is_dir():
            print(f"\n{_tree(item, tensors.stored(path / item))}")
    if len(parts) > 2:
        notes = checkpointer.read_notes(path)
        print(f"\nnotes: {json.dumps(notes)}")
    if given.config is not None:
        print(f"\n{_compared(place, given.config)}")


def _tree(item: str, stored: dict[tuple[str, ...], tuple[tuple[int, ...], Any]]) -> str:
    rows, total = [], 0
    for names, (shape, dtype) in sorted(stored.items()):
        size = math.prod(shape) * dtype.itemsize
        total += size
        shown = " x ".join(map(str, shape)) or "one"
        rows.append(("/".join(names), shown, str(dtype), space.shown(size)))
    table = tables.Table((item, "shape", "type", "size"), tuple(rows))
    return f"{tables.markdown(table)}\n{len(rows)} tensors, {space.shown(total)}"


def _compared(place: Any, file: Path) -> str:
    if place.run is None:
        raise errors.SetupError(
            f"{place.checkpoints} has no config.json of a run beside it that "
            f"{file} could be compared with; leave --config out."
        )
    differing = workdir.all_differing(
        place.config.to_dict(), flags.load_config(file).to_dict()
    )
    lines = [
        f"  {name}: {before!r} -> {now!r}" for name, (before, now) in differing.items()
    ]
    return "\n".join([f"settings, run -> {file}:", *(lines or ["  the same"])])


def _prune(given: types.SimpleNamespace) -> None:
    place = _opened(given.operands[0])
    inventory.check_prunable(place)  # before anything is written into it
    alone = lock.held(place.run) if given.yes else contextlib.nullcontext()
    with alone, errors.using_files():
        choice = inventory.choose(place, keep=given.keep, keep_every=given.keep_every)
        for one, reason in choice.stay:
            print(f"keep    {one.path.name}  {reason}")
        for one, size in choice.go:
            print(f"delete  {one.path.name}  {space.shown(size)}")
        total = f"{len(choice.go)} of {space.shown(sum(n for _, n in choice.go))}"
        if not given.yes:
            print(f"Would delete {total}; --yes does it.")
            return
        inventory.remove(choice.go)
        print(f"Deleted {total}.")


_RUN = {"ls": _ls, "verify": _verify, "inspect": _inspect, "prune": _prune}
