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

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from crossmae_jax import errors, paths
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag

_SETS = {
    "imagenet_a": "ImageNet-A", "imagenet_r": "ImageNet-R",
    "imagenet_sketch": "ImageNet-Sketch", "imagenet_c": "ImageNet-C",
}
_FLAGS = {
    "checkpoint": Flag(paths.path, "the --workdir of a run, or a file of weights"),
    "suite": Flag(
        flags.words, "what to measure: accuracy, knn, linear, robustness", default=()
    ),
    "step": Flag(int, "of the run; default: its newest intact one"),
    "workdir": Flag(str, "where the report goes; default: RUN/evaluations/step_N"),
    **{
        name: Flag(str, f"robustness: the directory of {title}")
        for name, title in _SETS.items()
    },
}


def _config(given: types.SimpleNamespace) -> ConfigDict:
    """Returns the run's own configuration, unless a file is named."""
    if given.checkpoint is None:
        flags.stop(
            "--checkpoint is missing: the --workdir of a run, or a file of weights."
        )
    if given.file is not None:
        return flags.load_config(given.file)
    from crossmae_jax.evals import of_checkpoint
    from crossmae_jax.runs import workdir

    with errors.setting_up():
        if not workdir.is_run(given.checkpoint):
            flags.stop(
                f"{given.checkpoint} is no run with checkpoints; name the "
                "--config=FILE that describes the model of these weights and the "
                "images, such as configs/finetune_vitb.py."
            )
        config = workdir.read_config(given.checkpoint)
    config.evals = of_checkpoint.DEFAULTS  # so that any option can be changed
    return config


def _sets(given: types.SimpleNamespace) -> dict[str, str]:
    """Returns the directories of ImageNet's variants that were given."""
    directories = {name: getattr(given, name) for name in _SETS}
    directories = {name: path for name, path in directories.items() if path is not None}
    for name, path in directories.items():
        if not path:
            flags.stop(f"--{name} is empty; name a directory.")
        if "robustness" not in given.suite:
            flags.stop(
                f"--{name} is for --suite=robustness, which is not asked for."
            )
    return {name.removeprefix("imagenet_"): path for name, path in directories.items()}


def _options(given: types.SimpleNamespace) -> dict[str, dict[str, Any]]:
    """Returns the options of evaluators that the command line sets."""
    options: dict[str, dict[str, Any]] = {}
    for name in given.changed:
        group, *rest = name.split(".")
        if group == "evals" and len(rest) == 2:
            evaluator, option = rest
            value = given.config.evals[evaluator][option]
            options.setdefault(evaluator, {})[option] = value
    return options


@session.command()
def main(argv: Sequence[str]) -> None:
    """Prints and writes the report that `argv` asks for."""
    given = flags.parse("evaluate", argv, _FLAGS, doc=__doc__, config=_config)
    path = given.checkpoint
    if not given.suite:
        flags.stop("--suite is missing: accuracy, knn, linear, robustness.")
    imagenet = _sets(given)
    # Loader workers import the main module anew, and must not import JAX.
    import jax

    from crossmae_jax.distributed import cluster, environment, parallel
    from crossmae_jax.evals import of_checkpoint
    from crossmae_jax.runs import workdir

    if given.workdir is None and not workdir.is_run(path):
        flags.stop("--workdir is missing: where the report goes.")
    if paths.is_remote(given.workdir or path):
        flags.stop("Reports are not written to a bucket; give a --workdir on a disk.")
    with session.joined(agree_to_stop=False):
        environment.check_accelerator()
        if jax.process_count() > 1:
            parallel.announce()
            cluster.check_same(repr(list(argv)))
        opened = of_checkpoint.open_checkpoint(path, given.config, step=given.step)
        directory = Path(
            given.workdir or path / "evaluations" / f"step_{opened.step:08d}"
        )
        report = of_checkpoint.run(
            opened, given.suite, directory, options=_options(given), imagenet=imagenet
        )
    if jax.process_index() == 0:
        print(f"{report.to_markdown()}\nwritten to {directory / 'evaluation.json'}")
