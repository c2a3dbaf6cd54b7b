"""Parts of a model, chosen by name: a group of settings is what a class is called with.

    config.model.decoder = dict(kind="cross", dim=512, depth=12, num_heads=16)
    DECODERS = {"cross": CrossDecoder, "mae": MAEDecoder}

Every part has such a table from kinds to classes, beside its classes. What follows from
the rest of the model (the grid, the type of computation) is given to a class by whoever
builds the model, and is no option.

A configuration holds the options of all kinds of a part, so that the kind can be
changed by itself. Options that the chosen kind does not take are then left over. One
that other kinds need, such as a decoder's depth, is left aside. One that has a default
must have it or be unset: any other value was meant for something, and is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from crossmae_jax.models import layers
from crossmae_jax.runs import settings

DTYPES = ("bfloat16", "float32")
Table = Mapping[str, type[nn.Module] | None]
Group = ConfigDict | Mapping[str, Any]  # as configs and as cards have it


def make(part: str, table: Table, options: Group, **given: Any) -> Any:
    """Returns the part that a group of settings describes; None if its kind is that.

    Args:
      part: its name in errors and in `config.model`.
      options: the kind, and what its class is called with; None is unset.
      given: what the class may want of the rest of the model.

    Raises:
      ValueError: for an unknown kind or option, or one that the kind does not take and
        that is not at its default.
    """
    chosen = choose(part, table, options)
    if chosen is None:
        return None
    options = {name: value for name, value in options.items() if value is not None}
    kind, fields = options.pop("kind"), _fields(chosen)
    for name in [name for name in options if name not in fields or name in given]:
        _check_left_over(part, table, kind, name, options.pop(name), given)
    missing = [
        name for name, default in fields.items()
        if default is dataclasses.MISSING and name not in options.keys() | given.keys()
    ]
    if missing:
        raise ValueError(
            f"{part}.kind={kind!r} needs {', '.join(missing)}; set "
            f"config.model.{part}.{missing[0]}."
        )
    given = {name: value for name, value in given.items() if name in fields}
    return chosen(**options, **given)


def choose(part: str, table: Table, options: Group) -> Any:
    """Returns the class that a group of settings names; ValueError if there is none."""
    kind = options.get("kind")
    if kind not in table:
        raise ValueError(
            f"Unknown {part}.kind {kind!r}. Known: {', '.join(sorted(table))}."
        )
    return table[kind]


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


def _fields(part: type[nn.Module]) -> dict[str, Any]:
    """Returns the names of a class's fields and their defaults."""
    return {
        field.name: field.default for field in dataclasses.fields(part)
        if field.name not in ("name", "parent")
    }


def _check_left_over(
    part: str, table: Table, kind: str, name: str, value: Any, given: Mapping[str, Any]
) -> None:
    """Raises ValueError for an option that is not left over from another kind."""
    if name in given:
        raise ValueError(
            f"{part}.{name}={value!r} is no option: it follows from the rest of the "
            "model; leave it out."
        )
    kinds = {other: _fields(c) for other, c in table.items() if c is not None}
    takers = {other: fields[name] for other, fields in kinds.items() if name in fields}
    if not takers:
        known = {option for fields in kinds.values() for option in fields} - set(given)
        raise ValueError(
            f"Unknown option {part}.{name}={value!r}. Known: "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    if value not in takers.values() and dataclasses.MISSING not in takers.values():
        default = next(iter(takers.values()))
        raise ValueError(
            f"{part}.{name}={value!r} is an option of {part}.kind="
            f"{' or '.join(map(repr, sorted(takers)))}, and does nothing with "
            f"{part}.kind={kind!r}; leave it at {default!r}."
        )
