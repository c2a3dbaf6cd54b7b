"""Things chosen by name: a group of settings is what a class is called with.

    config.model.decoder = dict(kind="cross", dim=512, depth=12, num_heads=16)
    DECODERS = {"cross": CrossDecoder, "mae": MAEDecoder}

Every part of a model, every target and every noise has such a table from kinds to
classes, beside its classes. What follows from the rest of the configuration (the grid,
the type of computation) is given to a class by whoever calls `make`, and is no option.

A configuration holds the options of all kinds of a group, so that the kind can be
changed by itself. Options that the chosen kind does not take are then left over. One
that other kinds need, such as a decoder's depth, is left aside. One that has a default
must have it or be unset: any other value was meant for something, and is refused.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

# Of dataclasses, of functions, which have no options, and of None for nothing.
Table = Mapping[str, Callable[..., Any] | None]
Group = ConfigDict | Mapping[str, Any]  # as configs and as cards have it


def make(
    group: str, table: Table, options: Group, *, key: str = "kind", **given: Any
) -> Any:
    """Returns what a group of settings describes; None if its kind is that.

    Args:
      group: where it is in the configuration, such as "model.decoder".
      options: the kind, and what its class is called with; None is unset.
      key: the option that is the kind.
      given: what the class may want of the rest of the configuration.

    Raises:
      ValueError: for an unknown kind or option, or one that the kind does not take and
        that is not at its default.
    """
    chosen, short = choose(group, table, options, key=key), _short(group)
    if chosen is None:
        return None
    options = {name: value for name, value in options.items() if value is not None}
    kind, fields = options.pop(key), _fields(chosen)
    for name in [name for name in options if name not in fields or name in given]:
        value = options.pop(name)
        _check_left_over(f"{short}.{name}", value, f"{short}.{key}", kind, table, given)
    missing = [
        name for name, default in fields.items()
        if default is dataclasses.MISSING and name not in options.keys() | given.keys()
    ]
    if missing:
        raise ValueError(
            f"{short}.{key}={kind!r} needs {', '.join(missing)}; set "
            f"config.{group}.{missing[0]}."
        )
    if not isinstance(chosen, type):
        return chosen
    given = {name: value for name, value in given.items() if name in fields}
    return chosen(**options, **given)


def choose(group: str, table: Table, options: Group, *, key: str = "kind") -> Any:
    """Returns the class that a group of settings names; ValueError if there is none."""
    kind = options.get(key)
    if kind not in table:
        raise ValueError(
            f"Unknown {_short(group)}.{key} {kind!r}. Known: "
            f"{', '.join(sorted(table))}."
        )
    return table[kind]


def known_options(table: Table) -> set[str]:
    """Returns the options of all kinds together."""
    return {name for made in table.values() if made for name in _fields(made)}


def _short(group: str) -> str:
    return group.rpartition(".")[2]


def _fields(chosen: Callable[..., Any]) -> dict[str, Any]:
    """Returns the names of a class's fields and their defaults."""
    if not dataclasses.is_dataclass(chosen):
        return {}
    return {
        field.name: field.default for field in dataclasses.fields(chosen)
        if field.name not in ("name", "parent")  # of modules
    }


def _check_left_over(
    option: str, value: Any, key: str, kind: str, table: Table, given: Mapping[str, Any]
) -> None:
    """Raises ValueError for an option that is not left over from another kind."""
    name = option.rsplit(".", 1)[1]
    if name in given:
        raise ValueError(
            f"{option}={value!r} is no option: it follows from the rest of the "
            "configuration; leave it out."
        )
    fields = {other: _fields(c) for other, c in table.items() if c is not None}
    takers = {other: taken[name] for other, taken in fields.items() if name in taken}
    if not takers:
        known = known_options(table) - set(given)
        raise ValueError(
            f"Unknown option {option}={value!r}. Known: "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    if value not in takers.values() and dataclasses.MISSING not in takers.values():
        default = next(iter(takers.values()))
        raise ValueError(
            f"{option}={value!r} is an option of {key}="
            f"{' or '.join(map(repr, sorted(takers)))}, and does nothing with "
            f"{key}={kind!r}; leave it at {default!r}."
        )
