"""Compiled programs: kept on disk for the next launch, and counted in this one.

JAX compiles a program for the shapes that it is first called with, which takes minutes
for a large model. What was compiled is kept by JAX's persistent compilation cache, so
that a run that goes on, an evaluation or another seed begin at once. A program that is
compiled again and again, because one of its arguments changes, makes a run many times
slower without a word; `once` has that word.

Source: JAX documentation, "Persistent compilation cache".
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

_MOST_BYTES = 5 * 10**9  # of all programs on disk; the least recently used are removed
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
    """Makes JAX keep what it compiles, up to 5 GB, in a directory of this machine.

    What the environment says comes first: JAX_COMPILATION_CACHE_DIR (another directory,
    a bucket too), JAX_COMPILATION_CACHE_MAX_SIZE (bytes), and
    JAX_ENABLE_COMPILATION_CACHE=false. Of several processes only the first would write,
    and those on other hosts find nothing in a directory of its machine: there, nothing
    is kept unless the environment names a directory. To be called when the processes of
    a command have joined, before anything is compiled.
    """
    if jax.config.jax_compilation_cache_dir or jax.distributed.is_initialized():
        return
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # empty: not wanted
        return
    try:
        path = directory()
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: nobody's home
        return
    if writable:
        jax.config.update("jax_compilation_cache_dir", str(path))
        if jax.config.jax_compilation_cache_max_size < 0:
            jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)


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


def once(
    function: Callable, names: tuple[str, ...], record: Record,
    warn: Callable[[str], None],
) -> Callable:
    """Returns a jitted function that warns whenever it is compiled again.

    Args:
      names: of its arguments, which are trees of arrays.
      record: that listens while the function is called.
      warn: called with a line that names the arrays which are other than at first.
    """
    first: dict[str, str] = {}

    def called(*arguments):
        before = len(record.programs)
        result = function(*arguments)
        if len(record.programs) > before:
            # Of arrays that the call has used up, shape and sharding are still known.
            now = _described(dict(zip(names, arguments, strict=True)))
            if first:
                seconds = sum(each.seconds for each in record.programs[before:])
                warn(
                    f"WARNING: compiled again, {seconds:.1f} s: {_changes(first, now)}"
                )
            else:
                first.update(now)
        return result

    return called


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
