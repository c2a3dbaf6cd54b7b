"""Draws what an ablation found, a dot for each seed.

    python -m benchmarks.dots docs/images/frameworks.png \\
        SimMIM=runs/frameworks_simmim LocalMIM=runs/frameworks_local

A row for each workdir of `ablation`, under the name that it is given; in it, for each
of the table's columns that is asked for, the values of each cell beside each other. A
line marks the mean.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import figure

from benchmarks import ablation, held_out

_SHOWN = (
    "eval/knn/top1", "eval/linear/top1", held_out.AS_TRAINED, held_out.ALL_DECODED
)
_COLOURS = ("#555555", "#c44e52", "#1f6fb4")
_INCHES = (2.3, 1.9)  # of a panel

Found = Mapping[str, Sequence[Mapping[str, float]]]


def read(workdir: Path, grid: str) -> dict[str, list[dict[str, float]]]:
    """Returns what was found in each cell with each seed, as far as it is finished."""
    results = {}
    for cell in ablation.GRIDS[grid]:
        runs = workdir / cell.replace(" ", "_")
        for done in sorted(runs.glob("seed_*/found.json")):
            found = json.loads(done.read_text())
            loss = done.with_name("held_out.json")
            if loss.exists():
                found |= json.loads(loss.read_text())
            results.setdefault(cell, []).append(found)
    return results


def draw(results: Mapping[str, Found], path: Path) -> Path:
    """Writes a panel for each name and measured quantity."""
    picture = figure.Figure(
        figsize=(_INCHES[0] * len(_SHOWN), _INCHES[1] * len(results)),
        layout="constrained",
    )
    panels = picture.subplots(len(results), len(_SHOWN), squeeze=False)
    for row, (name, found) in zip(panels, results.items(), strict=True):
        for axes, key in zip(row, _SHOWN, strict=True):
            _panel(axes, found, key)
        row[0].set_ylabel(name, fontsize=10)
    picture.savefig(path, dpi=110)
    return path


def _panel(axes, found, key):
    title, factor = ablation.COLUMNS[key]
    axes.set_title(title, fontsize=9)
    for place, runs in enumerate(found.values()):
        values = [factor * run[key] for run in runs if key in run]
        colour = _COLOURS[place % len(_COLOURS)]
        if values:
            mean = statistics.mean(values)
            axes.plot((place - 0.25, place + 0.25), (mean, mean), color=colour)
        axes.plot(
            [place] * len(values), values, "o", color=colour, alpha=0.6, markersize=5
        )
    axes.set_xticks(range(len(found)), list(found), fontsize=7)
    axes.set_xlim(-0.5, len(found) - 0.5)
    if not any(key in run for runs in found.values() for run in runs):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center",
                  fontsize=8)
        axes.set_yticks(())
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    """Reads the workdirs and draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dots", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("picture", type=Path, help="file to write")
    parser.add_argument("workdirs", nargs="+", metavar="NAME=WORKDIR")
    parser.add_argument("--grid", choices=ablation.GRIDS, default="frameworks")
    args = parser.parse_args(argv)
    results = {}
    for given in args.workdirs:
        name, _, workdir = given.rpartition("=")
        results[name or Path(workdir).name] = read(Path(workdir), args.grid)
        if not results[name or Path(workdir).name]:
            parser.error(
                f"{workdir} has no finished run of {args.grid}; give the --workdir that"
                " benchmarks.ablation was called with."
            )
    print(draw(results, args.picture))


if __name__ == "__main__":
    main()
