"""Trains the cells of an ablation with several seeds; prints means and spreads.

    python -m benchmarks.ablation table2 --config=configs/digits_mae.py \\
        --workdir=runs/table2

Grids, each a set of overrides of the config:

    table2       throwing ratio x progressive reconstruction x furthest sampling
                 (PR-MIM, arXiv 2411.15746, table 2)
    aggregators  what predicts the thrown patches, at ratio 0.5 (table 12)
    visible      what a conv aggregator finds at visible places, at ratio 0.5
    frameworks   nothing thrown, plain throwing and PR-MIM, at ratio 0.5 (table 4)

With --held-out-loss the loss of all masked patches of held-out images stands in the
table, too (`held_out`).

Runs lie in WORKDIR/CELL/seed_N. One that is finished is not trained again, so a table
that was interrupted goes on, and several processes may each take a seed.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

from benchmarks import held_out, step
from crossmae_jax import paths, train
from crossmae_jax.runs import workdir


def _cell(
    ratio: float, *, kind: str = "none", retain: str = "random", **aggregator: str
) -> list[str]:
    """Returns the overrides of a cell: all that makes it, whatever the config says."""
    return [
        f"masking.throw_ratio={ratio}", f"masking.retain={retain}",
        f"model.aggregator.kind={kind}",
        *(f"model.aggregator.{name}={value}" for name, value in aggregator.items()),
    ]


def _table2() -> dict[str, list[str]]:
    cells = {"nothing thrown": _cell(0.0)}
    for ratio, (method, kind), retain in itertools.product(
        (0.25, 0.5, 0.65), (("plain", "none"), ("progressive", "conv")),
        ("random", "furthest"),
    ):
        cells[f"{ratio:g} {method} {retain}"] = _cell(ratio, kind=kind, retain=retain)
    return cells


GRIDS = {
    "table2": _table2(),
    "aggregators": {
        kind: _cell(0.5, kind=kind)
        for kind in ("none", "conv", "pool", "transformer", "convnext")
    },
    "visible": {"nothing thrown": _cell(0.0), "plain": _cell(0.5)} | {
        visible: _cell(0.5, kind="conv", visible=visible)
        for visible in ("zeros", "encoder")
    },
    "frameworks": {
        "nothing thrown": _cell(0.0), "plain": _cell(0.5),
        "PR-MIM": _cell(0.5, kind="conv", retain="furthest"),
    },
}

COLUMNS = {
    "eval/knn/top1": ("k-NN top-1, %", 100),
    "eval/linear/top1": ("linear top-1, %", 100),
    "eval/reconstruction/mse": ("error of masked patches", 1),
    "eval/reconstruction/mse_thrown": ("of thrown ones", 1),
    held_out.AS_TRAINED: ("loss as trained", 1),
    held_out.ALL_DECODED: ("loss, all decoded", 1),
}


def run(
    path: str, overrides: list[str], *, seed: int, directory: Path
) -> dict[str, float]:
    """Trains and evaluates one cell with one seed, or reads what it found before.

    Raises:
      ValueError: if the directory holds a run with other settings.
    """
    overrides = [f"seed={seed}", "baselines=False", *overrides]
    config, done = step.load_config(path, overrides=overrides), directory / "found.json"
    if not done.exists():
        paths.write_whole(done, json.dumps(train.run(config, directory)))
    elif json.loads(workdir.read_config(directory).to_json()) != json.loads(
        config.to_json()
    ):
        raise ValueError(
            f"{directory} holds a run with other settings (config.json); give another "
            "--workdir."
        )
    return json.loads(done.read_text())


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Returns a row per cell: mean over the seeds, and their standard deviation."""
    columns = {
        key: title for key, title in COLUMNS.items()
        if any(key in metrics for runs in results.values() for metrics in runs)
    }
    lines = [
        step.row(["cell", *(title for title, _ in columns.values()), "seeds"]),
        step.row(["---"] * (len(columns) + 2)),
    ]
    for cell, runs in results.items():
        cells = []
        for key, (_, factor) in columns.items():
            values = [factor * metrics[key] for metrics in runs if key in metrics]
            digits = 1 if factor == 100 else 4
            text = f"{statistics.mean(values):.{digits}f}" if values else "-"
            if len(values) > 1:
                text += f" ± {statistics.stdev(values):.{digits}f}"
            cells.append(text)
        lines.append(step.row([cell, *cells, str(len(runs))]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="setting to change in every cell",
    )
    parser.add_argument(
        "--held-out-loss", action="store_true",
        help="measure the loss of all masked patches of held-out images, too",
    )
    args = parser.parse_args(argv)
    results = {}
    for cell, overrides in GRIDS[args.grid].items():
        for seed in args.seeds:
            directory = args.workdir / cell.replace(" ", "_") / f"seed_{seed}"
            found = run(
                args.config, [*args.override, *overrides], seed=seed,
                directory=directory,
            )
            if args.held_out_loss:
                found |= held_out.losses(directory)
            results.setdefault(cell, []).append(found)
    print(step.conditions(args.override, f"{args.grid} of {args.config}"))
    print(table(results))


if __name__ == "__main__":
    main()
