"""Fine-tunes the last blocks, for several numbers of blocks, and draws the accuracies.

    python -m crossmae_jax sweep --config=configs/partialft_vitb.py --workdir=DIR \\
        --blocks=0,0.5,1,2,4,8,12 --config.init_from=RUN [--config.KEY=VALUE ...]

Each number of blocks is a run in DIR/blocks_N; given again, the command goes on where
it stopped. DIR/sweep.json has the best accuracy of each, DIR/accuracy_by_blocks.png the
curve, with `--against=OTHER,...` beside those of other sweeps' directories.

Exit status 2 if the command line is wrong, 1 if configuration and data contradict each
other, 75 if it was interrupted.
"""

from collections.abc import Sequence
from pathlib import Path

from crossmae_jax import paths
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag

_FLAGS = {
    "workdir": Flag(str, "the directory of the runs", required=True),
    "blocks": Flag(
        flags.numbers(float), "numbers of blocks, such as --blocks=0,0.5,1,2,4",
        required=True,
    ),
    "against": Flag(flags.words, "directories of other sweeps", default=()),
}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Runs the sweep that `argv` describes."""
    given = flags.parse("sweep", argv, _FLAGS, doc=__doc__, config=flags.of_file)
    for name in (given.workdir, *given.against):
        if paths.is_remote(name):
            flags.stop(
                f"{name} lies in a bucket, where a sweep cannot be; give a directory "
                "on a disk."
            )
    # Loader workers import the main module anew, and must not import JAX.
    import jax

    from crossmae_jax import sweep
    from crossmae_jax.distributed import parallel

    directories = [Path(name) for name in (given.workdir, *given.against)]
    with session.joined():
        parallel.say(given.title)
        sweep.names(directories)  # before the training, not after it
        for other in directories[1:]:
            sweep.read(other)
        curve = sweep.run(given.config, directories[0], blocks=list(given.blocks))
        if jax.process_index() == 0:
            picture = sweep.draw(directories, directories[0] / sweep.PICTURE)
            print(f"\n{sweep.table(curve)}\n\npicture      {picture}")
