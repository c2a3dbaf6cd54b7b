"""A run's directory, and the guard against mixing two runs in one.

    config.json         the whole configuration
    dataset.json        how many images, a fingerprint of which ones, digests of what
                        a few of them hold, and the names of their classes, in the
                        order of their numbers
    environment.json    versions and devices
    metrics.jsonl       one line per log point; tensorboard/ holds the same
    run.lock            who trains here now, see `lock`
    time.json           where the wall time went, over all launches
    checkpoints/        what resuming needs
    best/               a run of its own: the best state, where one is kept
    panels/             reconstructions
    curve.png           the loss over the steps, drawn at the end
    results.json        what was found at the end, with the baselines
    report.html         all of this on one page, written at the end
    stacks.process_0.txt
                        what a run did that stood still, see `watchdog`; of further
                        processes stacks.process_1.txt, ...
    hung.json           how often it did
    nan_step_7.npz      a step to make again, of a run that came to numbers that are not
                        finite; see `replay`
    bad_images.jsonl    images that could not be decoded, if any; of further processes
                        bad_images.process_1.jsonl, ...

A directory with checkpoints belongs to the run that wrote them. Going on with another
learning rate, model or data set would be a different run under the same name, so it is
refused; settings that cannot change a weight may change.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax import errors, paths
from crossmae_jax.checkpoints import space, steps
from crossmae_jax.data import bad_images, content
from crossmae_jax.distributed import parallel
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import ownership, records, settings

_PICTURES_BYTES = 50_000_000  # panels, curves, the page
_CURE = (
    "put back a copy of it (best/ has one, where a best state is kept), or give a new "
    "--workdir"
)
# What every configuration has had, and nobody else's config.json has all of.
_SETTINGS = {
    "data": dict, "epochs": (int, float), "model": dict, "optim": dict, "seed": int,
}
# What there is whatever the objective, once it is completed.
_NEEDED = {
    "data.source": str, "data.batch_size": int, "model.encoder.size": str,
}
RUN = ownership.Kind(
    "a run", "config.json", frozenset(_SETTINGS),
    early=(
        r"(run\.lock|hung\.json|stacks\.process_\d+\.txt)(\.tmp)?|config\.json\.tmp"
        "|checkpoints"
    ),
    cure=_CURE,
)

# Keys that may differ when a run is resumed: where things lie, how often to look, and
# which files are good enough: who has stopped at a bad one may repair it, or allow it.
# Likewise who has stopped at steps that are not finite may allow more of them.
_FREE = (
    "log_every_steps", "log_norms", "checkpoint", "evals", "baselines", "data.workers",
    "data.dir", "data.data_dir", "data.eval_dir", "data.eval_split",
    "data.eval_crop_ratio", "data.max_bad_share", "data.max_pixels",
    "data.max_skipped_share", "model.remat", "mesh", "optim.max_skipped_in_a_row",
    "watchdog_minutes",
)


# Of these, those that change in which order sums are made.
_OF_ROUNDING = ("model.remat", "mesh")


def is_run(path: str | AnyPath) -> bool:
    """Says whether a path is the workdir of a run with checkpoints."""
    path = paths.path(path)
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def read_config(workdir: str | AnyPath) -> ConfigDict:
    """Returns the configuration of a run, for this version of the library.

    Raises:
      FileNotFoundError: if the directory is not that of a run.
      SetupError: if its configuration is damaged, or none of ours.
    """
    path = paths.path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give the --workdir that a run was started with."
        )
    return ConfigDict(settings.as_written(_stored_settings(path)))


def _stored_settings(path: AnyPath) -> dict[str, Any]:
    """Returns the settings in a `config.json`, with the names of this version."""
    stored = records.read(path, cure=_CURE)
    if lacking := [
        name for name, kind in _SETTINGS.items()
        if not isinstance(stored.get(name), kind)
    ]:
        raise errors.SetupError(
            f"{path} is not the configuration of a run: {', '.join(lacking)} missing; "
            "give the --workdir that a run was started with."
        )
    try:
        completed = settings.completed(stored)
    except (AttributeError, TypeError) as error:  # of a value in place of a group
        raise records.DamagedRecord(f"{path} is damaged ({error}); {_CURE}.") from error
    flat = flatten(completed)
    if wrong := [
        name for name, kind in _NEEDED.items() if not isinstance(flat.get(name), kind)
    ]:
        raise records.DamagedRecord(
            f"{path} is damaged ({', '.join(wrong)} missing, or of another kind); "
            f"{_CURE}."
        )
    return completed


def check_ours(workdir: AnyPath) -> None:
    """Refuses the directory of somebody else, before a run writes anything into it.

    Raises:
      SetupError: see `ownership.check`.
    """
    if steps.committed(workdir / "checkpoints") and (
        not (workdir / "config.json").exists()
    ):
        return  # `claim` says what is missing
    ownership.check(workdir, [RUN])


def read_classes(workdir: str | AnyPath) -> tuple[str, ...] | None:
    """Returns the names of the classes that a run's labels are numbers of.

    None if it had no labels, or was started before names were kept.
    """
    path = paths.path(workdir) / "dataset.json"
    stored = records.read(path, cure=_CURE) if path.exists() else {}
    classes = stored.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(x, str) for x in classes):
        raise records.DamagedRecord(
            f"{path} is damaged (its classes are no list of names); {_CURE}."
        )
    return tuple(classes) or None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns settings by their whole names, such as `optim.base_lr`."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differing(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that differ and can change a weight, with both values.

    Names are "optim.base_lr"; of a setting that is not there the value is "absent".
    """
    return {
        name: values for name, values in all_differing(old, new).items()
        if not _among(name, _FREE)
    }


def all_differing(
    old: dict[str, Any], new: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that differ, whatever they change, as `differing` does."""
    old, new = flatten(old), flatten(new)
    return {
        name: (old.get(name, "absent"), new.get(name, "absent"))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    }


def _among(name: str, settings_or_groups: tuple[str, ...]) -> bool:
    return any(name == n or name.startswith(f"{n}.") for n in settings_or_groups)


def _lines(changes: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return _lines(differing(old, new))


def _reordered(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return _lines({
        name: values for name, values in all_differing(old, new).items()
        if _among(name, _OF_ROUNDING)
    })


def _other_data(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, now = old.get("classes"), new.get("classes")
    by_value = [
        {k: v for k, v in tree.items() if k not in ("classes", "content")}
        for tree in (old, new)
    ]
    changed = _differences(*by_value)
    if before is not None and before != now:  # else started before names were kept
        pairs = enumerate(itertools.zip_longest(before, now))
        first = [f"{i} {a!r} -> {b!r}" for i, (a, b) in pairs if a != b][:5]
        changed.append(f"classes: {len(before)} -> {len(now)}; {', '.join(first)}")
    return changed


def _other_content(
    workdir: Path, old: dict[str, Any], new: dict[str, Any],
    image_name: Callable[[int], str], shown: AnyPath,
) -> list[str]:
    """Returns which images hold something else, but those that may be repaired."""
    numbers = None
    if "content" in old:
        numbers = content.differing(
            old["content"], new["content"], num_images=new["num_images"]
        )
    if numbers is None:
        parallel.say(
            f"{shown}/dataset.json is from before the content of images was noted: "
            "whether it is the same cannot be told. From now on it can."
        )
        return []
    bad = bad_images.listed(workdir)
    names = [name for name in map(image_name, numbers) if name not in bad]
    if not names:
        return []
    looked_at = len(new["content"].split())
    return [
        f"content: {len(names)} of {looked_at} images that were looked at hold "
        f"something else, first {names[0]}"
    ]


def check_space(
    workdir: AnyPath, *, checkpoint_bytes: int, keep: int, best: bool,
    others: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Finds out whether a disk can hold what a run is going to save, and pictures.

    That is one checkpoint more than are kept, since the oldest goes when the next one
    is whole; of a best state likewise. Those that are there already are counted. Asks
    nothing of a bucket.

    Args:
      others: bytes of what else it is going to write, by name.

    Raises:
      ValueError: if it cannot.
    """
    place = workdir / "checkpoints"
    if (free := space.free(workdir)) is None:
        return
    count = max(keep + 1 - len(steps.committed(place)), 1)
    if best:
        count += max(2 - len(steps.committed(workdir / "best" / "checkpoints")), 1)
    needed = count * checkpoint_bytes + _PICTURES_BYTES + sum(others.values())
    named = "".join(f", {name} of {space.shown(n)}" for name, n in others.items())
    if free < needed:
        raise ValueError(
            f"{space.shown(free)} are free on the disk of {workdir}, but {count} "
            f"checkpoints of {space.shown(checkpoint_bytes)}{named} and pictures "
            f"need {space.shown(needed)} (checkpoint.keep={keep} and the next one). "
            "Lower config.checkpoint.keep, or give a --workdir on another disk, or "
            f"make room: {space.cure(place)}"
        )


def claim(
    workdir: Path, config: ConfigDict, *, dataset: dict[str, Any], resuming: bool,
    name: AnyPath | None = None, image_name: Callable[[int], str] = "image {}".format,
) -> list[str]:
    """Writes what the run is; when resuming, first checks that it is the same run.

    Returns the changes, to settings that may change, of the order of sums: from here on
    weights are those of before to rounding, not to the bit.

    Args:
      name: of the workdir in errors, where these files are copies.
      dataset: number of images, fingerprint, content (see `data.content`) and classes
        of the training data.
      image_name: of the image of a number, for errors.
      resuming: whether the directory holds checkpoints to go on from.

    Raises:
      ValueError: if the directory's checkpoints belong to another configuration or to
        other data; lists every difference.
    """
    shown, reordered = name or workdir, []
    own = {"config.json": json.loads(config.to_json()), "dataset.json": dataset}
    if resuming:
        for file, new in own.items():
            if not (workdir / file).exists():
                raise ValueError(
                    f"{shown} holds checkpoints but no {file}, so nobody can tell "
                    "which run they belong to; give a new --workdir."
                )
            if file == "config.json":
                stored = _stored_settings(workdir / file)
                changed = _differences(stored, new)
                reordered = _reordered(stored, new)
            else:
                old = records.read(workdir / file, cure=_CURE)
                changed = _other_data(old, new)
                if not changed and "content" in new:
                    changed = _other_content(workdir, old, new, image_name, shown)
            if changed:
                raise ValueError(
                    f"{shown} holds checkpoints of another run; {file} differs:\n  "
                    + "\n  ".join(changed)
                    + "\nGo on with the old settings and data, or give a new --workdir."
                )
    if jax.process_index() != 0:
        return reordered
    workdir.mkdir(parents=True, exist_ok=True)
    for file, new in own.items():
        paths.write_whole(workdir / file, json.dumps(new, indent=2) + "\n")
    return reordered
