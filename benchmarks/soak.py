"""A run among faults, compared with one that met none, bit for bit.

    python -m benchmarks.soak --workdir=DIR [--epochs=150] [--seed=0] [--write]

Trains the digits, as PNG files in class folders, twice: once undisturbed, and once with
a fault after every 20 to 60 seconds, of the kinds of `benchmarks/faults.py` in an order
that is drawn. A run that has ended is started again with the same command.

At the end every array of both last checkpoints is compared, and every metric that is no
time. A run that is asked to stop logs the step at which it does: such lines only the
disturbed run has, and they are counted. Exit status 0 if all else is equal and each
fault did what it should.
"""

import argparse
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import faults, step
from configs import digits_cross
from crossmae_jax import tables, verify_resume
from crossmae_jax.runs import metrics

RESULTS = Path(__file__).parent / "results" / "soak.md"
_TRAINED = 1440  # images; the others are evaluated


class Happened(NamedTuple):
    """A fault, when it was made, what the run did, and how many steps were made again.
    """

    fault: str
    step: int
    did: str
    again: int


def write_digits(directory: Path) -> None:
    """Writes the digits of scikit-learn as PNG files, `train/7/0123.png`."""
    from sklearn import datasets

    digits = datasets.load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        split = "train" if number < _TRAINED else "eval"
        path = directory / split / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(path)


def config_of(images: Path, *, epochs: float) -> ConfigDict:
    """Returns what both runs train: with a save twice an epoch, and evaluations."""
    config = digits_cross.get_config()
    config.epochs, config.log_every_steps = epochs, 5
    config.data.source, config.data.name = "folder", ""
    config.data.dir, config.data.eval_dir = str(images / "train"), str(images / "eval")
    config.data.workers = 2
    config.optim.warmup_epochs = min(5.0, epochs / 4)
    config.checkpoint.update(every_epochs=0.5, best="eval/knn/top1")
    config.evals = {
        "knn": dict(config.evals.knn.to_dict(), every_epochs=4.0),  # faults.EVALUATED
        "reconstruction": dict(config.evals.reconstruction.to_dict(), every_epochs=8.0),
    }
    config.baselines = False
    return config


def undisturbed(run: faults.Run) -> float:
    """Trains to the end; returns the seconds that it took."""
    begin = time.monotonic()
    run.start()
    try:
        run.process.wait()
    finally:
        run.kill()
    if run.process.returncode:
        sys.exit(f"the undisturbed run failed:\n{run.said()}")
    return time.monotonic() - begin


def among_faults(run: faults.Run, rng: random.Random) -> list[Happened]:
    """Trains to the end with a fault now and then; returns what happened."""
    happened, waiting = [], []
    run.start()
    try:
        while True:
            pause = time.monotonic() + rng.uniform(20, 60)
            run.wait_until(lambda: time.monotonic() > pause, "a while")  # noqa: B023
            if not run.running():
                if run.process.returncode == 0:
                    return happened
                raise faults.Unexpected(f"it ended by itself:\n{run.said()[-3000:]}")
            if not waiting:
                waiting = rng.sample(sorted(faults.FAULTS), len(faults.FAULTS))
            name, before, launches = waiting.pop(), run.step(), run.launches
            did = faults.FAULTS[name](run, rng)
            if not run.running() and run.process.returncode != 0:
                run.start()
                run.wait_until(lambda: "RESUMED" in run.said(), "its first lines")
            happened.append(Happened(name, before, did, _again(run, launches)))
            print(f"step {before:6d}  {name}: {did}", flush=True)
    finally:
        run.kill()


def _again(run: faults.Run, launches: int) -> int:
    """Returns how many steps are made a second time."""
    if run.launches == launches:
        return 0
    resumed = [
        int(line.split()[3]) for line in run.said().splitlines()
        if line.startswith("RESUMED at step ")
    ]
    return max(0, run.reached - resumed[-1]) if resumed else run.reached


def logged_steps(run: faults.Run) -> set[int]:
    """Returns the steps of which a run has metrics."""
    return {row["step"] for row in metrics.rows(run.workdir / metrics.FILE)}


def table(happened: list[Happened]) -> str:
    """Returns what each kind of fault did, as Markdown."""
    rows = []
    for name in faults.FAULTS:
        of_kind = [each for each in happened if each.fault == name]
        did = sorted({each.did for each in of_kind})
        again = max((each.again for each in of_kind), default=0)
        rows.append((
            name, str(len(of_kind)), "; ".join(did) or "not met",
            str(again) if of_kind else "",
        ))
    header = ("fault", "times", "what the run did", "steps made again, at most")
    return tables.markdown(tables.Table(header, tuple(rows)))


def main(argv: list[str] | None = None) -> None:
    """Trains twice, compares, and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a new directory")
    parser.add_argument("--epochs", type=float, default=150.0, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="draws faults and pauses")
    parser.add_argument(
        "--write", action="store_true", help=f"append the table to {RESULTS.name}"
    )
    args = parser.parse_args(argv)
    args.workdir.mkdir(parents=True)
    images = args.workdir.absolute() / "images"
    write_digits(images)
    file = args.workdir / "soaked.py"
    config = config_of(images, epochs=args.epochs)
    verify_resume.write_config(file, config, title="The digits, among faults.")
    load = os.getloadavg()[0]
    alone, soaked = (
        faults.Run(file, args.workdir.absolute() / name, images)
        for name in ("undisturbed", "soaked")
    )
    seconds = undisturbed(alone)
    print(f"undisturbed: {alone.step()} steps in {seconds:.0f} s", flush=True)
    begin = time.monotonic()
    happened = among_faults(soaked, random.Random(args.seed))
    lasted = (time.monotonic() - begin) / 60
    counts, arrays, lines = verify_resume.compare(
        alone.workdir, soaked.workdir, alone.step()
    )
    beside = logged_steps(soaked) - logged_steps(alone)
    lines = [
        line for line in lines
        if int(line.name.removeprefix("step ").partition(",")[0]) not in beside
    ]
    text = "\n".join([
        step.conditions([], f"{len(happened)} faults in {lasted:.0f} minutes"),
        f"One-minute load before: {load:.1f}. --epochs={args.epochs:g} "
        f"--seed={args.seed}: {alone.step()} steps, undisturbed in {seconds / 60:.0f} "
        f"minutes; {soaked.launches} launches among faults.", "",
        table(happened), "",
        f"{len(arrays)} of {counts[0]} arrays of the last checkpoints and {len(lines)} "
        f"of {counts[1]} values of metrics differ; {len(beside)} steps were logged "
        "beside them, at which the run was stopped.", "",
    ])
    print(text)
    if args.write:
        with RESULTS.open("a") as results:
            results.write(text + "\n")
    sys.exit(1 if arrays or lines else 0)


if __name__ == "__main__":
    main()
