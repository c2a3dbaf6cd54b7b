"""Errors that the user can cure: their message says what to do about them.

A program that meets one ends with that message in one line. Anything else is a bug and
keeps its traceback.
"""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """What was given, what was expected, and what to do; the root of all such kinds."""


class SetupError(UserError, ValueError):
    """Settings, data and directory do not fit each other; nothing was computed."""


@contextlib.contextmanager
def setting_up() -> Iterator[None]:
    """Marks a ValueError as the user's to cure; anywhere else it is a bug."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise SetupError(str(error)) from error
