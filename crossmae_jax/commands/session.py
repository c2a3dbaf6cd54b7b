"""How a command starts and ends: its processes join, and its errors are a line.

    what the user can cure      `error: ...` and an exit status; see `errors.UserError`
    anything else               a bug, which keeps its traceback
"""

import asyncio
import contextlib
import faulthandler
import functools
import logging as stdlib_logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn
from pathlib import Path
from typing import Any

from absl import logging

from crossmae_jax import errors

Main = Callable[[Sequence[str]], int | None]
# Files of Orbax that log an error of a save, and raise it.
_RAISING = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")


def command(*, error_status: int = 1) -> Callable[[Main], Main]:
    """Makes a command's `main` end in one line at an error that the user can cure.

    Args:
      error_status: the exit status then.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def ending_in_a_line(argv: Sequence[str]) -> int:
            try:
                status = main(argv) or 0
            except errors.UserError as error:
                print(f"error: {error}", file=sys.stderr)
                status = error_status
            return status

        return ending_in_a_line

    return decorate


def end(main: Main, argv: Sequence[str]) -> NoReturn:
    """Ends this process with what a command returns, or exits with.

    Threads of the loader that read and that nothing can end do not keep it: Python
    itself would wait for them, as long as a disk does not answer.
    """
    try:
        status = main(argv)
    except SystemExit as stopping:
        status = stopping.code
    except BaseException:  # a bug, or a second Ctrl-C
        if not _threads_left():
            raise
        traceback.print_exc()
        status = 1
    if not _threads_left():
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _threads_left() -> bool:
    # What was never imported has left nothing.
    batches = sys.modules.get("crossmae_jax.data.batches")
    return batches is not None and batches.any_left_behind()


def _is_news(record: stdlib_logging.LogRecord) -> bool:
    """Says whether a line of a log is more than the traceback of what comes anyway.

    Of an error in a save there is one for each thread of Orbax that it passes, and one
    for each tensor of which nobody asks any more, before it is raised.
    """
    if record.exc_info is None:
        return True
    if record.name != "asyncio":
        parts = Path(record.pathname).parts
        return not ("orbax" in parts and parts[-1] in _RAISING)
    return not any(
        "orbax" in Path(frame.f_code.co_filename).parts
        for frame, _ in traceback.walk_tb(record.exc_info[2])
    )


def _unraisable(previous: Callable, unraisable: Any) -> None:
    """Passes on what an error made in a place from which it cannot be raised.

    But for writes of a save that has failed already: tensorstore tells of each, and
    nobody is left who would listen.
    """
    for frame, _ in traceback.walk_tb(unraisable.exc_traceback):
        if frame.f_code is asyncio.BaseEventLoop._check_closed.__code__:
            return
    previous(unraisable)


@contextlib.contextmanager
def joined(
    heartbeat_seconds: int = 100, *, agree_to_stop: bool = True
) -> Iterator[None]:
    """Connects this process with the others of its command, if it has others.

    To be entered before JAX is used. Arguments are those of `cluster.join`.
    """
    # Commands are imported by loader workers, too, which must not import JAX.
    from crossmae_jax.distributed import cluster, programs

    # Libraries report every file they open; a run's own first line says how it starts.
    logging.set_verbosity(logging.WARNING)
    for logger in (logging.get_absl_logger(), stdlib_logging.getLogger("asyncio")):
        logger.addFilter(_is_news)
    if getattr(sys.unraisablehook, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    if sys.__stderr__ and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)  # a crash in compiled code says where
    with cluster.leaving(heartbeat_seconds):
        try:
            cluster.join(
                heartbeat_seconds=heartbeat_seconds, agree_to_stop=agree_to_stop
            )
            programs.keep()
            yield
        except errors.UserError as error:
            # A text, and no number: numbers are what all processes agreed to end with.
            sys.exit(f"error: {error}")
