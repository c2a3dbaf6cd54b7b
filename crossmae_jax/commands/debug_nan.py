"""Makes a step that was not finite again, and names what was first to be so.

    python -m crossmae_jax debug-nan runs/vitb_cross/nan_step_48207.npz

FILE is what a run leaves that ends since its loss or gradient were not finite: batch,
key and weights of a step. Prints the first tensor that is not finite, the block of the
model that it is in, and the images of the batch that it is not finite for. Needs
neither the data nor the device of the run; a batch that is too large for this machine
is worked through in parts.

Exit status 2 if the command line is wrong, 1 if FILE cannot be read.
"""

from collections.abc import Sequence

from crossmae_jax import errors
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag

_FLAGS = {
    "parts": Flag(
        int, "works through the batch in so many parts; default: as the run did"
    ),
}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Prints what was found."""
    given = flags.parse("debug-nan", argv, _FLAGS, doc=__doc__, operands=("FILE",))
    from crossmae_jax.probing import nonfinite
    from crossmae_jax.runs import replay

    with errors.setting_up():
        step = replay.read(given.operands[0])
    print(nonfinite.diagnose(step, parts=given.parts))
