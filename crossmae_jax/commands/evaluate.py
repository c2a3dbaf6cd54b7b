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
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from crossmae_jax import main as train_main
from crossmae_jax import paths

_SETS = ("a", "r", "sketch", "c")


def _checkpoint(argv: list[str]) -> paths.AnyPath:
    """Returns the path of --checkpoint, which decides what --config is."""
    for argument, following in itertools.pairwise([*argv, ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "checkpoint":
            try:
                return paths.path(value if equals else following)
            except ValueError as error:
                train_main.stop(str(error))
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
    from crossmae_jax.evals import of_checkpoint
    from crossmae_jax.runs import workdir

    if not workdir.is_run(path):
        train_main.stop(
            f"{path} is no run with checkpoints; name the --config=FILE that describes "
            "the model of these weights and the images, such as "
            "configs/finetune_vitb.py."
        )
    config = workdir.read_config(path)
    config.evals = of_checkpoint.DEFAULTS  # so that any option can be changed
    train_main.parse_settings("evaluate", argv, values, config, usage=usage)


def _sets(values: flags.FlagValues) -> dict[str, str]:
    """Returns the directories of ImageNet's variants that were given."""
    given = {name: values[f"imagenet_{name}"].value for name in _SETS}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not value:
            train_main.stop(f"--imagenet_{name} is empty; name a directory.")
        if "robustness" not in values.suite:
            train_main.stop(
                f"--imagenet_{name} is for --suite=robustness, which is not asked for."
            )
    return given


def _options(values: flags.FlagValues) -> dict[str, dict[str, Any]]:
    """Returns the options of evaluators that the command line sets."""
    options: dict[str, dict[str, Any]] = {}
    for name in config_flags.get_override_values(values["config"]):
        group, *rest = name.split(".")
        if group == "evals" and len(rest) == 2:
            evaluator, option = rest
            value = values.config.evals[evaluator][option]
            options.setdefault(evaluator, {})[option] = value
    return options


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
    imagenet = _sets(values)
    logging.set_verbosity(logging.WARNING)
    # Loader workers import this file anew, and must not import JAX.
    import jax

    from crossmae_jax.distributed import cluster, environment, parallel
    from crossmae_jax.evals import of_checkpoint
    from crossmae_jax.runs import workdir

    path = paths.path(values.checkpoint)
    if values.workdir is None and not workdir.is_run(path):
        train_main.stop("--workdir is missing: where the report goes.")
    if paths.is_remote(values.workdir or path):
        train_main.stop(
            "Reports are not written to a bucket; give a --workdir on a disk."
        )
    with train_main.session(agree_to_stop=False):
        environment.check_accelerator()
        if jax.process_count() > 1:
            parallel.announce()
            cluster.check_same(repr(argv))
        made = of_checkpoint.open_checkpoint(path, values.config, step=values.step)
        directory = Path(
            values.workdir or path / "evaluations" / f"step_{made.step:08d}"
        )
        found = of_checkpoint.run(
            made, values.suite, directory, options=_options(values), imagenet=imagenet
        )
    if jax.process_index() == 0:
        print(f"{found.to_markdown()}\nwritten to {directory / 'evaluation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
