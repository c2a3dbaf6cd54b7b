"""How far the gradients of cheaper objectives stray from MAE's, on trained models.

    python -m benchmarks.gradients runs/table2/0.5_progressive_random/seed_0 ...

Each run is one of PR-MIM with its own throwing ratio. On its weights, and on images of
its own training set, the encoder's gradient is compared with that of the same
model without throwing: plain throwing and progressive reconstruction, random and
furthest choice, at the run's ratio (`crossmae_jax.probing.gradient_deviation`). Runs of
one ratio, such as several seeds, make one row together.
"""

import argparse
import itertools
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import step
from crossmae_jax import checkpoint, probing, workdir
from crossmae_jax.data import pipeline, sources
from crossmae_jax.objectives.pretrain import Pretrain


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
) -> tuple[float, dict[str, probing.GradientDeviation]]:
    """Returns a run's throwing ratio and the deviations of every way to throw."""
    config = workdir.read_config(directory)
    ratio, kind = config.masking.throw_ratio, config.model.aggregator.kind
    if kind == "none" or not ratio:
        raise ValueError(
            f"{directory} has aggregator {kind!r} and throw_ratio {ratio}; give runs "
            "that were trained with an aggregator, which the comparison needs."
        )
    variants = {
        f"{method}, {retain}": _variant(config, ratio=ratio, kind=used, retain=retain)
        for (method, used), retain in itertools.product(
            (("plain", "none"), ("progressive", kind)), ("random", "furthest")
        )
    }
    with pipeline.eval_batches(
        sources.make_source(config.data, "train"), config.data,
        batch_size=config.data.batch_size, num_images=num_images, process_index=0,
        process_count=1, workdir=str(directory),
    ) as batches:
        found = probing.gradient_deviation(
            _variant(config, ratio=0.0, kind="none", retain="random"), variants,
            checkpoint.restore_variables(directory / "checkpoints"),
            _whole(batches),
            jax.random.key(config.seed, impl="threefry2x32"),
        )
    return ratio, found


def table(found: dict[float, list[dict[str, probing.GradientDeviation]]]) -> str:
    """Returns a row per ratio and way to throw: mean and spread over batches."""
    lines = [
        step.row(["thrown", "", "distance / norm", "1 - cosine", "batches"]),
        step.row(["---"] * 5),
    ]
    for ratio, runs in sorted(found.items()):
        for name in runs[0]:
            distance, angle = (
                np.concatenate([getattr(run[name], field) for run in runs])
                for field in ("distance", "angle")
            )
            lines.append(step.row([
                f"{ratio:.0%}", name,
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
    found = {}
    for directory in args.runs:
        ratio, deviations = compare(directory, num_images=args.images)
        found.setdefault(ratio, []).append(deviations)
    print(step.conditions([], f"gradients of {len(args.runs)} runs"))
    print(table(found))


if __name__ == "__main__":
    main()
