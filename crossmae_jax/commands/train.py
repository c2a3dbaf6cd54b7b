"""Trains the model of a config file; given again, goes on where it stopped.

    python -m crossmae_jax.main --config=configs/vitb_cross.py \\
        --workdir=runs/vitb_cross --config.optim.base_lr=1e-4

`--resume=must` refuses to begin, `--resume=never` to go on; the first line says which
it was. `python -m crossmae_jax train` is the same. Everything else can be called from a
notebook: `train.run(config, workdir)`.

Exit status 2 if the command line is wrong; 1 for any other error, such as settings,
data and directory that do not fit each other, numbers that are not finite, a disk or a
memory that is full; 75 if it was interrupted or stood still: run it again.
"""

from collections.abc import Sequence

from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag
from crossmae_jax.distributed import determinism
from crossmae_jax.runs import resuming

_FLAGS = {
    "workdir": Flag(
        str, "the directory of this run: checkpoints, metrics, pictures; given again, "
        "the run goes on where it stopped",
    ),
    "resume": Flag(
        flags.one_of(resuming.MODES), "auto: goes on if there is a checkpoint, else "
        "begins; must: stops if there is none; never: stops if there is one; default: "
        "auto", default="auto",
    ),
    "heartbeat_seconds": Flag(
        int, "of several processes: after so many seconds without a sign of life from "
        "one the others stop; default: 100", default=100,
    ),
    "deterministic": Flag(
        bool, "have a GPU compute the same bits in every run, which may be slower",
        default=False,
    ),
}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Trains as the flags say."""
    given = flags.parse("train", argv, _FLAGS, doc=__doc__, config=flags.of_file)
    if not given.workdir:
        flags.stop(
            "--workdir is missing: the directory of this run, such as "
            f"--workdir=runs/{given.file.stem}. Given again, the run goes on where it "
            "stopped."
        )
    if given.deterministic:  # before JAX starts
        print(determinism.require(), flush=True)
    # Loader workers import the main module anew, and must not import JAX.
    from crossmae_jax import train

    with session.joined(given.heartbeat_seconds):
        train.run(given.config, given.workdir, resume=given.resume)
