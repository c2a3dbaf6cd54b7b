"""The train loop: loss -> parameters.

One loop for every objective. A run is described by its config and lives in its workdir;
started again it goes on from its newest checkpoint, and ends with the same weights, bit
for bit, as if it had never stopped: the data order and the masks are functions of
(seed, sample number), and the state holds the rest.
"""

import contextlib
import functools
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from crossmae_jax import errors, objectives, paths, train_step
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.convert import starting
from crossmae_jax.data import pipeline, sources
from crossmae_jax.distributed import (
    cluster,
    environment,
    parallel,
    preemption,
    sharding,
)
from crossmae_jax.evals import while_training
from crossmae_jax.ops import attention, attention_check
from crossmae_jax.optim import optimizers
from crossmae_jax.runs import best, metrics, mirror, walltime, workdir


def _check_finite(logged: dict[str, float], step: int, since: int) -> None:
    bad = [name for name, value in logged.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} not finite at step {step}, still finite at step {since};"
            " nothing was saved since. Usual cures: lower config.optim.base_lr, "
            "config.optim.clip_norm=1.0, config.model.dtype=float32."
        )


def run(config: ConfigDict, directory: str | paths.AnyPath) -> dict[str, float]:
    """Trains as the config says, in a directory of the run's own; returns the metrics.

    Goes on from the newest checkpoint in the directory if there is one. SIGTERM and
    Ctrl-C make it save and exit with status 75: run the same command again to go on.

    Raises:
      SetupError: if configuration, data or directory contradict each other.
      AcceleratorError: if JAX leaves the machine's accelerator idle.
      RestoreError: if there are checkpoints, but none that can be restored.
      KernelError: if a kernel does not compute what it should on these devices.
      FloatingPointError: if the loss is no longer finite.
    """
    begun = time.time()
    with errors.setting_up():
        directory = paths.path(directory)
    environment.check_accelerator()
    parallel.announce()
    with mirror.opened(directory) as home:
        return _run(config, home, begun=begun)


def _run(config: ConfigDict, home: mirror.Home, *, begun: float) -> dict[str, float]:
    directory = home.local
    with errors.setting_up():
        cluster.check_same(config.to_json(sort_keys=True) + str(home.path))
        opened = {"train": sources.make_source(config.data, "train")}
        config = objectives.with_classes(config, opened["train"].num_classes)
        objective = objectives.make(config)
        # The kind of key is named: JAX's default may be set to another elsewhere.
        root = jax.random.key(config.seed, impl="threefry2x32")
        init_key, mask_key, panel_key = jax.random.split(root, 3)
        if held_out := sources.make_source(config.data, "eval"):
            opened["eval"] = held_out
        parallel.check_batch_size(
            config.data.batch_size, jax.device_count(),
            accum_steps=config.optim.accum_steps,
        )
        if config.log_every_steps < 1:
            raise ValueError(
                f"log_every_steps={config.log_every_steps} must be 1 or more."
            )
        total, steps_per_epoch = _duration(config, len(opened["train"]))
        schedule = optimizers.make_schedule(config, steps_per_epoch=steps_per_epoch)
        tx = optimizers.make_optimizer(config, schedule)
        wanted = train_step.abstract_state(objective, tx, init_key)
        mesh, layout_line = sharding.make_mesh(config, wanted)
        evaluations = while_training.Evaluations(
            config, objective, opened, mesh=mesh, directory=directory,
            panel_key=panel_key,
        )
    init, step_fn = train_step.compile_steps(
        objective, tx, mesh, schedule=schedule, key=mask_key,
        accum_steps=config.optim.accum_steps,
    )

    with contextlib.ExitStack() as stack:
        with errors.setting_up():
            checkpoints = checkpointer.Checkpoints(
                home.path / "checkpoints", keep=config.checkpoint.keep,
                before_save=home.push,
            )
            stack.callback(checkpoints.close)
            weights = None
            if config.init_from and not checkpoints.steps():
                weights = starting.plan(config.init_from, wanted.variables, config)
            dataset = {
                "num_images": len(opened["train"]),
                "fingerprint": opened["train"].fingerprint,
            }
            workdir.claim(
                directory, config, resuming=bool(checkpoints.steps()), dataset=dataset,
                name=home.path,
            )
            kept = best.Best(home, config, dataset)
            stack.callback(kept.close)
        if home.local == home.path:
            cluster.check_shared(directory / "config.json")
        restored = checkpoints.restore_latest(
            parallel.with_sharding(wanted, sharding.shardings(mesh, wanted))
        )
        if restored is None:
            parallel.say(f"FRESH START in {home.path}")
            start, state = 0, init(init_key)
            if weights is not None:
                parallel.say("\n".join(weights.report))
                state = state.replace(variables=weights.apply(state.variables))
        else:
            start, state = restored
            parallel.say(f"RESUMED at step {start} of {total} from {home.path}")
        environment.write_environment(directory)
        parallel.say(
            f"mesh: {layout_line}\n"
            f"{len(opened['train'])} images, {config.epochs:g} epochs, {total} steps "
            f"of {config.data.batch_size} images, peak learning rate "
            f"{optimizers.peak_lr(config):.3g}"
        )

        blank = pipeline.blank_batch(config.data, batch_size=config.data.batch_size)
        with attention.recording() as choices:  # JAX keeps the traces for what follows
            if start < total:
                jax.eval_shape(step_fn, state, parallel.with_sharding(
                    blank, parallel.batch_sharding(mesh)
                ))
            evaluations.trace(state.variables)
        attention_check.check(choices, mesh=mesh)

        with errors.setting_up():
            writer = metrics.MetricWriter(
                directory, resume_step=start if restored else None
            )
            stack.callback(writer.close)
            meter = metrics.SpeedMeter(images_per_step=config.data.batch_size)
            progress = metrics.Progress(total, first_step=start)
            stack.callback(progress.close)
            batches = stack.enter_context(pipeline.train_batches(
                opened["train"], config.data, seed=config.seed, start_step=start,
                num_steps=total - start, process_index=jax.process_index(),
                process_count=jax.process_count(), workdir=str(directory),
            ))
        stop = stack.enter_context(preemption.stop_requests())
        evaluate = functools.partial(
            evaluations.run, writer=writer, progress=progress, stop=stop
        )
        save_every = _interval(config.checkpoint.every_epochs, steps_per_epoch, total)
        latest: dict[str, float] = {}
        shown: dict[str, float] = {}
        saved = finite_at = start
        wall_time = walltime.WallTime(directory, begun=begun, resuming=bool(restored))
        try:
            wall_time.until_now("start")
            if restored and start < total:  # an evaluation may have been interrupted
                due = evaluations.due(start, steps_per_epoch)
                latest |= evaluate(due, state.variables, start)
                wall_time.until_now("evaluate")
            begin = time.perf_counter()
            for step, batch in enumerate(batches, start=start + 1):
                state, logged = step_fn(state, parallel.place_batch(mesh, batch))
                if step == start + 1:
                    jax.block_until_ready(logged)
                    seconds = time.perf_counter() - begin
                    progress.note(f"first step, compiling included: {seconds:.1f} s")
                    meter.restart(step, batches.wait_seconds)
                    wall_time.until_now("compile", waited=batches.wait_seconds)
                stopping = step == total or stop.is_set()
                if stopping or step % save_every == 0 or (
                    step % config.log_every_steps == 0
                ):
                    values = {f"train/{key}": float(v) for key, v in logged.items()}
                    _check_finite(values, step, finite_at)
                    finite_at = step
                    speed = metrics.slowest(meter.read(step, batches.wait_seconds))
                    values |= {f"train/{key}": v for key, v in speed.items()}
                    wall_time.until_now("steps", waited=batches.wait_seconds)
                    wall_time.write()
                    values["train/goodput"] = wall_time.shares()["steps"]
                    values["train/epoch"] = step / steps_per_epoch
                    values["train/bad_images"] = batches.num_bad
                    writer.write(step, values)
                    latest |= values
                    shown = {"loss": values["train/loss"]} | {
                        name: speed[name] for name in metrics.SHOWN if name in speed
                    }
                progress.update(step, **shown)
                due = evaluations.due(step, steps_per_epoch) if step < total else []
                if due:
                    jax.block_until_ready(logged)  # the steps are no part of it
                waited = batches.wait_seconds
                with meter.pause():
                    if stopping or step % save_every == 0:
                        with wall_time.spent("save", waited=waited):
                            checkpoints.save(step, state, wait=stopping)
                        saved = step
                        wall_time.saved()
                    if stop.is_set():
                        raise preemption.Interrupted
                    if due:
                        with wall_time.spent("evaluate", waited=waited):
                            latest |= evaluate(due, state.variables, step)
                        with wall_time.spent("save", waited=waited):
                            kept.offer(step, latest, state)
            latest |= evaluate(list(config.evals), state.variables, total)
            kept.offer(total, latest, state)
            latest |= kept.metrics()
            if config.baselines:
                initial = init(init_key).variables
                latest |= evaluations.baselines(initial, stop=stop)
            wall_time.until_now("evaluate")
            wall_time.write(finished=True)
        except preemption.Interrupted:
            wall_time.until_now("steps", waited=batches.wait_seconds)
            if saved < (now := int(state.step)):
                _check_finite({"train/loss": float(logged["loss"])}, now, finite_at)
                checkpoints.save(now, state, wait=True)
            wall_time.until_now("save")
            wall_time.saved()
            wall_time.write()
            progress.note(
                f"stopped: step {now} is saved in {home.path}; run the same command "
                "again to go on"
            )
            raise SystemExit(preemption.REQUEUE) from None
    parallel.say(str(wall_time))
    if jax.process_index() == 0:
        evaluations.report(latest, name=home.name)
    return latest


def _interval(epochs: float, steps_per_epoch: float, total: int) -> int:
    """Returns a number of steps for a number of epochs; 0 means the end only."""
    return max(1, round(epochs * steps_per_epoch)) if epochs else total


def _duration(config: ConfigDict, num_images: int) -> tuple[int, float]:
    """Returns the number of steps, and steps per epoch, which need not be whole."""
    total = int(config.epochs * num_images // config.data.batch_size)
    if total < 1:
        raise ValueError(
            f"epochs={config.epochs} of {num_images} images do not fill one batch of "
            f"{config.data.batch_size}; raise config.epochs or lower "
            "config.data.batch_size."
        )
    return total, num_images / config.data.batch_size
