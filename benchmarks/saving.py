"""What saving costs the steps beside which it writes.

    python -m benchmarks.saving --config=configs/vitb_cross.py --batch=64

Rounds of the same steps take turns, without a save and with one at their beginning, in
one process: what slows the machine down slows both. The save is the run's own, with its
digests (crossmae_jax/checkpoints/checkpointer.py). What it costs is the difference of
neighbouring rounds: the copy for which the steps wait, and how much slower they are
while files are written. As a share it depends on how often a run saves: `--interval`.

Rounds should be so long that the files are written before they end; the table says for
how many of them that was so. On a CPU writing takes the cores from the steps, which on
an accelerator it does not.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks import step
from crossmae_jax.checkpoints import checkpointer

RESULTS = Path(__file__).parent / "results" / "saving.md"


class Round(NamedTuple):
    """Seconds of the steps alone, of save and steps, and of parts of the latter.

    Attributes:
      call: until `save` returned.
      written: until the checkpoint was complete.
    """

    alone: float
    saving: float
    call: float
    written: float


def measure(
    run: step.Run, directory: Path, *, num_rounds: int, num_steps: int
) -> list[Round]:
    """Returns the times of rounds of `num_steps` steps; writes below a directory."""
    checkpoints = checkpointer.Checkpoints(directory, keep=1)
    rounds = []
    for number in range(num_rounds + 1):  # the first one is not counted
        begin = time.perf_counter()
        for _ in range(num_steps):
            run.step()
        alone = time.perf_counter() - begin
        begin = time.perf_counter()
        checkpoints.save(number, run.state())
        call = time.perf_counter() - begin
        for _ in range(num_steps):
            run.step()
        saving = time.perf_counter() - begin
        checkpoints.wait()
        written = time.perf_counter() - begin
        rounds.append(Round(alone, saving, call, written))
    checkpoints.close()
    return rounds[1:]


def table(
    run: step.Run, rounds: list[Round], *, num_steps: int, interval: float
) -> str:
    """Returns the results as a Markdown table."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state()))
    costs = [one.saving - one.alone for one in rounds]
    cost = statistics.median(costs)
    # What was still to be written when the last step was made is waited for.
    in_time = sum(one.written <= 1.05 * one.saving for one in rounds)
    cells = {
        "config": run.name,
        "state, GB": f"{size / 1e9:.2f}",
        "step, s": f"{statistics.median(one.alone for one in rounds) / num_steps:.3f}",
        "steps wait, s": f"{statistics.median(one.call for one in rounds):.2f}",
        "written after, s": f"{statistics.median(one.written for one in rounds):.1f}",
        "in time": f"{in_time}/{len(rounds)}",
        "a save costs, s: median (min..max)":
            f"{cost:.2f} ({min(costs):.2f}..{max(costs):.2f})",
        f"of {interval:g} s": f"{cost / interval:.2%}",
    }
    return "\n".join([
        step.row(list(cells)), step.row(["---"] * len(cells)),
        step.row(list(cells.values())),
    ])


def main(argv: list[str] | None = None) -> None:
    """Measures a configuration and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saving", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--batch", type=int, required=True, help="global batch size")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round (20)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to time (5)")
    parser.add_argument(
        "--interval", type=float, default=600.0, help="seconds between saves (600)"
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="setting to change, such as model.dtype=float32",
    )
    parser.add_argument(
        "--directory", help="on the disk to write to; a temporary one if not given"
    )
    parser.add_argument(
        "--write", action="store_true", help=f"append the table to {RESULTS.name}"
    )
    args = parser.parse_args(argv)
    overrides = [*args.override, f"data.batch_size={args.batch}"]
    config = step.load_config(args.config, overrides=overrides)
    run = step.prepare(Path(args.config).stem, config)
    place = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        rounds = measure(run, place, num_rounds=args.rounds, num_steps=args.steps)
    finally:
        shutil.rmtree(place)
    what = f"{args.rounds} rounds of {args.steps} steps"
    printed = "\n".join([
        step.conditions(overrides, what),
        table(run, rounds, num_steps=args.steps, interval=args.interval), "",
    ])
    print(printed)
    if args.write:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as results:
            results.write(f"{printed}\n")


if __name__ == "__main__":
    main()
