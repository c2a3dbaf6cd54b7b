"""Evaluates a checkpoint: accuracy, k-NN, linear, robustness; writes one report.

    python -m crossmae_jax evaluate --checkpoint=RUN --suite=knn,linear
    python -m crossmae_jax evaluate --checkpoint=RUN/best --suite=accuracy,robustness \\
        --imagenet_a=DIR --imagenet_r=DIR --imagenet_sketch=DIR --imagenet_c=DIR

A run is evaluated with its own configuration, of which settings can be changed:
--config.data.data_dir=DIR, --config.data.split=train[:10%], --config.evals.knn.k=5.
Weights of other formats (docs/weights.md) need --config=FILE, which says what the model
is and where images lie.

Robustness without one of the four directories is that of the evaluation split under
corruptions made on the fly (docs/robustness.md).

--workdir=DIR   where evaluation.json and evaluation.md go; RUN/evaluations/step_N if
                not given, for other weights it must be
--step=N        of the run; its newest intact checkpoint if not given

Exit status 2 if the command line is wrong, 1 if checkpoint, configuration and data do
not fit each other.
"""

import itertools
import re
import sys
from pathlib import Path

from absl import flags, logging

from crossmae_jax import main as train_main

_SETS = ("a", "r", "sketch", "c")


def _checkpoint(argv: list[str]) -> Path:
    """Returns the path of --checkpoint, which decides what --config is."""
    for argument, following in itertools.pairwise([*argv, ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "checkpoint":
            return Path(value if equals else following)
    train_main.stop(
        "--checkpoint is missing: the --workdir of a run, or a file of weights."
    )


def _parse(argv: list[str], values: flags.FlagValues) -> None:
    """Parses the flags; --config is the run's own unless a file is named."""
    path = _checkpoint(argv)
    usage = "--checkpoint=PATH --suite=knn,linear [--config.KEY=VALUE ...]"
    if any(re.fullmatch(r"--?config(=.*)?", argument) for argument in argv):
        train_main.parse_command("evaluate", argv, values, usage=usage)
        return
    if not (path / "config.json").is_file():
        train_main.stop(
            f"{path} is no run; name the --config=FILE that describes the model of "
            "these weights and the images, such as configs/finetune_vitb.py."
        )
    from crossmae_jax import workdir

    config = workdir.read_config(path)
    train_main.parse_settings("evaluate", argv, values, config, usage=usage)


def main(argv: list[str]) -> int:
    """Prints and writes the report that `argv` asks for."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "What to evaluate.", flag_values=values)
    flags.DEFINE_list("suite", [], "How.", flag_values=values)
    flags.DEFINE_integer("step", None, "Of the run.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where reports go.", flag_values=values)
    for name in _SETS:
        flags.DEFINE_string(f"imagenet_{name}", None, "A set.", flag_values=values)
    _parse(argv, values)
    if not values.suite:
        train_main.stop("--suite is missing: accuracy, knn, linear, robustness.")
    logging.set_verbosity(logging.WARNING)
    # Loader workers import this file anew, and must not import JAX.
    from crossmae_jax import evaluate

    path = Path(values.checkpoint)
    if values.workdir is None and not evaluate.is_run(path):
        train_main.stop("--workdir is missing: where the report goes.")
    with train_main.known_errors(ValueError):
        made = evaluate.open_checkpoint(path, values.config, step=values.step)
        directory = Path(
            values.workdir or path / "evaluations" / f"step_{made.step:08d}"
        )
        report = evaluate.run(made, values.suite, directory, imagenet={
            name: values[f"imagenet_{name}"].value for name in _SETS
            if values[f"imagenet_{name}"].value
        })
    print(f"{report.to_markdown()}\nwritten to {directory / 'evaluation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
