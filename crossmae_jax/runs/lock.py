"""One run at a time in a workdir.

Two would move each other's metrics away and save over each other's checkpoints, each
sure that it is the only one. So a run keeps a file `run.lock` there that says who it is
and is written anew every few seconds, and removes it when it ends.

A run that was killed leaves its file. On the same host its process is looked for; of
another host's nothing is known but that a living one would write. Clocks of hosts
differ, so what counts is whether the file changes while it is watched.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from crossmae_jax import errors, paths
from crossmae_jax.distributed import parallel
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import records

FILE = "run.lock"
EVERY_SECONDS = 10.0
PATIENCE_SECONDS = 45.0  # several times as long: a busy bucket may be late
_WRITTEN = {
    "host": str, "process": int, "started": str,
    "born": (str, type(None)), "namespace": (str, type(None)),
}


@contextlib.contextmanager
def held(directory: AnyPath) -> Iterator[None]:
    """Keeps other runs out of a workdir, which is made if it does not exist.

    Process 0 speaks for all processes of the run.

    Raises:
      SetupError: if another run is in the directory; names host, process and start.
    """
    if jax.process_index() != 0:
        yield
        return
    file, mine = directory / FILE, _this_process()
    with errors.using_files():
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        _take(file, mine)
    ended = threading.Event()
    writer = threading.Thread(target=_keep, args=(file, mine, ended), daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()
        with contextlib.suppress(OSError):  # of the disk: the next run takes over
            if _is_of(mine, _read(file)):
                file.unlink(missing_ok=True)
        if made and isinstance(directory, Path):
            with contextlib.suppress(OSError):  # not empty: the run has begun
                directory.rmdir()


def _this_process() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "host": socket.gethostname(), "process": os.getpid(),
        "started": now.isoformat(timespec="seconds"), "born": _born(os.getpid()),
        "namespace": _namespace(), "writes": 0,
    }


def _born(process: int) -> str | None:
    """Returns when a process began, as the kernel counts; None if it is not known.

    The number of a process may be another's by now: containers begin with 1.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]


def _namespace() -> str | None:
    """Returns where the number of this process counts: containers have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _take(file: AnyPath, mine: dict[str, Any]) -> None:
    """Writes the file where there is none, or only a stale one."""
    holder = _read(file)
    if holder is None and file.exists():  # being written, or its writer was killed
        time.sleep(1.0)
        holder = _read(file)
        if holder is None:
            file.unlink(missing_ok=True)
    if holder is not None:
        who = (
            f"host {holder['host']}, process {holder['process']}, since "
            f"{holder['started']}"
        )
        if _lives(file, holder, mine, who):
            raise errors.SetupError(
                f"{file.parent} is in use by another run: {who}. Two runs in one "
                "directory would write over each other's files. Wait until it ends, "
                "stop it, or give a new --workdir."
            )
        parallel.say(f"{file} was left by a run that is no more ({who}); taking over.")
        _remove(file, holder)
    if isinstance(file, Path):
        try:
            with paths.named(file), open(file, "x") as new:
                new.write(json.dumps(mine))
            return
        except FileExistsError:  # another one was faster
            return _take(file, mine)
    file.write_text(json.dumps(mine))


def _remove(file: AnyPath, stale: dict[str, Any]) -> None:
    """Removes what a dead run left, and not what another start has put there since.

    A bucket cannot rename: there, two that start at once find out when they write.
    """
    if not isinstance(file, Path):
        file.unlink(missing_ok=True)
        return
    aside = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != stale:
        with contextlib.suppress(FileExistsError):
            os.link(aside, file)
    aside.unlink()


def _lives(
    file: AnyPath, holder: dict[str, Any], mine: dict[str, Any], who: str
) -> bool:
    """Says whether the run that wrote the file is still there."""
    if (holder["host"], holder["namespace"]) == (mine["host"], mine["namespace"]):
        if mine["born"] is not None:
            return _born(holder["process"]) == holder["born"]
        try:
            os.kill(holder["process"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    parallel.say(
        f"{file} is of {who}; watching up to {PATIENCE_SECONDS:g} s whether it lives."
    )
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE_SECONDS / 4))
        now = _read(file)
        if now is None:
            return False
        if now != holder:
            return True
    return False


def _keep(file: AnyPath, mine: dict[str, Any], ended: threading.Event) -> None:
    """Shows that this run lives, until it ends or another one has taken over."""
    while not ended.wait(EVERY_SECONDS):
        # What cannot be reached for a moment is written the next time.
        with contextlib.suppress(OSError):
            holder = _read(file)
            if holder is not None and not _is_of(mine, holder):
                parallel.say(
                    f"WARNING: {file} is now of host {holder['host']}, process "
                    f"{holder['process']}: this run was taken for dead. Stop one."
                )
                return
            mine["writes"] += 1
            paths.write_whole(file, json.dumps(mine))


def _read(file: AnyPath) -> dict[str, Any] | None:
    """Returns what the file says; None if there is none, or it is not as written."""
    try:
        holder = records.read(file, cure="remove it")
    except (FileNotFoundError, records.DamagedRecord):
        return None
    known = all(isinstance(holder.get(n, ...), kind) for n, kind in _WRITTEN.items())
    return holder if known else None


def _is_of(mine: dict[str, Any], holder: dict[str, Any] | None) -> bool:
    names = ("host", "process", "started")
    return holder is not None and all(holder[name] == mine[name] for name in names)
