"""Evaluators: what is measured of a model, in training and of a checkpoint.

`config.evals` names them, with their options. Adding one is a file with a dataclass,
see `evaluator.Evaluator`, and a row here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from crossmae_jax.evals.accuracy import Accuracy
from crossmae_jax.evals.evaluator import Evaluator
from crossmae_jax.evals.knn import KNN
from crossmae_jax.evals.linear import Linear
from crossmae_jax.evals.rank import Rank
from crossmae_jax.evals.reconstruction import Reconstruction

EVALUATORS = {
    "accuracy": Accuracy,
    "knn": KNN,
    "linear": Linear,
    "rank": Rank,
    "reconstruction": Reconstruction,
}


def make(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Evaluator]:
    """Returns evaluators by their names, made from their options.

    Args:
      options: `config.evals`. `every_epochs` in it says when an evaluator runs; that is
        for the train loop, and left out.

    Raises:
      ValueError: for an evaluator or an option that does not exist, an option that is
        missing, or a value that can never be used.
    """
    for name, given in options.items():
        if name not in EVALUATORS:
            raise ValueError(
                f"Unknown evaluator {name!r} in config.evals. "
                f"Known: {', '.join(sorted(EVALUATORS))}."
            )
        _check_names(name, given)
    return {
        name: EVALUATORS[name](**{
            option: value for option, value in given.items() if option != "every_epochs"
        })
        for name, given in options.items()
    }


def _check_names(name: str, given: Mapping[str, Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(EVALUATORS[name])}
    for option in given:
        if option not in fields and option != "every_epochs":
            raise ValueError(
                f"Unknown option {option!r} in config.evals.{name}. Known: "
                f"{', '.join(sorted([*fields, 'every_epochs']))}; correct it or take "
                "it out."
            )
    for option, field in fields.items():
        if option not in given and field.default is dataclasses.MISSING:
            raise ValueError(
                f"config.evals.{name} lacks the option {option!r}, which has no "
                "default; add it to the configuration."
            )
