"""Compiled programs: kept on disk for the next launch, and counted in this one.

JAX compiles a program for the shapes that it is first called with, which takes minutes
for a large model. What was compiled is kept by JAX's persistent compilation cache, so
that a run that goes on and an evaluation begin at once. (The step of another seed is
another program: its key is a constant in it.) A program that is compiled again and
again, because one of its arguments changes, makes a run many times slower without a
word; `Once` has that word.

Source: JAX documentation, "Persistent compilation cache".
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax

_MOST_BYTES = 5 * 10**9  # of all programs on disk; the least recently used are removed
_LOCK_SECONDS = 10.0  # JAX's own patience with it
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FROM_DISK = "/jax/compilation_cache/cache_hits"
_SHARED = (
    "JAX_COMPILATION_CACHE_DIR=DIR, a directory that all hosts share, keeps what they "
    "compile"
)


def directory() -> Path:
    """Returns where programs are kept unless JAX_COMPILATION_CACHE_DIR says otherwise.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "crossmae_jax" / "programs"


def keep() -> None:
    """Makes JAX keep what it compiles, up to 5 GB, under the user's ~/.cache.

    What the environment says comes first: JAX_COMPILATION_CACHE_DIR (another directory,
    a bucket too), JAX_COMPILATION_CACHE_MAX_SIZE (bytes), and
    JAX_ENABLE_COMPILATION_CACHE=false. Of several processes only the first would write,
    and those on other hosts may not see its files: there, nothing is kept unless the
    environment names a directory. What a kill has cut short is removed.

    To be called when the processes of a command have joined, before anything is
    compiled.
    """
    if jax.config.jax_compilation_cache_dir or jax.distributed.is_initialized():
        return
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # empty: not wanted
        return
    try:
        path = directory()
        path.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path)
    except (OSError, RuntimeError):  # RuntimeError: nobody's home
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)


def _remove_unfinished(path: Path) -> None:
    """Removes programs that were not written to their end.

    JAX writes a program and then the time of its last use, under this lock. A program
    without a time is one that was cut short, and JAX keeps none any more as long as it
    lies there.
    """
    with filelock.FileLock(path / ".lockfile", timeout=_LOCK_SECONDS):
        for program in path.glob("*-cache"):
            name = program.name.removesuffix("-cache")
            if not program.with_name(f"{name}-atime").exists():
                program.unlink()


def _kept_in() -> str:
    """Returns the directory that JAX keeps programs in, "" if it keeps none."""
    if not jax.config.jax_enable_compilation_cache:
        return ""
    return jax.config.jax_compilation_cache_dir or ""


class Program(NamedTuple):
    """A program that was compiled, or found on disk."""

    name: str
    seconds: float
    from_disk: bool


class Record:
    """The programs that one thread got from the compiler, as it got them."""

    def __init__(self):
        self.programs: list[Program] = []
        self._thread = threading.get_ident()
        self._from_disk = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["Record"]:
        """Takes note of programs until the end of the block."""
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._lasted)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_listener(self._event)
            jax.monitoring.unregister_event_duration_listener(self._lasted)

    def told(self, since: int = 0) -> str:
        """Returns what it took to get the programs since a number of them, in words."""
        programs = self.programs[since:]
        found = sum(each.seconds for each in programs if each.from_disk)
        compiled = sum(each.seconds for each in programs if not each.from_disk)
        where, parts = _kept_in(), []
        if any(not each.from_disk for each in programs):
            parts.append(f"{compiled:.1f} s to compile, {self._kept(programs, where)}")
        if any(each.from_disk for each in programs):
            parts.append(f"{found:.1f} s to read what is compiled from {where}")
        return "; ".join(parts)

    def _kept(self, programs: list[Program], where: str) -> str:
        """Returns whether the next launch will find what was compiled."""
        if not where:
            several = jax.process_count() > 1
            return f"not kept ({_SHARED})" if several else "not kept"
        longest = max(each.seconds for each in programs if not each.from_disk)
        least = jax.config.jax_persistent_cache_min_compile_time_secs
        return f"kept in {where}" if longest >= least else "too short to be kept"

    def _event(self, event: str, **_: Any) -> None:
        if event == _FROM_DISK and threading.get_ident() == self._thread:
            self._from_disk = True

    def _lasted(self, event: str, seconds: float, **about: Any) -> None:
        if event == _COMPILED and threading.get_ident() == self._thread:
            name = str(about.get("fun_name", ""))
            self.programs.append(Program(name, seconds, self._from_disk))
            self._from_disk = False


class Once:
    """A jitted function that warns whenever it is compiled again.

    Args:
      names: of its arguments, which are trees of arrays.
      record: that listens while the function is called.
      warn: called with a line that names the arrays which are other than at first.
    """

    def __init__(
        self, function: Callable, names: tuple[str, ...], record: Record,
        warn: Callable[[str], None],
    ):
        self._function, self._names = function, names
        self._record, self._warn = record, warn
        self._first: dict[str, str] = {}
        self._first_told = ""

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        before = len(self._record.programs)
        result = self._function(*arguments)
        if len(self._record.programs) > before:
            # Of arrays that the call has used up, shape and sharding are still known.
            now = _described(dict(zip(self._names, arguments, strict=True)))
            told = self._record.told(before)
            if self._first:
                self._warn(
                    f"WARNING: compiled again, {told}: {_changes(self._first, now)}"
                )
            else:
                self._first, self._first_told = now, told
        return result

    def told(self) -> str:
        """Returns what it took to get the program, in words; "" before there is one."""
        return self._first_told


def _described(arguments: dict[str, Any]) -> dict[str, str]:
    """Returns what a program is compiled for, of each array by its name."""
    described = {}
    for path, x in jax.tree_util.tree_leaves_with_path(arguments):
        (argument, *inner) = path
        name = argument.key + jax.tree_util.keystr(tuple(inner))
        shape = ",".join(map(str, getattr(x, "shape", ())))
        weak = " weak" if getattr(x, "weak_type", False) else ""
        where = getattr(x, "sharding", "not on a device")
        described[name] = f"{getattr(x, 'dtype', type(x).__name__)}[{shape}]{weak}"
        described[f"{name} lies"] = str(where)
    return described


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """Returns the first arrays that are other than before, in words."""
    changed = [
        f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in [*now, *(before.keys() - now.keys())]
        if before.get(name) != now.get(name)
    ]
    if not changed:
        return "no argument has changed; a setting of JAX may have"
    more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more
