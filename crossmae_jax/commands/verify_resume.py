"""Kills a short run and lets it go on: is it the same, bit for bit?

    python -m crossmae_jax verify-resume --config=FILE [--config.KEY=VALUE ...] \\
        --workdir=DIR [--steps=20] [--seed=N] [--deterministic]

Of the config a short form is trained twice, on all devices of this host: once
undisturbed, and once with SIGKILL after a step that is drawn, and started again. Arrays
of the last checkpoints and metrics are compared. To be done once on a new machine; both
runs stay in DIR, and the same --seed draws the same step.

Exit status 0 if all is equal, 1 if not, 2 if the command line is wrong, configuration,
data and directory do not fit each other, or a run fails.
"""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from crossmae_jax import paths
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag
from crossmae_jax.distributed import hardware

_FLAGS = {
    "workdir": Flag(str, "a new directory, for both runs", required=True),
    "steps": Flag(int, "of each run; default: 20", default=20),
    "seed": Flag(int, "draws the step to kill after; default: another each time"),
    "deterministic": Flag(
        bool, "as of training; a GPU needs it to compute the same bits", default=False
    ),
}


@session.command(error_status=2)  # 1 is a run that is not the same
def main(argv: Sequence[str]) -> int:
    """Verifies what `argv` describes."""
    given = flags.parse(
        "verify-resume", argv, _FLAGS, doc=__doc__, config=flags.of_file
    )
    if paths.is_remote(given.workdir):
        flags.stop(
            f"{given.workdir} lies in a bucket; give a directory on a disk, whose "
            "files can be watched."
        )
    seed = secrets.randbelow(1000) if given.seed is None else given.seed
    environment = dict(os.environ)
    hardware.without_devices()  # the runs take them
    from crossmae_jax import verify_resume

    print(
        f"verify-resume: {given.title}, {given.steps} steps, --seed={seed}", flush=True
    )
    verdict = verify_resume.verify(
        given.config, Path(given.workdir), steps=given.steps, seed=seed,
        flags=["--deterministic"] * given.deterministic, title=str(given.file),
        environment=environment,
    )
    print(verdict)
    return 0 if verdict.equal else 1
