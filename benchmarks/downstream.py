"""What pre-training is worth downstream: methods x labels, over seeds.

    python -m benchmarks.downstream --workdir=runs/downstream

Each method pre-trains on all digits without labels; then, with 100, 10 and 1 percent of
the labels, everything or the last blocks are fine-tuned, for several numbers of blocks,
and frozen features are classified by logistic regression and by their nearest
neighbours. The share of labels is another part of the training images for each seed.

Fine-tuning is measured at its LAST epoch: nothing is chosen on the test images, though
the papers report the best epoch.

Runs lie in WORKDIR/METHOD/seed_N. One that is finished is not trained again, so a table
that was interrupted goes on, and several processes may each take a seed.
"""

import argparse
import json
import statistics
from pathlib import Path

import jax

from benchmarks import ablation, step
from crossmae_jax import objectives, visualize
from crossmae_jax.evals import of_checkpoint
from crossmae_jax.runs import workdir

PICTURES = Path(__file__).parents[1] / "docs" / "images"
FINETUNE = "configs/finetune_digits.py"
METHODS = {
    "MAE": ("configs/digits_mae.py", []),
    "CrossMAE 0.75": ("configs/digits_cross.py", ["masking.pred_ratio=0.75"]),
    "CrossMAE 0.25": ("configs/digits_cross.py", ["masking.pred_ratio=0.25"]),
    "PR-MIM": ("configs/digits_cross_prmim.py", []),
    "random": None,  # not pre-trained
}
DEPTH = 4.0  # blocks of the encoder
BLOCKS = (0.0, 0.5, 1.0, 2.0)
NEIGHBOURS = 10  # with 1 percent of the labels there are 14
IMAGES = 1442  # to train on
STEPS = 157  # of fine-tuning, about: seven epochs of all
SHARES = {100: 64, 10: 32, 1: 14}  # percent of the labels, and the batch size


def split(percent: int, seed: int) -> str:
    """Returns a share of the training images, another one for each seed.

    Example:
      split(10, 2)  # "train[20%:30%]"
    """
    if percent == 100:
        return "train"
    first = percent * seed
    return f"train[{first}%:{first + percent}%]"


def finetune(
    weights: str, *, percent: int, blocks: float, seed: int, directory: Path,
    changes: list[str],
) -> float:
    """Returns the test accuracy of fine-tuning at its last epoch.

    Args:
      weights: a run, "" for none.
      blocks: how many of the last blocks are tuned.
      changes: overrides of the configuration.
    """
    epochs = STEPS * SHARES[percent] / (IMAGES * percent / 100)
    overrides = [
        *changes, f"init_from={weights!r}", f"tune_blocks={blocks}",
        "optim.base_lr=8e-3",
        f"data.split={split(percent, seed)!r}", f"data.batch_size={SHARES[percent]}",
        "data.num_classes=10", f"epochs={epochs}",
        f"optim.warmup_epochs={epochs / 10}", "evals.accuracy.every_epochs=0.0",
        "checkpoint.every_epochs=0.0", "checkpoint.best=''",
    ]
    metrics = ablation.run(FINETUNE, overrides, seed=seed, directory=directory)
    return metrics["eval/accuracy/top1"]


def frozen(
    weights: str, *, percent: int, seed: int, directory: Path, changes: list[str]
) -> dict[str, float]:
    """Returns the test accuracy of k-NN and logistic regression on frozen features.

    Args:
      weights: a run, "" for none: then the network is that of CrossMAE, as it is drawn.
      changes: overrides of its configuration.
    """
    done = directory / "evaluation.json"
    if not done.exists():
        if weights:
            config = workdir.read_config(weights)
            config.data.split = split(percent, seed)
            made = of_checkpoint.open_checkpoint(weights, config)
        else:
            path, overrides = METHODS["CrossMAE 0.25"]
            overrides = [f"seed={seed}", *changes, *overrides]
            config = step.load_config(path, overrides=overrides)
            config.data.split = split(percent, seed)
            objective = objectives.make(config)
            variables = objective.init(jax.random.key(seed))
            made = of_checkpoint.Checkpoint(
                "random", None, "", config, objective, variables
            )
        options = dict(knn=dict(k=(NEIGHBOURS,)))
        of_checkpoint.run(made, ("knn", "linear"), directory, options=options)
    return json.loads(done.read_text())["metrics"]


def measure(
    method: str, seed: int, root: Path, changes: list[str]
) -> dict[str, float]:
    """Pre-trains one method with one seed, and returns all that is measured of it."""
    place, weights = root / method.replace(" ", "_") / f"seed_{seed}", ""
    if METHODS[method] is not None:
        path, overrides = METHODS[method]
        weights = str(place / "pretrained")
        ablation.run(
            path, [*changes, *overrides, "checkpoint.every_epochs=0.0"], seed=seed,
            directory=Path(weights),
        )
    accuracies = {}
    for percent in SHARES:
        accuracies[f"fine-tuning {percent}"] = finetune(
            weights, percent=percent, blocks=DEPTH, seed=seed,
            directory=place / f"finetuned_{percent}", changes=changes,
        )
        of_frozen = frozen(
            weights, percent=percent, seed=seed,
            directory=place / f"frozen_{percent}", changes=changes,
        )
        accuracies[f"linear {percent}"] = of_frozen["linear/top1"]
        accuracies[f"k-NN, mean {percent}"] = of_frozen[f"knn/mean/k{NEIGHBOURS}/top1"]
        accuracies[f"k-NN, class token {percent}"] = of_frozen[
            f"knn/cls/k{NEIGHBOURS}/top1"
        ]
    for percent in SHARES:
        for blocks in BLOCKS:
            accuracies[_of_blocks(blocks, percent)] = finetune(
                weights, percent=percent, blocks=blocks, seed=seed,
                directory=place / f"blocks_{blocks:g}_{percent}", changes=changes,
            )
        accuracies[_of_blocks(DEPTH, percent)] = accuracies[f"fine-tuning {percent}"]
    return accuracies


def _of_blocks(blocks: float, percent: int) -> str:
    return f"{blocks:g} tuned block{'s' * (blocks != 1)} {percent}"


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Returns means and standard deviations over the seeds, in percent, in Markdown."""
    lines = [step.row(["", *results]), step.row(["---"] * (len(results) + 1))]
    for key in next(iter(results.values()))[0]:
        cells = []
        for runs in results.values():
            values = [100 * run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        what, percent = key.rsplit(" ", 1)
        lines.append(step.row([f"{what}, {percent} % of labels", *cells]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Trains and evaluates what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.downstream", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="setting to change everywhere",
    )
    parser.add_argument("--write", action="store_true", help="the pictures into docs/")
    args = parser.parse_args(argv)
    results = {
        method: [
            measure(method, seed, args.workdir, args.override) for seed in args.seeds
        ]
        for method in args.methods
    }
    print(step.conditions(args.override, f"downstream of digits, seeds {args.seeds}"))
    print(f"{table(results)}\n")
    folder = PICTURES if args.write else args.workdir
    for percent in SHARES:
        curves = {
            method: {
                blocks: statistics.mean(
                    run[_of_blocks(blocks, percent)] for run in runs
                )
                for blocks in (*BLOCKS, DEPTH)
            }
            for method, runs in results.items()
        }
        print(visualize.accuracy_by_blocks(
            curves, folder / f"accuracy_by_blocks_{percent}.png",
            title=f"Partial fine-tuning with {percent} % of the labels",
        ))


if __name__ == "__main__":
    main()
