"""What the parts of a model have in common; `kinds` makes them of their settings."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from crossmae_jax.kinds import Group
from crossmae_jax.models import layers
from crossmae_jax.runs import settings

DTYPES = ("bfloat16", "float32")


def computing(model: Group) -> dict[str, Any]:
    """Returns what all parts have in common: `remat`, and `dtype` as a type.

    Raises:
      ValueError: for an unknown one.
    """
    for name, known in (("dtype", DTYPES), ("remat", layers.REMATS)):
        check_choice(f"model.{name}", model[name], known)
    return dict(remat=model["remat"], dtype=jnp.dtype(model["dtype"]))


def check_settings(config: ConfigDict, known: tuple[str, ...]) -> None:
    """Raises ValueError for a setting of `config.model` that nobody would read.

    Args:
      known: groups and settings that there are.
    """
    for name in config.model:
        if name not in known:
            now = settings.moved(f"model.{name}", config)
            raise ValueError(
                f"Unknown setting model.{name}={config.model[name]!r}. "
                + (f"{now}." if now else f"There are: {', '.join(known)}.")
            )


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is none of those known."""
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}. Known: {', '.join(known)}.")


def only(widths: Mapping[str, int]) -> tuple[str, int]:
    """Returns name and width of the only target, for a decoder that predicts one.

    Raises:
      ValueError: if there are several.
    """
    if len(widths) > 1:
        raise ValueError(
            "This decoder predicts one target, but that of config.target is of several "
            f"parts: {', '.join(widths)}; choose another config.model.decoder.kind."
        )
    (target,) = widths.items()
    return target
