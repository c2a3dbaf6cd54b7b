"""Times the choice of tokens inside the step: random and furthest, against the step.

    python -m benchmarks.sampling --config=configs/vitb_mae_prmim.py --batch=4096 \\
        --step-batch=256

The choice runs once per step, on the device, for the whole batch. The share is that of
its time per image in the step's time per image, each at its own batch: on a small
machine the step is measured at fewer images than the choice.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import step
from crossmae_jax.distributed import parallel
from crossmae_jax.objectives import OBJECTIVES


def measure_choice(
    config: ConfigDict, retain: str, *, batch: int, repeats: int
) -> list[float]:
    """Returns the seconds of each repetition of choosing a batch's tokens."""
    config = config.copy_and_resolve_references()
    config.masking.retain = retain
    choose = jax.jit(OBJECTIVES[config.objective](config).sample)
    spread = parallel.batch_sharding(parallel.make_mesh())  # as in the step
    key = jax.random.key(0, impl="threefry2x32")
    seconds = []
    for i in range(repeats + 1):
        numbers = jax.device_put(jnp.arange(batch, dtype=jnp.uint32) + i, spread)
        jax.block_until_ready(numbers)
        begin = time.perf_counter()
        jax.block_until_ready(choose(key, {"sample": numbers}))
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]  # the first one compiled


def main(argv: list[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--batch", type=int, default=4096, help="images to choose for")
    parser.add_argument(
        "--step-batch", type=int, required=True, help="images of a step"
    )
    parser.add_argument("--steps", type=int, default=10, help="repetitions (10)")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="setting of the step to change, such as model.dtype=float32",
    )
    args = parser.parse_args(argv)
    overrides = [f"data.batch_size={args.step_batch}", *args.override]
    run = step.prepare(
        Path(args.config).stem, step.load_config(args.config, overrides=overrides)
    )
    step.measure([run], num_steps=args.steps)
    per_image = statistics.median(run.seconds) / args.step_batch
    counts = OBJECTIVES[run.config.objective](run.config).counts
    print(step.conditions(
        args.override,
        f"{args.batch} images, {counts.num_pred + counts.num_thrown} masked patches -> "
        f"{counts.num_pred}; steps of {args.step_batch} images",
    ))
    print(step.row(["choice", "ms: median (min..max)", "share of a step"]))
    print(step.row(["---"] * 3))
    for retain in ("random", "furthest"):
        seconds = measure_choice(
            run.config, retain, batch=args.batch, repeats=args.steps
        )
        median = statistics.median(seconds)
        print(step.row([
            retain,
            f"{median * 1e3:.1f} ({min(seconds) * 1e3:.1f}..{max(seconds) * 1e3:.1f})",
            f"{median / args.batch / per_image:.4%}",
        ]))


if __name__ == "__main__":
    main()
