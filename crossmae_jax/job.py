"""What a run is going to do, found out before anything is computed: `plan`.

Whatever the user can have got wrong (settings, data, directory, weights to start from)
is an error here, and not after hours.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from crossmae_jax import objectives, ranges, train_step
from crossmae_jax.checkpoints import checkpointer, schedule
from crossmae_jax.convert import starting
from crossmae_jax.data import content, order, pipeline, sources
from crossmae_jax.data.batches import Batches
from crossmae_jax.distributed import cluster, parallel, sharding
from crossmae_jax.evals import attention_maps, while_training
from crossmae_jax.optim import optimizers
from crossmae_jax.runs import mirror, workdir
from crossmae_jax.runs.best import Best
from crossmae_jax.train_step import TrainState

_MOST_STEPS = 2**31 - 1  # the state counts them in int32


class Leg(NamedTuple):
    """A part of a run in which every step is made alike; most runs are one.

    Attributes:
      first: the steps that are made before it; `last`, and with it.
      config: by which its batches are trained on.
      step: jitted; (state, batch) -> (state, metrics).
      maps: what is made at its beginning, of the state, and weighs patches in it.
    """

    first: int
    last: int
    config: ConfigDict
    step: jax.stages.Wrapped
    maps: attention_maps.AttentionMaps | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run is going to do, and with what; made by `plan`.

    Attributes:
      home: where its files lie.
      images: the sources of the splits "train" and, where there is one, "eval".
      init_key: of the parameters that are drawn, and `step_key` of what steps draw.
      mesh_line: how the state lies on the mesh, for people.
      abstract: shapes and shardings of the state.
      init: jitted; key -> state.
      total: steps of the whole run.
      legs: its parts, in their order.
      weights: what to start from where there is no checkpoint; none: drawn parameters.
      notes: lines about what is other than in the launch before, for people.
    """

    config: ConfigDict
    home: mirror.Home
    images: dict[str, sources.Source]
    init_key: Key[Array, ""]
    step_key: Key[Array, ""]
    mesh: jax.sharding.Mesh
    mesh_line: str
    abstract: TrainState
    init: jax.stages.Wrapped
    total: int
    legs: tuple[Leg, ...]
    steps_per_epoch: float
    saving: schedule.Schedule
    evaluations: while_training.Evaluations
    checkpoints: checkpointer.Checkpoints
    best: Best
    weights: list[starting.Start]
    notes: list[str]

    def logs(self, step: int) -> bool:
        """Says whether metrics are logged after a step; they are at each save, too."""
        return step % self.config.log_every_steps == 0

    def saves(self, step: int) -> bool:
        """Says whether a checkpoint is due after a step; one always is at the end."""
        return step == self.total or self.saving.saves(step)

    def left(self, step: int) -> list[Leg]:
        """Returns the legs that a state of this step has not come to the end of."""
        return [leg for leg in self.legs if step < leg.last]

    def begins_of(self, steps: Iterable[int]) -> set[int]:
        """Returns with which steps the legs begin that these states go on in."""
        return {
            leg.first for leg in self.legs for step in steps
            if leg.first <= step < leg.last
        }

    def check_files(self, step: int) -> None:
        """Finds out whether a state of this step can be gone on from.

        Raises:
          ValueError: if its leg needs a file that is not there any more.
        """
        for leg in self.left(step)[:1]:
            if step > leg.first:
                self.images_of(leg)

    def images_of(self, leg: Leg) -> sources.Source:
        """Returns the training images as a leg sees them.

        Raises:
          ValueError: if it needs a file that is not there any more.
        """
        if leg.maps is None:
            return self.images["train"]
        return leg.maps.source(leg.first)

    def batches(self, leg: Leg, step: int, stop: Callable[[], bool]) -> Batches:
        """Returns the batches of a leg, from behind this step on."""
        return pipeline.train_batches(
            self.images_of(leg), leg.config.data, seed=leg.config.seed,
            start_step=step, num_steps=leg.last - step,
            process_index=jax.process_index(), process_count=jax.process_count(),
            workdir=str(self.home.local),
            num_classes=leg.config.data.get("num_classes"), stop=stop,
        )

    def due(self, step: int) -> list[str]:
        """Returns which evaluations run after a step; those at the end are apart."""
        if step == self.total:
            return []
        return self.evaluations.due(step, self.steps_per_epoch)


def plan(config: ConfigDict, home: mirror.Home, stack: contextlib.ExitStack) -> Job:
    """Puts together a run, and finds out whether its parts fit each other.

    Args:
      stack: closes what is opened here.

    Raises:
      ValueError: if configuration, data or directory contradict each other.
    """
    cluster.check_same(config.to_json(sort_keys=True) + str(home.path))
    ranges.check_finite(config)
    order.check_seed(config.seed)
    images = {"train": sources.make_source(config.data, "train")}
    classes = images["train"].classes
    config = objectives.with_classes(config, images["train"])
    objective = objectives.make(config)
    if held_out := sources.make_source(config.data, "eval", classes=classes):
        images["eval"] = held_out
    parallel.check_batch_size(
        config.data.batch_size, jax.device_count(), accum_steps=config.optim.accum_steps
    )
    total, steps_per_epoch = duration(config, len(images["train"]))
    # The kind of key is named: JAX's default may be set to another elsewhere.
    root = jax.random.key(config.seed, impl="threefry2x32")
    init_key, step_key, panel_key = jax.random.split(root, 3)
    saving = schedule.of(
        config.checkpoint, steps_per_epoch=steps_per_epoch, total=total
    )
    rate = optimizers.make_schedule(config, steps_per_epoch=steps_per_epoch)
    tx = optimizers.make_optimizer(config, rate)
    abstract = train_step.abstract_state(objective, tx, init_key)
    mesh, mesh_line = sharding.make_mesh(config, abstract)
    evaluations = while_training.Evaluations(
        config, objective, images, mesh=mesh, directory=home.local, key=panel_key
    )
    compile_steps = functools.partial(
        train_step.compile_steps, tx=tx, mesh=mesh, schedule=rate, key=step_key,
        accum_steps=config.optim.accum_steps, log_norms=config.log_norms,
        max_skipped_in_a_row=config.optim.max_skipped_in_a_row,
    )
    init, step = compile_steps(objective)
    legs, others = (Leg(0, total, config, step),), {}
    made = attention_maps.steps(config, steps_per_epoch=steps_per_epoch, total=total)
    if made:
        maps = attention_maps.AttentionMaps(
            config, objective, images["train"], mesh=mesh, home=home, key=panel_key
        )
        legs = _legs_with_maps(config, maps, [*made, total], step, compile_steps)
        # Each checkpoint may go on from another one, and so does the run.
        num_files = min(len(made), config.checkpoint.keep + 1)
        others["attention maps"] = maps.bytes_to_come(num_files=num_files)
    checkpoints = _checkpoints(config, home, abstract, saving, others)
    stack.callback(checkpoints.close)
    resuming = bool(checkpoints.steps())
    weights = [] if resuming else starting.plan_all(
        objective.starts, abstract.variables, config, classes=classes
    )
    best, notes = _claim(config, home, images["train"], resuming=resuming)
    stack.callback(best.close)
    return Job(
        config=config, home=home, images=images, init_key=init_key,
        step_key=step_key, mesh=mesh, mesh_line=mesh_line, init=init, total=total,
        legs=legs,
        abstract=parallel.with_sharding(abstract, sharding.shardings(mesh, abstract)),
        steps_per_epoch=steps_per_epoch, saving=saving, evaluations=evaluations,
        checkpoints=checkpoints, best=best, weights=weights, notes=notes,
    )


def _legs_with_maps(
    config: ConfigDict, maps: attention_maps.AttentionMaps, ends: list[int],
    step: jax.stages.Wrapped, compile_steps: Callable[..., Any],
) -> tuple[Leg, ...]:
    """Returns the legs of a run: until there are maps, and behind each making of them.

    Args:
      ends: of all legs.
      step: of all legs but the first.
    """
    before = attention_maps.before(config)
    _, first_step = compile_steps(objectives.make(before))
    return (Leg(0, ends[0], before, first_step), *(
        Leg(first, last, config, step, maps)
        for first, last in itertools.pairwise(ends)
    ))


def _checkpoints(
    config: ConfigDict, home: mirror.Home, abstract: TrainState,
    saving: schedule.Schedule, others: dict[str, int],
) -> checkpointer.Checkpoints:
    """Opens the checkpoints, if there is room for those to come, and for others."""
    workdir.check_space(
        home.path, checkpoint_bytes=sharding.num_bytes(abstract),
        keep=config.checkpoint.keep, best=bool(config.checkpoint.best), others=others,
    )
    return checkpointer.Checkpoints(
        home.path / "checkpoints", keep=config.checkpoint.keep,
        keep_every=saving.keep_every, before_save=home.push,
    )


def duration(config: ConfigDict, num_images: int) -> tuple[int, float]:
    """Returns the number of steps, and steps per epoch, which need not be whole."""
    ranges.check("log_every_steps", config.log_every_steps, least=1)
    ranges.check("epochs", config.epochs, above=0)
    total = int(config.epochs * num_images // config.data.batch_size)
    if total < 1:
        raise ValueError(
            f"epochs={config.epochs} of {num_images} images do not fill one batch of "
            f"{config.data.batch_size}; raise config.epochs or lower "
            "config.data.batch_size."
        )
    if total > _MOST_STEPS:
        raise ValueError(
            f"epochs={config.epochs} are {total} steps, and at most {_MOST_STEPS} are "
            "counted; lower config.epochs."
        )
    return total, num_images / config.data.batch_size


def _claim(
    config: ConfigDict, home: mirror.Home, images: sources.Source, *, resuming: bool
) -> tuple[Best, list[str]]:
    """Makes the directory, or checks that it is this run's; opens its best state.

    Also returns notes for people.
    """
    dataset = {
        "num_images": len(images), "fingerprint": images.fingerprint,
        "classes": list(images.classes), "content": content.digests(images),
    }
    reordered = workdir.claim(
        home.local, config, resuming=resuming, dataset=dataset, name=home.path,
        image_name=images.name,
    )
    notes = [
        f"sums are made in another order now ({'; '.join(reordered)}): weights agree "
        "to rounding with those of a run without the change, not to the bit"
    ] * bool(reordered)
    if home.local == home.path:
        cluster.check_shared(home.local / "config.json")
    return Best(home, config, dataset), notes
