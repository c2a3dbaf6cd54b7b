"""Whether a run goes on or begins, said by whoever starts it.

    auto      goes on from the checkpoints in the directory, or begins where there is
              none; checkpoints of which none can be restored are an error
    must      an error where there is none: a mistyped directory, a disk that is not
              mounted, begin no second run in silence
    never     an error where there is one; nothing is ever deleted

Asked before anything is set up or written. Saves that were never completed are no
checkpoints; damaged ones are.
"""

from crossmae_jax import errors
from crossmae_jax.paths import AnyPath

MODES = ("auto", "must", "never")
_CHECKPOINTS = ("complete", "put aside", "replaced")


def check(directory: AnyPath, resume: str) -> None:
    """Refuses a workdir that has no checkpoints, or has some, where `resume` says so.

    Raises:
      SetupError: if it does, or if `resume` is none of `MODES`.
    """
    from crossmae_jax.checkpoints import steps  # here: commands list the modes only

    if resume not in MODES:
        raise errors.SetupError(
            f"Unknown resume={resume!r}. Known: {', '.join(MODES)}."
        )
    if resume == "auto":
        return
    with errors.using_files():
        found = steps.found(directory / "checkpoints")
    names = [one.path.name for one in found if one.kind in _CHECKPOINTS]
    if resume == "must" and not any(one.kind == "complete" for one in found):
        raise errors.SetupError(
            f"{directory} has no checkpoint to go on from, and --resume=must begins no "
            "run. Give the --workdir of the run, mount its disk, or begin one with "
            "--resume=auto."
        )
    if resume == "never" and names:
        raise errors.SetupError(
            f"{directory} holds checkpoints of a run ({', '.join(names)}), and "
            "--resume=never goes on from none. Give a new --workdir, or go on with "
            "--resume=auto; nothing was changed."
        )
