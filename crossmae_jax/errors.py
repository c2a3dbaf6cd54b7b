"""Errors that the user can cure: their message says what to do about them.

A program that meets one ends with that message in one line. Anything else is a bug and
keeps its traceback.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

# Kinds of OSError that are about a path even if they name none.
_OF_PATHS = (
    FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError
)


class UserError(Exception):
    """What was given, what was expected, and what to do; the root of all such kinds."""


class SetupError(UserError, ValueError):
    """Settings, data and directory do not fit each other; nothing was computed."""


class FileError(UserError, OSError):
    """A file or directory that the user named cannot be read or written."""


class MissingPackage(UserError, ImportError):
    """A package that only some users need is not installed; the message has how to."""


@contextlib.contextmanager
def setting_up() -> Iterator[None]:
    """Marks a ValueError as the user's to cure; anywhere else it is a bug.

    Likewise errors of files, as `using_files` does: what is opened while a program is
    set up is what the user has named.
    """
    try:
        with using_files():
            yield
    except UserError:
        raise
    except ValueError as error:
        raise SetupError(str(error)) from error


@contextlib.contextmanager
def using_files(advice: str = "") -> Iterator[None]:
    """Marks an OSError about a path as the user's to cure.

    For where the paths are the user's. An OSError that names no path, such as one of a
    socket, stays what it is.

    Args:
      advice: what to do, in a sentence, where the error itself does not tell.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.filename is None and not isinstance(error, _OF_PATHS):
            raise
        advice = advice and f". {advice}"
        raise FileError(f"{error}{advice}") from error


@contextlib.contextmanager
def naming(what: Any) -> Iterator[None]:
    """Says in the errors that the user can cure which file's they are."""
    try:
        yield
    except UserError as error:
        raise SetupError(f"{what}: {error}") from error
