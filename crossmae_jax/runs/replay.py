"""What a run that came to numbers that are not finite leaves: a step to make again.

    nan_step_48207.npz     in the workdir
      batch/NAME           the whole batch, as the step had it
      variables/...        weights and statistics, as the step had them
      key                  what masks and the like are drawn with
      about                JSON: step, configuration, names of the images, versions

It is the first of the steps in a row that were skipped. Weights have not changed since,
so those in memory are the ones that it had; its batch is made once more, as batches of
a source are functions of (seed, step). NumPy alone reads the file:

    np.load("nan_step_48207.npz")["variables/params/encoder/cls_token"]

Of several processes the first one writes it, with the weights of all.
"""

import dataclasses
import io
import json
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from crossmae_jax import errors, paths
from crossmae_jax.data import order, pipeline, sources
from crossmae_jax.distributed import environment
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import mirror, records, settings
from crossmae_jax.runs.journal import NotFinite

_LONGEST = 1000  # bytes of an error that all processes are told
# What zip archives, the headers of arrays and what they hold can be wrong in; a header
# may claim more than there is memory, or more brackets than a parser can take.
_OF_DAMAGE = (
    AttributeError, EOFError, KeyError, MemoryError, OSError, OverflowError,
    RuntimeError, TypeError, ValueError, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error,
)


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step to make again.

    Attributes:
      step: its number; the weights are those after `step - 1`.
      in_a_row: how many steps from it on were not finite.
      names: of the images, in the order of the batch. Where an image could not be
        decoded another stood in for it, see bad_images.jsonl.
      versions: of the libraries that made it.
    """

    step: int
    in_a_row: int
    config: ConfigDict
    key: Key[Array, ""]
    variables: dict[str, Any]
    batch: dict[str, np.ndarray]
    names: list[str]
    versions: dict[str, str]


def kept(
    error: NotFinite, home: mirror.Home, config: ConfigDict, images: sources.Source,
    state: Any, *, key: Key[Array, ""],
) -> NotFinite:
    """Keeps the step that a run ends at; returns the error that also says where.

    Called by all processes; arguments are those of `keep`.
    """
    path, failed = keep(home.local, config, images, state, key=key)
    path, limit = home.name(path), config.optim.max_skipped_in_a_row
    last = int(state.step)
    first = last - int(state.skipped["in_a_row"]) + 1
    where = f"Step {first} cannot be kept in {path}: {failed}" if failed else (
        f"Batch, key and weights of step {first} are kept: python -m crossmae_jax "
        f"debug-nan {path} names the first bad tensor and the images."
    )
    return NotFinite(
        f"{error} These are steps {first} to {last}; they have changed no weight since "
        f"step {first - 1}. {where} Usual cures: lower config.optim.base_lr, "
        "config.optim.clip_norm=1.0, config.model.dtype=float32. To go past such "
        f"steps, raise config.optim.max_skipped_in_a_row={limit}."
    )


def keep(
    directory: Path, config: ConfigDict, images: sources.Source, state: Any,
    *, key: Key[Array, ""],
) -> tuple[Path, str]:
    """Writes the step that a state came to a halt at; called by all processes.

    Args:
      images: those of training.
      state: with the counts of `optim.guard`, and one step at least skipped in a row.
      key: of the training step.

    Returns:
      Where the file is, and why it could not be written, "" if it was.
    """
    in_a_row = int(state.skipped["in_a_row"])
    step = int(state.step) - in_a_row + 1
    path = directory / f"nan_step_{step}.npz"
    flat = traverse_util.flatten_dict({"variables": state.variables}, sep="/")
    arrays = {}
    for name, array in flat.items():
        value = _whole(array)
        if jax.process_index() == 0:
            arrays[name] = value
    failed = ""
    if jax.process_index() == 0:
        try:
            arrays |= _about(arrays, config, images, key, step=step, in_a_row=in_a_row)
            with paths.writing_whole(path) as out:
                np.savez(out, **arrays)
        except (errors.UserError, OSError) as error:
            failed = str(error)
    # Whoever leaves here ends the run: not while process 0 still writes.
    return path, _told(failed)


def _about(
    variables: dict[str, np.ndarray], config: ConfigDict, images: sources.Source,
    key: Key[Array, ""], *, step: int, in_a_row: int,
) -> dict[str, np.ndarray]:
    """Returns what the file of a step holds beside the weights."""
    batch, names = _batch(config, images, step)
    arrays = {f"batch/{name}": array for name, array in batch.items()}
    about = {
        "step": step, "in_a_row": in_a_row, "names": names,
        "config": json.loads(config.to_json()),
        "key_impl": str(jax.random.key_impl(key)),
        "dtypes": {
            name: str(array.dtype) for name, array in (variables | arrays).items()
        },
        "versions": environment.versions(),
    }
    return arrays | {
        "key": np.asarray(jax.random.key_data(key)),
        "about": np.array(json.dumps(about)),
    }


def _whole(array: jax.Array) -> np.ndarray:
    """Returns an array of which devices of other processes may hold parts."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _batch(
    config: ConfigDict, images: sources.Source, step: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the batch of a step, of all processes, and the names of its images."""
    data = config.data.copy_and_resolve_references()
    data.workers, data.max_bad_share = 0, 1.0
    with pipeline.train_batches(
        images, data, seed=config.seed, start_step=step - 1, num_steps=1
    ) as batches:
        batch = next(batches)
    first, count = (step - 1) * data.batch_size, len(images)
    numbers = (
        order.shuffled(sample, num_images=count, seed=config.seed)
        for sample in range(first, first + data.batch_size)
    )
    return batch, [images.name(number) for number in numbers]


def _told(text: str) -> str:
    """Returns the text of process 0 in all of them, not before it has come to it."""
    if jax.process_count() == 1:
        return text
    letters = np.zeros(_LONGEST, np.uint8)
    encoded = text.encode()[:_LONGEST]
    letters[:len(encoded)] = np.frombuffer(encoded, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(letters), np.uint8)
    return told.tobytes().rstrip(b"\0").decode(errors="ignore")


def read(path: str | AnyPath) -> Replay:
    """Reads the file of a step to make again, on a disk or in a bucket.

    Raises:
      SetupError: if it is none, or damaged.
      FileNotFoundError: if there is no such file.
    """
    path = paths.path(path)
    with path.open("rb") as raw:
        try:
            return _read(raw)
        except _OF_DAMAGE as error:
            raise errors.SetupError(
                f"{path} is not the file of a step to make again, or is damaged "
                f"({error}); give a nan_step_*.npz of a workdir."
            ) from error


def _read(raw: io.IOBase) -> Replay:
    with np.load(raw, allow_pickle=False) as file:
        about = records.parse(str(file["about"]))
        arrays = {
            name: file[name].view(np.dtype(dtype))
            for name, dtype in about["dtypes"].items()
        }
        key = jax.random.wrap_key_data(file["key"], impl=about["key_impl"])
    variables = {
        name: array for name, array in arrays.items() if name.startswith("variables/")
    }
    return Replay(
        step=about["step"], in_a_row=about["in_a_row"], key=key,
        config=ConfigDict(settings.as_written(settings.completed(about["config"]))),
        variables=traverse_util.unflatten_dict(variables, sep="/")["variables"],
        batch={
            name.removeprefix("batch/"): array for name, array in arrays.items()
            if name.startswith("batch/")
        },
        names=about["names"], versions=about["versions"],
    )
