"""What it costs to leave out steps that are not finite (crossmae_jax/optim/guard.py).

    python -m benchmarks.guard --config=configs/vits_cross.py --batch=16 \\
        --override=model.dtype=float32

Three steps are compiled: without the guard, with it, and with it and the lengths of
gradients and updates of every block (`log_norms`). They take turns, first in this order
and then in the other, and a ratio is the median of the ratios of neighbours, between
its quartiles. Beside the time on the clock stands that of the processor, which other
programs on the machine change less. Operations, bytes and memory are the compiler's own
counts.

The last line is what the host does about it at each step.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import step
from crossmae_jax.runs import skips

_LOOKS = 1000


@dataclasses.dataclass
class Timed:
    """A step, and for each time that it was made the seconds, of clock and processor.
    """

    run: step.Run
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    def make(self) -> None:
        """Makes a step and notes its time."""
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self.run.step()
        self.seconds.append(time.perf_counter() - begin)
        self.cpu_seconds.append(time.process_time() - cpu_begin)


def ratio(times: list[float], others: list[float]) -> str:
    """Returns the median of ratios of neighbours, and the quartiles around it."""
    ratios = [x / y for x, y in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.4f} ({low:.4f}..{high:.4f})"


def looking_seconds() -> float:
    """Returns how long the host takes to look at a step that is done."""
    logged = {"skipped_in_a_row": jnp.zeros((), jnp.int32)}
    watched, seconds = skips.Skips(), []
    for number in range(_LOOKS):
        fresh = {name: jax.block_until_ready(x + 0) for name, x in logged.items()}
        begin = time.perf_counter()
        watched.stepped(number, fresh)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def table(timed: list[Timed]) -> str:
    """Returns the results as a Markdown table."""
    base = timed[0]
    counts = base.run.compiled.cost_analysis()
    lines = [
        step.row([
            "step", "median, ms", "clock / without", "processor / without",
            "operations / without", "bytes / without", "memory, MiB",
        ]),
        step.row(["---"] * 7),
    ]
    for x in timed:
        own, memory = x.run.compiled.cost_analysis(), x.run.memory_bytes
        lines.append(step.row([
            x.run.name, f"{statistics.median(x.seconds) * 1e3:.1f}",
            ratio(x.seconds, base.seconds), ratio(x.cpu_seconds, base.cpu_seconds),
            f"{own['flops'] / counts['flops']:.5f}",
            f"{own['bytes accessed'] / counts['bytes accessed']:.5f}",
            "unknown" if memory is None else f"{memory / 2**20:.1f}",
        ]))
    looking, median = looking_seconds(), np.median(base.seconds)
    lines += ["", f"On the host {looking * 1e6:.0f} us a step, {looking / median:.3%}."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--batch", type=int, required=True, help="global batch size")
    parser.add_argument("--steps", type=int, default=20, help="steps to time (20)")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="setting to change, such as model.dtype=float32",
    )
    args = parser.parse_args(argv)
    overrides = [f"data.batch_size={args.batch}", *args.override]
    kinds = {
        "without": (False, "log_norms=False"), "guarded": (True, "log_norms=False"),
        "guarded, lengths of blocks": (True, "log_norms=True"),
    }
    timed = []
    for name, (guarded, norms) in kinds.items():
        config = step.load_config(args.config, overrides=[*overrides, norms])
        timed.append(Timed(step.prepare(name, config, guarded=guarded)))
    for number in range(args.steps):
        for x in timed if number % 2 else reversed(timed):
            x.make()
    what = f"{Path(args.config).stem}, batch {args.batch}, {args.steps} steps in turns"
    print(step.conditions(args.override, what))
    print(table(timed))


if __name__ == "__main__":
    main()
