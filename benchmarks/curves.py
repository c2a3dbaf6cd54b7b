"""Makes the runs and the pictures of docs/reading_the_curve.md, healthy and sick.

    python -m benchmarks.curves --workdir=runs/curves [--only=NAME ...]

trains what is missing in the workdir, one run after the other by the commands that it
prints (33 minutes in all, on two busy CPU cores), compares them with the references of
the library, and draws docs/images/curve_*.png.

    python -m benchmarks.curves --workdir=runs/curves \\
        --references=crossmae_jax/runs/references/digits_cross

writes the healthy runs as the references of the library, too: their losses and
evaluations, six digits, with configuration, data and environment.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from crossmae_jax import paths
from crossmae_jax.commands import compare as command
from crossmae_jax.runs import metrics
from crossmae_jax.visualize import bands

CONFIG = "configs/digits_cross.py"
SEEDS = ("seed_0", "seed_1", "seed_2")
# Evaluations every fourth epoch: 13 in a run.
OFTEN = (
    "--config.evals.knn.every_epochs=4.0", "--config.evals.rank.every_epochs=4.0",
    "--noconfig.baselines",
)
RUNS = {name: (f"--config.seed={name[-1]}",) for name in SEEDS} | {
    "another_seed": ("--config.seed=3",),
    "rate_too_high": ("--config.optim.base_lr=0.3",),
    "raw_targets": ("--noconfig.target.normalize",),
    "mask_too_low": (
        "--config.masking.mask_ratio=0.1", "--config.masking.pred_ratio=0.1",
    ),
    # One step of rate 0: what the network is before anything is learnt.
    "untrained": (
        "--config.epochs=0.1", "--config.optim.base_lr=0.0",
        "--config.optim.warmup_epochs=0.0",
    ),
}
SICK = {
    "rate_too_high": "Learning rate 25 times too high",
    "raw_targets": "Targets not normalised",
    "mask_too_low": "10 % of the patches masked",
}
_OTHER_LOSS = ("raw_targets",)  # in other units: not beside that of a healthy run
METRICS = ("train/loss", "eval/knn/top1", "eval/rank/effective")
_BESIDE = "trivial predictor, untrained network"
JUDGED = (*METRICS, "eval/knn/cls/k20/top1")
_KEPT = ("train/loss", "train/loss_trivial")


def train_command(name: str, directory: Path) -> list[str]:
    """Returns the command that makes a run, without the interpreter."""
    return [
        "-m", "crossmae_jax", "train", f"--config={CONFIG}",
        f"--workdir={directory / name}", *OFTEN, *RUNS[name],
    ]


def train(name: str, directory: Path) -> None:
    """Trains a run in a process of its own, unless it has finished before."""
    if (directory / name / "curve.png").exists():  # drawn at the end
        return
    command = train_command(name, directory)
    print(shlex.join(["python", *command]), flush=True)
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)


def ship(directory: Path, target: Path) -> None:
    """Writes the healthy runs as references: what one compares, and what they are."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SEEDS:
        text = thinned((directory / name / metrics.FILE).read_text())
        paths.write_whole(target / f"{name}.jsonl", text)
    for file in ("config.json", "dataset.json", "environment.json"):
        shutil.copy(directory / SEEDS[0] / file, target / file)


def thinned(text: str) -> str:
    """Returns metrics with losses and evaluations alone, of six digits."""
    lines = []
    for row in map(json.loads, text.splitlines()):
        kept = {
            name: float(f"{value:.6g}") for name, value in row.items()
            if name in _KEPT or name.startswith("eval/")
        }
        lines.append(json.dumps({"step": row["step"]} | kept) + "\n")
    return "".join(lines)


def _shown(
    name: str, directory: Path, metric: str, label: str, *, dashed: bool = False
) -> bands.Shown:
    curve = metrics.curves(directory / name / metrics.FILE)[metric]
    return bands.Shown(
        label, np.array(list(curve)), np.array(list(curve.values())), dashed
    )


def panels(
    runs: dict[str, str], directory: Path
) -> dict[str, list[bands.Shown]]:
    """Returns loss, k-NN and effective rank of runs, beside what to compare with.

    Args:
      runs: labels by name; the trivial predictor is that of the last one.
    """
    *_, last = runs
    by_title = {"loss": [
        _shown(last, directory, "train/loss_trivial", _BESIDE, dashed=True)
    ]}
    for title, metric in (
        ("k-NN top-1", "eval/knn/top1"), ("effective rank", "eval/rank/effective")
    ):
        untrained, = metrics.curves(
            directory / "untrained" / metrics.FILE
        )[metric].values()
        steps = _shown(last, directory, "train/loss", "").steps[[0, -1]]
        by_title[title] = [bands.Shown(
            _BESIDE, steps, np.full(2, untrained), dashed=True
        )]
    for curves, metric in zip(by_title.values(), METRICS, strict=True):
        for name, label in runs.items():
            curve = _shown(name, directory, metric, label)
            if metric == "train/loss" and last in _OTHER_LOSS and name != last:
                curve = curve._replace(steps=curve.steps[:0], values=curve.values[:0])
            curves.append(curve)
    return by_title


LIMITS = {"loss": (0.0, 1.0), "k-NN top-1": (0.0, 1.0), "effective rank": (0.0, 30.0)}


def draw(directory: Path, images: Path) -> None:
    """Draws the figures of the page, and prints how `compare` judges each run."""
    healthy = {name: name.replace("_", " ") for name in SEEDS}
    bands.stacked(
        panels(healthy, directory), images / "curve_healthy.png",
        title="Healthy: three seeds", limits=LIMITS,
    )
    for name, title in SICK.items():
        bands.stacked(
            panels({SEEDS[0]: "healthy", name: "this run"}, directory),
            images / f"curve_{name}.png", title=title,
            limits={
                axis: limits for axis, limits in LIMITS.items()
                if axis != "loss" or name not in _OTHER_LOSS
            },
        )
    for name in ("another_seed", *SICK):
        for metric in JUDGED:
            picture = images / f"curve_band_{name}.png"
            if metric != METRICS[0]:
                picture = directory / f"{name}_{metric.replace('/', '_')}.png"
            arguments = [
                str(directory / name), "digits_cross", f"--metric={metric}",
                f"--to={picture}",
            ]
            print(shlex.join(["python", "-m", "crossmae_jax", "compare", *arguments]))
            print(f"exit status {command.main(arguments)}\n", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing, then draws."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curves", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, help="train these, and draw nothing"
    )
    parser.add_argument(
        "--references", type=Path, metavar="DIR", help="where the healthy runs go"
    )
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    args = parser.parse_args(argv)
    for name in args.only or RUNS:
        train(name, args.workdir)
    if args.references:
        ship(args.workdir, args.references)
    if not args.only:
        draw(args.workdir, args.images)


if __name__ == "__main__":
    main()
