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

from collections.abc import Sequence
from pathlib import Path

from crossmae_jax import errors
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag

_FLAGS = {
    "metric": Flag(
        str, "a name in RUN's file; default: train/loss", default="train/loss"
    ),
    "to": Flag(
        str, "where the picture goes; default: compare.png", default="compare.png"
    ),
}


def _short(name: str) -> str:
    """Returns what a picture calls a run: the workdir's name, or the file's."""
    path = Path(name)
    return path.parent.name if path.name == "metrics.jsonl" else path.name


@session.command(error_status=2)  # 1 is a run outside the band
def main(argv: Sequence[str]) -> int:
    """Compares what `argv` names."""
    given = flags.parse(
        "compare", argv, _FLAGS, doc=__doc__, operands=("RUN", "REFERENCE...")
    )
    name, *references = given.operands
    from crossmae_jax.runs import compare
    from crossmae_jax.visualize import bands

    with errors.setting_up():
        run, *more = compare.find(name)
        if more:
            raise ValueError(
                f"{name!r} are {1 + len(more)} runs; compare one, such as {run}."
            )
        files = [path for reference in references for path in compare.find(reference)]
        compared = compare.compare(run, files, metric=given.metric)
        different = compare.hints(run, files[0], metric=given.metric)
    print(compare.describe(compared))
    if different is None:
        print("settings  not known: no config.json beside the metrics")
    else:
        for number, line in enumerate(different or ["the same, apart from the seed"]):
            print(f"{'' if number else 'settings':10}{line}")
    names = [_short(reference) for reference in references]
    against = ", ".join(names) if len(names) < 4 else f"{len(names)} references"
    band = compared.band
    with errors.using_files():
        picture = bands.band(
            given.to, steps=compared.steps, logged=compared.logged,
            smoothed=compared.smoothed, low=band.low, mean=band.mean, high=band.high,
            outside=[(stretch.first, stretch.last) for stretch in compared.stretches],
            metric=given.metric, title=f"{_short(name)} against {against}",
        )
    print(f"picture   {picture}")
    return 1 if compared.stretches else 0
