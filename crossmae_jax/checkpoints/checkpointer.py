"""Checkpoints: everything a run needs to go on, verified when it is read.

    directory/300/variables/    weights and fixed tables; readable alone
    directory/300/optimizer/    all other state: the step and the optimiser's moments
    directory/300/notes/        what is known of this state and of no other, if anything
    directory/300/SHA256SUMS    digests of all (`sha256sum -c SHA256SUMS`)
    directory/300/FOR_GOOD      in a step that stays when newer ones are saved

Orbax writes and restores the arrays. It has no digests of its own: a flipped byte comes
back as wrong weights without a word. So each step gets a list of digests while its
directory still has its temporary name; the rename that commits it makes the arrays and
the digests appear together. In a bucket (`gs://`), which cannot rename, the object that
Orbax commits a step with is written after the digests; a step without it is none.

Going on is never a guess. A damaged step is named, put aside, and the one before it is
used; if no step is left, that is an error and not a fresh start. State is read into
abstract arrays that carry the shardings of the present mesh, never the stored ones, so
a run may move to another number of devices. What the checkpoint and the model disagree
on is printed both ways before an array is read: Orbax by itself casts a changed dtype
in silence.

The directory is on a disk that all processes share, or in a bucket; process 0 verifies
and renames.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from crossmae_jax import errors, paths
from crossmae_jax.checkpoints import digests, matching, space, steps, tensors
from crossmae_jax.distributed import parallel
from crossmae_jax.paths import AnyPath

NOTES = "notes"
_NOTES_FILE = "metadata"  # the name that Orbax gives to a JSON item
_NONE, _ALL_DAMAGED = -1, -2  # what process 0 tells the others instead of a step


class RestoreError(errors.UserError, ValueError):
    """There is no checkpoint that can be restored, where there should be one."""


class MismatchError(RestoreError):
    """A checkpoint is intact, but holds other tensors than the model asks for."""


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them and some that stay.

    Attributes:
      last_step: of the state that was saved or restored last, None if none was.

    All processes of a run call every method. A state is a dataclass or dict of
    `jax.Array`s with the weights in its field `variables`.

    Args:
      keep_every: steps that are a multiple of it stay for good, whatever it is later;
        0: none of those to come do.
      before_save: called before each save: a step finds in its place what this puts
        there, and nobody finds the step without.

    Example:
      checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
      restored = checkpoints.restore_latest(abstract_state)
      step, state = restored if restored else (0, init())
      ...
      checkpoints.save(step, state)
      checkpoints.close()
    """

    def __init__(
        self,
        directory: str | AnyPath,
        *,
        keep: int,
        keep_every: int = 0,
        before_save: Callable[[], None] = lambda: None,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints; expected at least 1.")
        self._before_save, self._keep_every = before_save, keep_every
        self.directory = paths.absolute(directory)
        self.last_step: int | None = None
        self._warned = False  # that room is getting short
        if jax.process_index() == 0:
            for path in steps.unfinished(self.directory):
                parallel.say(
                    f"{path} was never completed (the run was stopped while writing "
                    "it); removing it."
                )
                paths.remove(path)
            steps.settle(self.directory, (tensors.VARIABLES,))
        ocp.multihost.sync_global_processes("crossmae_jax:steps_settled")
        policies = ocp.checkpoint_managers
        for_good = policies.CustomSteps(steps.for_good(self.directory))
        kept = [policies.LatestN(keep), for_good]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                # Orbax takes whatever it does not know in a bucket for unfinished.
                cleanup_tmp_directories=False,
                # Orbax calls this when all is written, right before the commit.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_digests
                ),
            ),
        )

    def steps(self) -> list[int]:
        """Returns the committed steps, damaged ones included, in ascending order."""
        return steps.committed(self.directory)

    def save(
        self,
        step: int,
        state: Any,
        *,
        wait: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves the state; unless `wait`, returns while files are still being written.

        The arrays are copied before it returns: the caller may donate them.

        Args:
          notes: values for JSON that are saved with the state as one, see `notes`.

        Raises:
          ValueError: if the save is refused because a step this new exists, or if the
            state is not made of `jax.Array`s.
          FileError: if nothing can be written into the directory.
          OSError: or whatever else made the previous save fail in the background.
        """
        items = tensors.by_item(state)
        for name, leaves in items.items():
            for path, leaf in leaves.items():
                if not isinstance(leaf, jax.Array):
                    raise ValueError(
                        f"{name}: {'/'.join(path)} is of type {type(leaf).__name__}; "
                        "expected a jax.Array. Wrap it in jnp.asarray(..., dtype)."
                    )
        self.wait()
        self._before_save()
        if jax.process_index() == 0:
            steps.check_place(self.directory)
            self._check_space(step, items)
        self.last_step = step
        arguments = {
            name: ocp.args.StandardSave(traverse_util.unflatten_dict(leaves))
            for name, leaves in items.items()
        }
        if notes is not None:
            arguments[NOTES] = ocp.args.JsonSave(dict(notes))
        saved = self._manager.save(step, args=ocp.args.Composite(**arguments))
        if not saved:
            raise ValueError(
                f"Step {step} was not saved: {self.directory} already holds steps "
                f"{self.steps()}, and only a newer one can be added. Resume from the "
                "newest, or use another directory."
            )
        if wait:
            self.wait()

    def _check_space(self, step: int, items: dict[str, tensors.Leaves]) -> None:
        needed = sum(
            leaf.nbytes for leaves in items.values() for leaf in leaves.values()
        )
        roomy = space.check(self.directory, step=step, needed=needed)
        if not roomy and not self._warned:
            self._warned = True
            parallel.say(
                "WARNING: there is no room for two more checkpoints of "
                f"{space.shown(needed)}. {space.cure(self.directory)}"
            )

    def notes(self, step: int) -> dict[str, Any] | None:
        """Returns what was saved beside a state; None if nothing was, or is intact."""
        return read_notes(self.directory / str(step))

    def replace(self, step: int, state: Any, *, notes: Mapping[str, Any]) -> None:
        """Saves the state in place of this step and of all newer ones.

        Returns when it is committed; a kill before that leaves the others.
        """
        self.wait()
        if jax.process_index() == 0:
            steps.step_out(self.directory, step)
        ocp.multihost.sync_global_processes("crossmae_jax:steps_stepped_out")
        self._manager.reload()
        self.save(step, state, wait=True, notes=notes)
        if jax.process_index() == 0:
            steps.settle(self.directory, (tensors.VARIABLES,))

    def wait(self) -> None:
        """Waits until the last save is committed.

        Raises:
          DiskError: if it failed.
        """
        with space.saving(self.directory, self.last_step):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and for the removal of old steps."""
        with space.saving(self.directory, self.last_step):
            self._manager.close()

    def restore_latest(
        self, abstract_state: Any, *, younger: Iterable[str] = ()
    ) -> tuple[int, Any] | None:
        """Returns the newest intact step and its state; None if nothing was ever saved.

        Steps that are damaged are named, and renamed to `300.damaged` once an older one
        has taken their place.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with the shardings to restore into.
          younger: fields of the state that steps of older versions do not have; of
            these they are zero.

        Raises:
          RestoreError: if there are steps and all are damaged.
          MismatchError: if the newest intact step does not fit `abstract_state`.
        """
        self.wait()
        items = tensors.by_item(abstract_state)
        step, damaged = _newest_intact(self.directory, items)
        if step is None:
            return None
        path = self.directory / str(step)
        zeros = matching.absent(
            items.get(tensors.OPTIMIZER, {}),
            lambda: tensors.stored(path / tensors.OPTIMIZER), younger,
        )
        _check_match(path, items)
        restored = zeros | {
            names if name == tensors.OPTIMIZER else (tensors.VARIABLES, *names): leaf
            for name, leaves in items.items()
            for names, leaf in tensors.read(path / name, leaves).items()
        }
        self._put_aside(damaged)
        self.last_step = step
        return step, jax.tree.unflatten(
            jax.tree.structure(abstract_state),
            [restored[name] for name in tensors.leaf_names(abstract_state)],
        )

    def _write_digests(self) -> None:
        final = self.directory / str(self.last_step)
        temporary = final.with_name(final.name + ocp.utils.TMP_DIR_SUFFIX)
        path = temporary if temporary.exists() else final
        if self._keep_every and self.last_step % self._keep_every == 0:
            steps.mark_for_good(path, self._keep_every)
        digests.write(path)

    def _put_aside(self, damaged: Iterable[int]) -> None:
        """Renames damaged steps, so that the run can write these steps again."""
        if jax.process_index() == 0:
            for step in damaged:
                path = self.directory / str(step)
                target = steps.put_aside(path)
                parallel.say(
                    f"Put {path} aside as {target.name}; delete it when you like."
                )
        ocp.multihost.sync_global_processes("crossmae_jax:damaged_steps_put_aside")
        self._manager.reload()


def read_notes(step: AnyPath) -> dict[str, Any] | None:
    """Returns the notes in the directory of a step; None if none are, or are intact."""
    if digests.damage(step, (NOTES,)) is not None:
        return None
    return json.loads((step / NOTES / _NOTES_FILE).read_text())


def newest_step(directory: str | AnyPath) -> int:
    """Returns the newest intact step; raises RestoreError if there is none."""
    directory = paths.absolute(directory)
    step, _ = _newest_intact(directory, (tensors.VARIABLES,))
    if step is None:
        contents = steps.contents(directory)
        raise RestoreError(f"No checkpoint in {directory}; {contents}.")
    return step


def restore_variables(
    directory: str | AnyPath, abstract_variables: Any = None, step: int | None = None
) -> Any:
    """Reads the weights of a checkpoint, without the optimiser, and verifies them.

    Needs neither the config nor the devices of the run. Reads only; a run may be
    writing to the directory.

    Args:
      directory: a run's `checkpoints`.
      abstract_variables: `jax.ShapeDtypeStruct`s with shardings, checked against the
        file. Default: whatever is there, as nested dicts on one device.
      step: default: the newest intact step.

    Raises:
      RestoreError: if there is no checkpoint, or none (or not `step`) is intact.
      MismatchError: if the weights do not fit `abstract_variables`.
    """
    directory = paths.absolute(directory)
    if step is None:
        step = newest_step(directory)
    else:
        _check_intact(directory, step, (tensors.VARIABLES,))
    path = directory / str(step)
    if abstract_variables is None:
        return traverse_util.unflatten_dict(tensors.read(path / tensors.VARIABLES))
    items = tensors.by_item({tensors.VARIABLES: abstract_variables})
    _check_match(path, items)
    restored = tensors.read(path / tensors.VARIABLES, items[tensors.VARIABLES])
    return jax.tree.unflatten(
        jax.tree.structure(abstract_variables), list(restored.values())
    )


def restore_arrays(directory: str | AnyPath, step: int) -> dict[str, np.ndarray]:
    """Returns all arrays of a step by name, "optimizer/..." included.

    Raises:
      RestoreError: if there is no such step, or it is not intact.
    """
    directory, items = paths.absolute(directory), (tensors.VARIABLES, tensors.OPTIMIZER)
    _check_intact(directory, step, items)
    return {
        "/".join((item, *names)): np.asarray(leaf) for item in items
        for names, leaf in tensors.read(directory / str(step) / item).items()
    }


def _check_intact(directory: AnyPath, step: int, items: Iterable[str]) -> None:
    if step not in (there := steps.committed(directory)):
        raise RestoreError(f"No step {step} in {directory}; it holds steps {there}.")
    if reason := digests.damage(directory / str(step), tuple(items)):
        raise RestoreError(f"Step {step} in {directory} is damaged: {reason}.")


def _newest_intact(
    directory: AnyPath, items: Iterable[str]
) -> tuple[int | None, dict[int, str]]:
    """Returns the newest intact step, and for each newer one what is wrong with it."""
    damaged: dict[int, str] = {}
    chosen = _NONE
    if jax.process_index() == 0:
        for step in reversed(steps.committed(directory)):
            reason = digests.damage(directory / str(step), tuple(items))
            if reason is None:
                chosen = step
                break
            damaged[step] = reason
            parallel.say(f"Skipping checkpoint {step} in {directory}: {reason}.")
        else:
            chosen = _ALL_DAMAGED if damaged else _NONE
    if jax.process_count() > 1:
        chosen = int(ocp.multihost.broadcast_one_to_all(np.int32(chosen)))
    if chosen == _ALL_DAMAGED:
        there = steps.committed(directory)
        reasons = "".join(f"\n  step {step}: {why}" for step, why in damaged.items())
        raise RestoreError(
            f"{directory} has {len(there)} checkpoint(s), and none can be restored:"
            f"{reasons or ' process 0 lists the reasons.'}\n"
            "Refusing to start over in a directory that holds a run. Put back a copy "
            "of a step, or train from the start in a new --workdir. If only the list "
            "of digests is gone and you trust the files: python -c 'from "
            "crossmae_jax.checkpoints import digests; "
            f"digests.write(\"{directory / str(there[-1])}\")'."
        )
    return (None if chosen == _NONE else chosen), damaged


def _check_match(path: AnyPath, items: dict[str, tensors.Leaves]) -> None:
    """Raises MismatchError unless a step holds exactly the tensors asked for."""
    ours, theirs = {}, {}
    for item, leaves in items.items():
        for names, leaf in leaves.items():
            if leaf.sharding is None:
                raise ValueError(
                    f"{item}: {'/'.join(names)} has no sharding; give "
                    "jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
                )
            ours[item, *names] = (tuple(leaf.shape), jnp.dtype(leaf.dtype))
        if (path / item).exists():
            stored = tensors.stored(path / item)
            theirs |= {(item, *names): value for names, value in stored.items()}
    if ours != theirs:
        raise MismatchError(matching.differences(path, theirs, ours))
