"""Draws a run over the band of reference runs, and says where it leaves it.

    python -m crossmae_jax compare RUN REFERENCE [REFERENCE ...]
        [--metric=train/loss] [--to=compare.png]

RUN is a workdir or a metrics.jsonl, REFERENCE likewise, or the name of references that
come with the library: digits_cross, three seeds of configs/digits_cross.py. What the
band is stands in the output and in crossmae_jax/runs/compare.py. Settings in which the
run differs from the references are listed: the first place to look for a cause.

Exit status 0 if the run stays in the band, 1 if it leaves it (3 logged points in a row,
on either side, whether it comes back or not), 2 if they cannot be compared.
"""

import argparse
import sys
from pathlib import Path


def _short(name: str) -> str:
    """Returns what a picture calls a run: the workdir's name, or the file's."""
    path = Path(name)
    return path.parent.name if path.name == "metrics.jsonl" else path.name


def main(argv: list[str]) -> int:
    """Compares what `argv` names."""
    parser = argparse.ArgumentParser(
        prog="python -m crossmae_jax compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("references", metavar="REFERENCE", nargs="+")
    parser.add_argument("--metric", default="train/loss", help="a name in RUN's file")
    parser.add_argument("--to", default="compare.png", help="where the picture goes")
    arguments = parser.parse_args(argv)
    from crossmae_jax.runs import compare
    from crossmae_jax.visualize import bands

    try:
        run, *more = compare.find(arguments.run)
        if more:
            raise ValueError(
                f"{arguments.run!r} are {1 + len(more)} runs; compare one, such as "
                f"{run}."
            )
        references = [
            path for name in arguments.references for path in compare.find(name)
        ]
        found = compare.compare(run, references, metric=arguments.metric)
        different = compare.hints(run, references[0], metric=arguments.metric)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(compare.describe(found))
    if different is None:
        print("settings  not known: no config.json beside the metrics")
    else:
        for number, line in enumerate(different or ["the same, apart from the seed"]):
            print(f"{'' if number else 'settings':10}{line}")
    names = [_short(name) for name in arguments.references]
    against = ", ".join(names) if len(names) < 4 else f"{len(names)} references"
    picture = bands.band(
        arguments.to, steps=found.steps, logged=found.logged, smoothed=found.smoothed,
        low=found.band.low, mean=found.band.mean, high=found.band.high,
        outside=[(each.first, each.last) for each in found.stretches],
        metric=arguments.metric, title=f"{_short(arguments.run)} against {against}",
    )
    print(f"picture   {picture}")
    return 1 if found.stretches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
