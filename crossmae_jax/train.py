"""The train loop: loss -> parameters.

One loop for every objective. A run is described by its config and lives in its workdir;
started again it goes on from its newest checkpoint, and ends with the same weights, bit
for bit, as if it had never stopped: the data order and the masks are functions of
(seed, sample number), and the state holds the rest; or a file in the workdir does, that
was made of an earlier state (`evals.attention_maps`).

    plan    everything that the user can have got wrong; nothing is computed (`job`)
    begin   the state: of a checkpoint, of other weights, or drawn
    train   leg by leg, of which most runs have one: what its batches need of the state,
            then step, log, save, stop, evaluate, in this order
    close   the last evaluation, baselines, the table and the page
"""

import contextlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax import errors, paths
from crossmae_jax.checkpoints import space
from crossmae_jax.cost import out_of_memory
from crossmae_jax.data import pipeline, sources
from crossmae_jax.data.batches import StoppedWaiting
from crossmae_jax.distributed import environment, parallel, preemption
from crossmae_jax.job import Job, Leg, plan
from crossmae_jax.ops import attention, attention_check
from crossmae_jax.optim import optimizers
from crossmae_jax.report import closing
from crossmae_jax.runs import lock, mirror, replay, resuming, watchdog, workdir
from crossmae_jax.runs.journal import Journal, NotFinite
from crossmae_jax.train_step import TrainState


def run(
    config: ConfigDict, directory: str | paths.AnyPath, *, resume: str = "auto"
) -> dict[str, float]:
    """Trains as the config says, in a directory of the run's own; returns the metrics.

    Goes on from the newest checkpoint in the directory if there is one. SIGTERM,
    Ctrl-C, SIGHUP and SIGUSR1 make it save and exit with status 75: run the same
    command again to go on.

    Where it stands still for `config.watchdog_minutes` it ends the process, see
    `runs.watchdog`.

    Args:
      resume: "must" is an error where there is no checkpoint, "never" where there is
        one; see `runs.resuming`.

    Raises:
      SetupError: if configuration, data or directory contradict each other.
      AcceleratorError: if JAX leaves the machine's accelerator idle.
      RestoreError: if there are checkpoints, but none that can be restored.
      KernelError: if a kernel does not compute what it should on these devices.
      OutOfMemory: if memory ends; says what the step needs, and what needs less.
      NotFinite: if loss or gradient were not finite in too many steps in a row.
      DiskError: if the disk is full or gone; what was whole before is.
    """
    begun = time.time()
    with errors.setting_up():
        directory = paths.path(directory)
    environment.check_accelerator()
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(
            watchdog.watching(directory, minutes=config.watchdog_minutes)
        )
        if jax.process_index() == 0:  # the others find what it has written already
            resuming.check(directory, resume)
            workdir.check_ours(directory)
        stack.enter_context(space.writing(directory))
        stack.enter_context(lock.held(directory))
        home = stack.enter_context(mirror.opened(directory))
        about = stack.enter_context(out_of_memory.advising(config, alive=watch.alive))
        with errors.setting_up():
            job = plan(config, home, stack)
        watch.alive()
        about.config = job.config
        state, resumed = begin(job, resume)
        first = int(state.step)
        with errors.setting_up():
            job.check_files(first)
        watch.alive()
        check_kernels(job, state)
        stop = stack.enter_context(preemption.stop_requests(watch.alive))
        with errors.setting_up():
            journal = stack.enter_context(Journal(
                home.local, total=job.total, first_step=first, resumed=resumed,
                begun=begun, images_per_step=job.config.data.batch_size,
                steps_per_epoch=job.steps_per_epoch, watch=watch,
                max_skipped_in_a_row=job.config.optim.max_skipped_in_a_row,
            ))
        try:
            state = train(job, state, journal, stop)
            return close(job, state, journal, stop)
        except preemption.Interrupted:  # the state is saved wherever this is raised
            journal.say(
                f"stopped: step {job.checkpoints.last_step} is saved in {home.path}; "
                "run the same command again to go on"
            )
            raise SystemExit(preemption.REQUEUE) from None


def begin(job: Job, resume: str) -> tuple[TrainState, bool]:
    """Returns the state to go on from, and whether a checkpoint had it.

    A checkpoint comes before `init_from`, and both before drawn parameters: what a run
    has learnt is never overwritten by what it once began with.
    """
    restored = job.checkpoints.restore_latest(job.abstract, younger=("skipped",))
    if restored is not None:
        step, state = restored
        parallel.say(f"RESUMED at step {step} of {job.total} from {job.home.path}")
    else:
        parallel.say(f"FRESH START in {job.home.path} (--resume={resume})")
        state = job.init(job.init_key)
        for start in job.weights:
            parallel.say("\n".join(start.report))
            state = state.replace(variables=start.apply(state.variables))
    parallel.announce()
    for note in job.notes:
        parallel.say(note)
    environment.write_environment(job.home.local)
    config = job.config
    described = [
        f"{split}: {sources.described(source)}" for split, source in job.images.items()
    ]
    parallel.say("\n".join(described))
    parallel.say(
        f"mesh: {job.mesh_line}\n"
        f"{len(job.images['train'])} images, {config.epochs:g} epochs, {job.total} "
        f"steps of {config.data.batch_size} images, peak learning rate "
        f"{optimizers.peak_lr(config):.3g}"
    )
    return state, restored is not None


def check_kernels(job: Job, state: TrainState) -> None:
    """Compares each attention kernel of the run with float32 on these devices.

    What is traced for it JAX keeps for the first step.
    """
    left = job.left(int(state.step))
    with attention.recording() as choices:
        for leg in {leg.step: leg for leg in left}.values():
            data = leg.config.data
            blank = pipeline.blank_batch(data, batch_size=data.batch_size)
            jax.eval_shape(leg.step, state, parallel.with_sharding(
                blank, parallel.batch_sharding(job.mesh)
            ))
        for leg in left[-1:]:
            if leg.maps is not None:
                leg.maps.trace(state.variables)
        job.evaluations.trace(state.variables)
    attention_check.check(choices, mesh=job.mesh)


def train(
    job: Job, state: TrainState, journal: Journal, stop: preemption.Stop
) -> TrainState:
    """Makes the steps that are left, leg by leg; returns the last state.

    Raises:
      Interrupted: if `stop` is set, also while a batch is waited for; the state is
        saved then.
      NotFinite: if too many steps in a row were skipped; the first can be made again.
    """
    first = int(state.step)
    if first == job.checkpoints.last_step:  # a stop may have cut its evaluation short
        evaluate(job, job.due(first), first, state, journal, stop)
    for leg in job.left(first):
        begin_leg(job, leg, state, journal, stop)
        state = train_leg(job, leg, state, journal, stop)
    return state


def begin_leg(
    job: Job, leg: Leg, state: TrainState, journal: Journal, stop: preemption.Stop
) -> None:
    """Makes what the batches of a leg need of the state that it begins with.

    The state is saved before, so that however this ends it is all that is done again.

    Raises:
      Interrupted: if `stop` is set meanwhile.
    """
    step = int(state.step)
    if leg.maps is None or step > leg.first:
        return
    save(job, step, state, journal, wait=False)
    try:
        with journal.spent("refresh"):
            cost = leg.maps.make(step, state.variables, stop=stop, say=journal.say)
    except preemption.Interrupted:
        save(job, step, state, journal, wait=True)
        raise
    journal.evaluated(step, cost)
    job.checkpoints.wait()  # what is being written may go on in the leg before
    leg.maps.remove_all_but(job.begins_of([step, *job.checkpoints.steps()]))


def train_leg(
    job: Job, leg: Leg, state: TrainState, journal: Journal, stop: preemption.Stop
) -> TrainState:
    """Makes the steps of a leg: step, log, save, stop, evaluate.

    Where a state is both saved and evaluated it is saved first, and the run stops when
    it is saved: neither can lose a step. Steps that are not finite are skipped on the
    device (`optim.guard`), so a state may be saved whatever its last loss was.
    """
    first, make_step = int(state.step), journal.compiled_once(leg.step)
    with errors.setting_up():
        batches = job.batches(leg, first, stop.asked_here)
    with batches:
        try:
            for step, batch in enumerate(journal.reading(batches), start=first + 1):
                state, logged = make_step(state, parallel.place_batch(job.mesh, batch))
                stopping = stop.is_set()
                saving = stopping or job.saves(step)
                journal.stepped(step, logged, log=saving or job.logs(step))
                if saving:
                    wait = stopping or step == job.total
                    save(job, step, state, journal, wait=wait)
                if stopping:
                    raise preemption.Interrupted
                evaluate(job, job.due(step), step, state, journal, stop)
        except NotFinite as error:
            raise replay.kept(
                error, job.home, leg.config, job.images_of(leg), state,
                key=job.step_key,
            ) from None
        except StoppedWaiting as waiting:
            journal.say(str(waiting))
            save(job, int(state.step), state, journal, wait=True)
            raise preemption.Interrupted from None
    return state


def save(
    job: Job, step: int, state: TrainState, journal: Journal, *, wait: bool
) -> None:
    """Saves a state, unless it is saved already."""
    with journal.spent("save"):
        if step != job.checkpoints.last_step:
            job.checkpoints.save(step, state)
        if wait:
            job.checkpoints.wait()
    journal.saved()


def evaluate(
    job: Job,
    names: list[str],
    step: int,
    state: TrainState,
    journal: Journal,
    stop: preemption.Stop,
) -> None:
    """Runs evaluations of a state, and keeps it if it is the best so far.

    Raises:
      Interrupted: if `stop` is set meanwhile; the state is saved then, and evaluated
        again when the run goes on.
    """
    if not names:
        return
    try:
        with journal.spent("evaluate"):
            measured = job.evaluations.run(names, state.variables, step, stop=stop)
    except preemption.Interrupted:
        save(job, step, state, journal, wait=True)
        raise
    journal.evaluated(step, measured)
    with journal.spent("save"):
        job.best.offer(step, measured, state)


def close(
    job: Job, state: TrainState, journal: Journal, stop: preemption.Stop
) -> dict[str, float]:
    """Evaluates the last state, and tells how the run went; returns all its metrics."""
    evaluate(job, list(job.config.evals), job.total, state, journal, stop)
    results: dict[str, Any] = journal.latest | job.best.metrics()
    if job.config.baselines:
        with journal.spent("evaluate"):
            initial = job.init(job.init_key).variables
            results |= job.evaluations.baselines(initial, stop=stop)
    parallel.say(journal.finish())
    if jax.process_index() == 0:
        closing.report(job.home, results, pictures=job.evaluations.pictures)
    return results
