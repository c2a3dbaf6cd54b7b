"""Objectives: what a batch is trained on, `config.objective` by name.

The train loop knows of one what `objective.Objective` says and nothing else.
"""

from typing import Any

from ml_collections import ConfigDict

from crossmae_jax import ranges
from crossmae_jax.objectives.classify import Classify
from crossmae_jax.objectives.objective import Objective
from crossmae_jax.objectives.pretrain import Pretrain

OBJECTIVES = {"classify": Classify, "pretrain": Pretrain}


def make(config: ConfigDict) -> Objective:
    """Returns what `config.objective` names.

    Raises:
      ValueError: if there is no such thing, or a setting cannot be.
    """
    ranges.check_finite(config)
    if config.objective not in OBJECTIVES:
        raise ValueError(
            f"Unknown objective {config.objective!r}. Known: {', '.join(OBJECTIVES)}."
        )
    return OBJECTIVES[config.objective](config)


def with_classes(config: ConfigDict, source: Any) -> ConfigDict:
    """Returns the config with the number of classes that the training data has.

    Args:
      source: of the training data, see `data.sources`.

    Raises:
      ValueError: if it has none, or the config names another number.
    """
    if "num_classes" not in config.data:
        return config
    wanted, num_classes = config.data.num_classes, len(source.classes)
    if not num_classes:
        raise ValueError(
            "A classifier needs labels, but the training data has none: "
            f"{source!r}. Sort the images into one folder per class, "
            "or use a data set with the feature 'label'."
        )
    if wanted is not None and wanted != num_classes:
        raise ValueError(
            f"The training data has {num_classes} classes, but the head is for "
            f"data.num_classes={wanted}; give the directory right above the class "
            "folders, or set data.num_classes to the data's."
        )
    config = config.copy_and_resolve_references()
    config.data.num_classes = wanted or num_classes
    return config
