"""Fine-tunes the last blocks, for several numbers of blocks, and draws the accuracies.

    python -m crossmae_jax sweep --config=configs/partialft_vitb.py --workdir=DIR \\
        --blocks=0,0.5,1,2,4,8,12 --config.init_from=RUN [--config.KEY=VALUE ...]

Each number of blocks is a run in DIR/blocks_N; given again, the command goes on where
it stopped. DIR/sweep.json has the best accuracy of each, DIR/accuracy_by_blocks.png the
curve, with `--against=OTHER,...` beside those of other sweeps' directories.

Exit status 2 if the command line is wrong, 1 if configuration and data contradict each
other, 75 if it was interrupted.
"""

import sys
from pathlib import Path

from absl import flags, logging

from crossmae_jax import main as train_main
from crossmae_jax import paths


def _blocks(texts: list[str]) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError:
        train_main.stop(
            f"--blocks={','.join(texts)} must be numbers, such as --blocks=0,0.5,1,2,4."
        )


def main(argv: list[str]) -> int:
    """Runs the sweep that `argv` describes."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Where runs go.", flag_values=values)
    flags.DEFINE_list("blocks", [], "Numbers of blocks.", flag_values=values)
    flags.DEFINE_list("against", [], "Other sweeps.", flag_values=values)
    _, title = train_main.parse_command(
        "sweep", argv, values,
        usage="--workdir=DIR --blocks=0,0.5,1,2 [--against=OTHER,...]",
    )
    blocks = _blocks(values.blocks)
    for name in ("workdir", "blocks"):
        if not getattr(values, name):
            train_main.stop(
                f"--{name} is missing; python -m crossmae_jax sweep --help."
            )
    for name in (values.workdir, *values.against):
        if paths.is_remote(name):
            train_main.stop(
                f"{name} lies in a bucket, where a sweep cannot be; give a directory "
                "on a disk."
            )
    logging.set_verbosity(logging.WARNING)
    # Loader workers import this file anew, and must not import JAX.
    import jax

    from crossmae_jax import sweep
    from crossmae_jax.distributed import parallel

    directories = [Path(name) for name in (values.workdir, *values.against)]
    with train_main.session():
        parallel.say(title)
        sweep.names(directories)  # before the training, not after it
        for other in directories[1:]:
            sweep.read(other)
        found = sweep.run(values.config, directories[0], blocks=blocks)
        if jax.process_index() == 0:
            picture = sweep.draw(directories, directories[0] / sweep.PICTURE)
            print(f"\n{sweep.table(found)}\n\npicture      {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
