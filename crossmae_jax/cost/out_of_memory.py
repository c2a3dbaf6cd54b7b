"""What to do when memory runs out: what a step needs, and what would need less.

The needs are read off the compiled step, see `estimate`: which part of a program asked
for the last bytes says little about which setting would have saved them.
"""

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from crossmae_jax import errors
from crossmae_jax.cost import estimate, estimate_text, fitting
from crossmae_jax.distributed import hardware, parallel

_TESTS = 2  # settings that are compiled to see whether they fit


class OutOfMemory(errors.UserError, MemoryError):
    """The memory of a device, or of the host, is not enough."""


@dataclasses.dataclass
class Advice:
    """What is advised about, which may be known better while the run begins."""

    config: ConfigDict


@contextlib.contextmanager
def advising(
    config: ConfigDict, *, alive: Callable[[], None] = lambda: None
) -> Iterator[Advice]:
    """Says of a run whose memory ends what it needs, and how it needs less.

    Args:
      alive: called before each compilation, which takes its time.

    Raises:
      OutOfMemory: in place of what Python or XLA raise when memory runs out.
    """
    about = Advice(config)
    try:
        yield about
    except OutOfMemory:
        raise
    except MemoryError as error:
        raise OutOfMemory(
            f"Out of memory on this host{_said(error)}. {_host()}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        # The status is part of the text.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # What failed holds arrays, and compiling for a GPU tries kernels out on it.
        traceback.clear_frames(error.__traceback__)
        parallel.say(f"Out of memory{_said(error)}")  # lest nobody come to know it
        raise OutOfMemory(
            f"Out of memory{_said(error)}\n{advice(about.config, alive)}"
        ) from error


def _said(error: BaseException) -> str:
    """Returns the first line of an error, after a colon, if it has one."""
    return f": {text.splitlines()[0]}" if (text := str(error).strip()) else ""


def _host() -> str:
    return (
        f"It has {hardware.host_memory() / 1e9:.1f} GB. Each loader process takes some "
        "200 MB, and batches wait in memory: lower config.data.workers, or "
        "config.data.batch_size, which is another training."
    )


def advice(config: ConfigDict, alive: Callable[[], None]) -> str:
    """Returns what the step of a configuration needs on these devices, and what less.

    Compiles the step, and some settings that should do; of several processes, which do
    not all come here, nothing is compiled.
    """
    if jax.process_count() > 1:
        return (
            "What needs less is compiled by python -m crossmae_jax estimate, on one "
            "machine; see its --target."
        )
    parallel.say("Compiling settings that may fit ...")
    try:
        alive()
        found = estimate.estimate(config, "this")
        verdict = f"Does the step fit? {estimate_text.verdict(found)}."
        if found.fits != "no":
            return (
                f"{verdict} So something else takes the memory: an evaluation, or "
                "another process on this device."
            )
        suggestions = fitting.suggest(
            config, found, num_tests=_TESTS, alive=alive
        )
    except (jax.errors.JaxRuntimeError, MemoryError, errors.UserError) as error:
        return f"What may fit could not be compiled{_said(error)}"
    return f"{verdict}\n{estimate_text.told(suggestions)}"
