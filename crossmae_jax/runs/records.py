"""The small JSON files of a workdir, which anybody may have cut, edited or overwritten.

    read      of what a run cannot do without: a damaged file is named, with the cure
    recalled  of what it can do without: a line says that it is damaged, and no more

Each holds one object.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from crossmae_jax import errors
from crossmae_jax.distributed import parallel
from crossmae_jax.paths import AnyPath

_MOST_LEVELS = 50  # ours have five; what walks through settings calls itself for each


class DamagedRecord(errors.SetupError):
    """A file of a workdir is not the JSON object that was written there."""


def read(path: AnyPath, *, cure: str) -> dict[str, Any]:
    """Returns the object that a file holds.

    Args:
      cure: what to do about a damaged one.

    Raises:
      DamagedRecord: if it holds none.
      FileNotFoundError: if there is no file.
    """
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise DamagedRecord(f"{path} is damaged ({error}); {cure}.") from error


def recalled(
    path: AnyPath,
    *,
    then: str,
    usable: Callable[[dict[str, Any]], bool] = lambda values: True,
) -> dict[str, Any] | None:
    """Returns the object that a file holds; None if there is no file, or no such one.

    Args:
      then: what comes of a damaged one, for the line that says so.
      usable: whether an object is one that the file can have.
    """
    try:
        values = parse(path.read_bytes())
        if not usable(values):
            raise ValueError(f"not what is written there: {str(values)[:60]}")
    except FileNotFoundError:
        return None
    except OSError as error:
        parallel.say(f"{path} cannot be read ({error.strerror}); {then}.")
        return None
    except ValueError as error:
        parallel.say(f"{path} is damaged ({error}); {then}.")
        return None
    return values


def is_number(value: Any) -> bool:
    """Says whether a value of JSON is a finite number; true and false are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def parse(text: bytes | str) -> dict[str, Any]:
    """Returns the object that a text is; raises ValueError if it is none.

    One that is nested too deeply to be walked through is none.
    """
    try:
        values = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object was expected, not {str(values)[:40]!r}")
    level, number = list(values.values()), 1
    while level := [
        inner for value in level if isinstance(value, (dict, list))
        for inner in (value.values() if isinstance(value, dict) else value)
    ]:
        number += 1
        if number > _MOST_LEVELS:
            raise ValueError(f"nested more than {_MOST_LEVELS} levels deep")
    return values
