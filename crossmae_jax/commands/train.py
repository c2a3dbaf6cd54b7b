"""Trains the model of a config file; given again, goes on where it stopped.

`python -m crossmae_jax train` and `python -m crossmae_jax.main` are the same.
"""

from absl import app, flags

from crossmae_jax import main as train_main


def main(argv: list[str]) -> None:
    """Parses the flags and trains."""
    if {"-h", "--help"} & set(argv):
        print(train_main.__doc__ + flags.FLAGS.module_help(train_main.__name__))
        return
    app.run(
        train_main.main, argv=["crossmae-jax train", *argv],
        flags_parser=train_main.parse_flags,
    )
