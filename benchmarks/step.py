"""Times the compiled training step: images/s, step time, share of peak, compile time.

    python -m benchmarks.step --batch=64 --against=configs/vitb_mae.py \\
        --config=configs/vitb_cross.py --config=configs/vitb_cross75.py

With `--profile` a trace of a few more steps is written, and where their time goes is
printed (benchmarks/profiling.py).

Several configurations are compiled first and then take turns, a step each, in one
process: what slows the machine down slows all of them, and a ratio is the median of the
ratios of neighbouring steps. The step is the one that training runs, on every device;
images are random and lie on the devices, so that no loader is measured.

GFLOPs are counted (crossmae_jax/cost/counting.py): 3 forward passes, 2 a multiply-add.
Memory is what the compiler reserves on a device for arguments, results and temporaries.
Times are taken per step, from the call until its results are there.
"""

import argparse
import ast
import dataclasses
import datetime
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import profiling
from crossmae_jax import train_step
from crossmae_jax.commands import flags
from crossmae_jax.cost import counting
from crossmae_jax.data import pipeline
from crossmae_jax.distributed import environment, hardware, parallel, sharding
from crossmae_jax.objectives import OBJECTIVES
from crossmae_jax.optim import optimizers
from crossmae_jax.runs import settings

RESULTS = Path(__file__).parent / "results" / "step.md"
PROFILED_STEPS = 3

# Dense bf16 TFLOP/s of one device; the first name found in the device's own decides.
PEAK_TFLOPS = {name: device.tflops for name, device in hardware.DEVICES.items()}


@dataclasses.dataclass
class Run:
    """One configuration, compiled, and the times of its steps in seconds.

    Attributes:
      memory_bytes: None where the program does not say, as some that are read from the
        cache of compiled programs.
      state: returns what the next step will take.
    """

    name: str
    config: ConfigDict
    compile_seconds: float
    memory_bytes: int | None
    step: Callable[[], None]
    seconds: list[float] = dataclasses.field(default_factory=list)
    compiled: jax.stages.Compiled | None = None
    state: Callable[[], train_step.TrainState] | None = None

    @functools.cached_property
    def flops(self) -> int:
        """Operations of a training step, counted for one image."""
        return counting.count(self.config).train_flops


def load_config(path: str, *, overrides: list[str]) -> ConfigDict:
    """Reads a config file and sets some of its values, each written "a.b=value".

    Stops the program, as training does, at a file or setting that does not exist.
    """
    config = flags.load_config(Path(path)).lock()
    for override in overrides:
        _set(config, override)
    return config


def _set(config: ConfigDict, override: str) -> None:
    """Sets one value, written "a.b=value"."""
    name, equals, text = override.partition("=")
    if not equals:
        flags.stop(f"{override!r} has no value; write {name}=VALUE.")
    parent, old = None, config
    for key in name.split("."):
        known = list(old) if isinstance(old, ConfigDict) else []
        if key not in known:
            now = settings.moved(name, config)
            hint = f" {now}." if now else flags.did_you_mean(key, known)
            flags.stop(f"Unknown setting {name}.{hint}")
        parent, old = old, old[key]
    if isinstance(old, ConfigDict):
        hint = flags.did_you_mean("", list(old))
        flags.stop(f"{name} is a group of settings.{hint}")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):  # a plain word is itself: float32
        value = text
    try:
        parent[key] = value
    except TypeError:
        example = "" if old is None else f", such as {old!r}"
        flags.stop(
            f"{name}={value!r} is of type {type(value).__name__}; give one of type "
            f"{parent.get_type(key).__name__}{example}."
        )


def prepare(name: str, config: ConfigDict, *, guarded: bool = True) -> Run:
    """Compiles a training step and runs it once.

    Args:
      guarded: whether what is not finite is left out, as training does.
    """
    return trace(name, config, guarded=guarded)()


def trace(
    name: str, config: ConfigDict, *, guarded: bool = True
) -> Callable[[], Run]:
    """Traces a training step, for which no device works; returns what does the rest.

    That is to compile it, for which XLA times kernels on a GPU, and to run it once.
    """
    objective, data = OBJECTIVES[config.objective](config), config.data
    parallel.check_batch_size(
        data.batch_size, jax.device_count(), accum_steps=config.optim.accum_steps
    )
    schedule = optimizers.make_schedule(config, steps_per_epoch=1000.0)
    tx = optimizers.make_optimizer(config, schedule)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    state = train_step.abstract_state(objective, tx, init_key)
    mesh, _ = sharding.make_mesh(config, state)
    guard = {"max_skipped_in_a_row": config.optim.max_skipped_in_a_row}
    init, step = train_step.compile_steps(
        objective, tx, mesh, schedule=schedule, key=step_key,
        accum_steps=config.optim.accum_steps, log_norms=config.log_norms,
        **(guard if guarded else {"make": train_step.make_update}),
    )
    blank = pipeline.blank_batch(data, batch_size=data.batch_size)
    lowered = step.lower(
        parallel.with_sharding(state, sharding.shardings(mesh, state)),
        parallel.with_sharding(blank, parallel.batch_sharding(mesh)),
    )

    def compile_and_run() -> Run:
        begin = time.perf_counter()
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - begin
        state = init(init_key)
        shape = (data.batch_size, *data.image_size, data.channels)
        batch = parallel.place_batch(mesh, {
            **blank,
            "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
            "sample": np.arange(data.batch_size, dtype=np.uint32),
        })

        def one_step():
            nonlocal state
            state, logged = compiled(state, batch)
            jax.block_until_ready((state, logged))

        one_step()
        return Run(
            name, config, compile_seconds, memory_bytes(compiled), one_step,
            compiled=compiled, state=lambda: state,
        )

    return compile_and_run


def memory_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes that a program takes on a device, None if it does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
        + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    )


def measure(runs: list[Run], *, num_steps: int) -> None:
    """Lets the runs take turns, and notes the time of every step."""
    for _ in range(num_steps):
        for run in runs:
            begin = time.perf_counter()
            run.step()
            run.seconds.append(time.perf_counter() - begin)


def peak_tflops(device_kind: str) -> float | None:
    """Returns the dense bf16 peak of a device, None if it is not in the table."""
    for name, peak in PEAK_TFLOPS.items():
        if name.lower() in device_kind.lower():
            return peak
    return None


def share_of_peak(run: Run, peak: float | None) -> str:
    """Returns counted operations over the peak of all devices; bf16 models only."""
    if peak is None or run.config.model.dtype != "bfloat16":
        return "unknown"
    flops = run.flops * run.config.data.batch_size
    done = flops / statistics.median(run.seconds)
    return f"{done / (peak * 1e12 * jax.device_count()):.1%}"


def row(cells: list[str]) -> str:
    """Returns a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table(runs: list[Run], baseline: Run | None) -> str:
    """Returns the results as a Markdown table."""
    peak = peak_tflops(jax.devices()[0].device_kind)
    head = [
        "config", "images/s", "step, ms: median (min..max)", "GFLOPs an image",
        "of peak", "compile, s", "memory, GiB",
    ]
    if baseline is not None:
        head += [f"step / {baseline.name}", f"GFLOPs / {baseline.name}"]
    lines = [row(head), row(["---"] * len(head))]
    for run in runs:
        median, memory = statistics.median(run.seconds), run.memory_bytes
        cells = [
            run.name,
            f"{run.config.data.batch_size / median:.1f}",
            f"{median * 1e3:.1f} ({min(run.seconds) * 1e3:.1f}.."
            f"{max(run.seconds) * 1e3:.1f})",
            f"{run.flops / 1e9:.2f}",
            share_of_peak(run, peak),
            f"{run.compile_seconds:.1f}",
            "unknown" if memory is None else f"{memory / 2**30:.2f}",
        ]
        if baseline is not None:
            pairs = zip(run.seconds, baseline.seconds, strict=True)
            ratio = statistics.median(seconds / base for seconds, base in pairs)
            cells += [f"{ratio:.3f}", f"{run.flops / baseline.flops:.3f}"]
        lines.append(row(cells))
    return "\n".join(lines)


def profile(run: Run, directory: Path) -> str:
    """Traces a few steps and returns where their time goes, as a Markdown table.

    The program lies beside the trace: it says what the kernels come from.
    """
    path = profiling.trace(run.step, directory, num_steps=PROFILED_STEPS)
    program = run.compiled.as_text()
    (path.parent / "program.txt").write_text(program)
    timings = profiling.kernels(path, program, num_steps=PROFILED_STEPS)
    lines = [f"{run.name}: {PROFILED_STEPS} steps, trace in {path.parent}", ""]
    return "\n".join(lines + profiling.table(timings))


def _processor() -> str:
    """Returns the CPU's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else ())
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}"


def conditions(overrides: list[str], what: str) -> str:
    """Returns what the results depend on: day, machine, versions, settings."""
    device = jax.devices()[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    installed = environment.versions()
    versions = ", ".join(
        f"{name} {installed[name]}" for name in ("python", "jax", "jaxlib", "flax")
    )
    return "\n".join([
        f"### {datetime.date.today()}, {what}",
        "",
        f"{jax.device_count()} x {device.platform} ({kind}); {versions}; changed "
        f"settings: {', '.join(overrides) or 'none'}",
        "",
    ])


def main(argv: list[str] | None = None) -> None:
    """Measures the configurations named on the command line and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--config", action="append", required=True, metavar="FILE",
        help="configuration to measure; may be given several times",
    )
    parser.add_argument(
        "--against", metavar="FILE", help="configuration to compare the others with"
    )
    parser.add_argument("--batch", type=int, required=True, help="global batch size")
    parser.add_argument("--steps", type=int, default=20, help="steps to time (20)")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="setting to change in all of them, such as model.dtype=float32",
    )
    parser.add_argument(
        "--write", action="store_true", help=f"append the table to {RESULTS.name}"
    )
    parser.add_argument(
        "--profile", type=Path, nargs="?", const=Path("runs/profile"), metavar="DIR",
        help="also trace some steps into DIR (runs/profile); print what takes longest",
    )
    args = parser.parse_args(argv)

    overrides = [f"data.batch_size={args.batch}", *args.override]
    paths = ([args.against] if args.against else []) + args.config
    runs = [
        prepare(Path(path).stem, load_config(path, overrides=overrides))
        for path in paths
    ]
    measure(runs, num_steps=args.steps)
    what = f"batch {args.batch}, {args.steps} steps in turns"
    text = conditions(args.override, what) + "\n"
    text += table(runs, runs[0] if args.against else None) + "\n"
    print(text, flush=True)
    if args.write:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(text + "\n")
    for run in runs if args.profile else ():
        print(profile(run, args.profile / run.name) + "\n", flush=True)


if __name__ == "__main__":
    main()
