"""The checkpoints of a run as people ask for them: which, how large, whole, how many.

Looking needs neither the devices of the run nor its configuration, and writes nothing.
Pruning is for a run that nobody trains: it removes steps that this library has written,
by their names and in a directory with the `config.json` of a run, and nothing else. The
newest `keep` steps that are whole stay, as do those that the run keeps for good.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from crossmae_jax import errors, paths
from crossmae_jax.checkpoints import (
    checkpointer,
    digests,
    schedule,
    space,
    steps,
    tensors,
)
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import records, workdir

_ITEMS = (tensors.VARIABLES, tensors.OPTIMIZER)
_STATES = {
    "unfinished": "never completed", "put aside": "put aside as damaged",
    "replaced": "being replaced",
}


class Place(NamedTuple):
    """A directory of checkpoints, and the run's around it; None if there is none."""

    checkpoints: AnyPath
    run: AnyPath | None

    @property
    def config(self) -> ConfigDict | None:
        """The configuration of the run."""
        return None if self.run is None else workdir.read_config(self.run)


class Looked(NamedTuple):
    """What was found of a step.

    Attributes:
      state: "complete" if nothing was found that is wrong, or what is.
      damaged: whether it looked complete and is not.
    """

    found: steps.Found
    num_bytes: int
    state: str
    damaged: bool


class Choice(NamedTuple):
    """Which steps stay, each with the reason, and which go."""

    stay: list[tuple[steps.Found, str]]
    go: list[tuple[steps.Found, int]]  # with their bytes


def find(directory: str | AnyPath) -> Place:
    """Returns the checkpoints of a workdir, or those in the directory itself.

    Raises:
      SetupError: if there are none.
    """
    with errors.setting_up():
        path = paths.absolute(directory)
        below = path / "checkpoints"
        place = below if below.is_dir() else path
        if not steps.found(place):
            raise errors.SetupError(
                f"No checkpoints in {path}: {steps.contents(path)}, or its workdir."
            )
        parent = place.parent
        is_run = (parent / workdir.RUN.mark).exists()
    return Place(place, parent if is_run and place.name == "checkpoints" else None)


def of_best(place: Place) -> Place | None:
    """Returns where the best state of a run lies; None if it keeps none."""
    if place.run is None:
        return None
    best = place.run / "best" / "checkpoints"
    return Place(best, best.parent) if steps.found(best) else None


def look(place: Place, *, hashed: bool) -> list[Looked]:
    """Returns what every step is, the oldest first.

    Args:
      hashed: whether every byte is read; else the names of files are looked at.
    """
    looked = []
    for one in steps.found(place.checkpoints):
        state = _STATES.get(one.kind)
        wrong = None
        if one.kind == "complete":
            wrong = digests.damage(one.path, parts(one.path), hashed=hashed)
            state = f"damaged: {wrong}" if wrong else "complete"
        size = space.num_bytes(one.path)
        looked.append(Looked(one, size, state, damaged=wrong is not None))
    return looked


def parts(step: AnyPath) -> tuple[str, ...]:
    """Returns which sub-directories a step consists of."""
    notes = (step / checkpointer.NOTES).is_dir()
    return (*_ITEMS, checkpointer.NOTES) if notes else _ITEMS


def choose(place: Place, *, keep: int, keep_every: int | None = None) -> Choice:
    """Returns which steps stay and which may go; reads the newest ones whole.

    Args:
      keep: how many whole ones stay, of the newest.
      keep_every: steps that are a multiple stay, too; 0: none. None: those that the
        run keeps for good, by its settings or by those that it had.

    Raises:
      SetupError: if the directory is not one of a run's own checkpoints, or none of
        its steps is whole.
    """
    if keep < 1:
        raise errors.SetupError(f"--keep={keep} checkpoints; expected at least 1.")
    if keep_every is not None and keep_every < 0:
        raise errors.SetupError(f"--keep_every={keep_every}; expected 0 or more steps.")
    check_prunable(place)
    every, for_good = keep_every, []
    if keep_every is None:
        every, for_good = _kept_for_good(place), steps.for_good(place.checkpoints)
    choice, whole = Choice([], []), 0
    for one in reversed(steps.found(place.checkpoints)):
        reason = None
        if one.kind == "replaced":
            reason = _STATES[one.kind]
        elif one.kind == "complete" and whole < keep:
            wrong = digests.damage(one.path, parts(one.path))
            whole += wrong is None
            # Newer than what the run goes on from: somebody may want to mend it.
            reason = f"damaged: {wrong}" if wrong else "newest"
        elif one.kind == "complete" and every and one.step % every == 0:
            reason = f"kept for good, a multiple of {every}"
        elif one.kind == "complete" and one.step in for_good:
            reason = "kept for good, as it was saved to be"
        if reason is None:
            choice.go.append((one, space.num_bytes(one.path)))
        else:
            choice.stay.append((one, reason))
    if not whole:
        raise errors.SetupError(
            f"No step in {place.checkpoints} is whole, so none is deleted: "
            f"{'; '.join(f'{one.path.name} {why}' for one, why in choice.stay[::-1])}."
        )
    return Choice(choice.stay[::-1], choice.go[::-1])


def remove(chosen: Sequence[tuple[steps.Found, int]]) -> None:
    """Removes steps, the oldest first."""
    for one, _ in chosen:
        steps.remove(one.path)


def check_prunable(place: Place) -> None:
    """Raises SetupError if the directory is not one of a run's own checkpoints."""
    if place.run is None:
        raise errors.SetupError(
            f"{place.checkpoints} has no {workdir.RUN.mark} of a run beside it, so "
            "nobody can tell whose checkpoints these are; nothing is deleted. Give the "
            "--workdir of a run."
        )
    workdir.read_config(place.run)
    if place.run.name == "best" and (place.run.parent / workdir.RUN.mark).exists():
        raise errors.SetupError(
            f"{place.run} holds the best state of {place.run.parent}, of which there "
            "is one; nothing is deleted there."
        )


def _kept_for_good(place: Place) -> int:
    config = place.config
    if not config.checkpoint.keep_every_epochs:
        return 0
    path = place.run / "dataset.json"
    with errors.setting_up():
        dataset = records.read(path, cure="give --keep_every=STEPS, 0 for none")
        num_images = dataset.get("num_images")
        if not records.is_number(num_images) or num_images < 1:
            raise ValueError(f"{path} has no num_images; give --keep_every=STEPS.")
        per_epoch = num_images / config.data.batch_size
        return schedule.of(
            config.checkpoint, steps_per_epoch=per_epoch,
            total=max(1, int(config.epochs * per_epoch)),
        ).keep_every
