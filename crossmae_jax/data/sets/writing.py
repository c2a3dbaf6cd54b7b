"""What goes wrong on a disk while a set is written there, in words."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from crossmae_jax import errors


@contextlib.contextmanager
def into(directory: str | os.PathLike) -> Iterator[None]:
    """Marks the errors of writing a set as the user's to cure, and says what is free.

    ArrayRecord raises a bare RuntimeError where a disk is full, TFDS and PIL an OSError
    that names no file.

    Raises:
      FileError: for any of them.
    """
    try:
        yield
    except errors.UserError:
        raise
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # such as NotImplementedError: a bug
        text = " ".join(str(error).split()).rstrip(".")
        raise errors.FileError(f"{text}. {_room(directory)}.") from error


def _room(directory: str | os.PathLike) -> str:
    place = os.path.abspath(directory)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free / 1e9
    return (
        f"{directory} was not prepared; see that it can be written and that its disk "
        f"has room, of which {free:.2f} GB are free"
    )
