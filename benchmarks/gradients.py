"""How far the gradients of cheaper objectives stray from MAE's, on trained models.

    python -m benchmarks.gradients runs/table2/nothing_thrown/seed_* \\
        runs/table2/0.5_progressive_random/seed_*

On a run's weights, and on images of its training set, the encoder's gradient is
compared with that of the same model without throwing, for random and furthest choice
(`gradient_deviation.deviation`). A run that threw nothing has no aggregator:
on it plain throwing is compared, at three ratios. On a run with an aggregator plain
throwing and progressive reconstruction are, at the run's own ratio; its decoder has
never met all masked patches at once, so the gradient compared with is a stranger to it.

Runs of one kind, such as several seeds, make one row together.
"""

import argparse
import itertools
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import gradient_deviation, step
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.data import pipeline, sources
from crossmae_jax.models import mim
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.runs import workdir


def _variant(config: ConfigDict, *, ratio: float, kind: str, retain: str) -> Pretrain:
    changed = config.copy_and_resolve_references()
    changed.masking.update(throw_ratio=ratio, retain=retain)
    changed.model.aggregator.kind = kind
    return Pretrain(changed)


def _whole(batches):
    """Yields the batches without padding; the last one may be left out."""
    for batch in batches:
        if batch["valid"].all():
            yield {"image": batch["image"], "sample": batch["sample"]}


def compare(
    directory: Path, *, num_images: int
) -> dict[tuple[str, float], dict[str, gradient_deviation.GradientDeviation]]:
    """Returns the deviations of every way to throw, by training and ratio."""
    config = workdir.read_config(directory)
    ratio, kind = config.masking.throw_ratio, config.model.aggregator.kind
    aggregates = bool(mim.build(config).aggregators)
    if aggregates != (ratio > 0):
        raise ValueError(
            f"{directory} has aggregator {kind!r} and throw_ratio {ratio}; give runs "
            "that threw nothing, or were trained with an aggregator."
        )
    trained, ratios, methods = "nothing thrown", (0.25, 0.5, 0.65), {"plain": "none"}
    if aggregates:
        trained, ratios = f"{kind}, {ratio:.0%} thrown", (ratio,)
        methods["progressive"] = kind
    variants = {
        (part, f"{method}, {retain}"): _variant(
            config, ratio=part, kind=used, retain=retain
        )
        for part, (method, used), retain in itertools.product(
            ratios, methods.items(), ("random", "furthest")
        )
    }
    with pipeline.eval_batches(
        sources.make_source(config.data, "train"), config.data,
        batch_size=config.data.batch_size, num_images=num_images, process_index=0,
        process_count=1, workdir=str(directory),
    ) as batches:
        deviations = gradient_deviation.deviation(
            _variant(config, ratio=0.0, kind="none", retain="random"), variants,
            checkpointer.restore_variables(directory / "checkpoints"),
            _whole(batches),
            jax.random.key(config.seed, impl="threefry2x32"),
        )
    floor = deviations.pop(gradient_deviation.ANOTHER_MASK)
    rows = {(trained, 0.0): {gradient_deviation.ANOTHER_MASK: floor}}
    for (part, name), deviation in deviations.items():
        rows.setdefault((trained, part), {})[name] = deviation
    return rows


def table(
    rows: dict[
        tuple[str, float], list[dict[str, gradient_deviation.GradientDeviation]]
    ],
) -> str:
    """Returns a row per training, ratio and way to throw: mean and spread."""
    lines = [
        step.row(["trained with", "thrown", "", "distance", "1 - cosine", "batches"]),
        step.row(["---"] * 6),
    ]
    for (trained, ratio), runs in rows.items():
        for name in runs[0]:
            distance, angle = (
                np.concatenate([getattr(run[name], field) for run in runs])
                for field in ("distance", "angle")
            )
            lines.append(step.row([
                trained, f"{ratio:.0%}", name,
                f"{distance.mean():.3f} ± {distance.std(ddof=1):.3f}",
                f"{angle.mean():.3f} ± {angle.std(ddof=1):.3f}", str(len(distance)),
            ]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Compares the gradients on every run and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradients", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="WORKDIR")
    parser.add_argument("--images", type=int, default=1280, help="images (1280)")
    args = parser.parse_args(argv)
    rows = {}
    for directory in args.runs:
        for row, deviations in compare(directory, num_images=args.images).items():
            rows.setdefault(row, []).append(deviations)
    print(step.conditions([], f"gradients of {len(args.runs)} runs"))
    print(table(rows))


if __name__ == "__main__":
    main()
