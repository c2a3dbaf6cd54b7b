"""Where the time of a compiled step goes: the most expensive kernels of a trace.

`jax.profiler` writes a trace, which TensorBoard and Perfetto show as well; here its
events are added up. On a GPU they are the kernels on the device's streams, on a TPU the
operations of its core, on a CPU the operations of the compiled program, each on the
thread that ran it: what several threads share counts once, what runs side by side
twice.

Layers are added together: numbers are taken off the compiler's names, and out of the
names of modules, which come from the compiled program (`blocks_*`). "gradient" is the
backward pass, "again" what it computes once more (config.model.remat).
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

_DEVICE_LINES = ("Stream", "XLA Ops")  # of a GPU, of a TPU
_NOT_MODULES = re.compile(r"checkpoint|remat\w*|.*\._\w+|.*<lambda>|closed_call")
# Their events last as long as those of what they run, which are in the trace as well.
_CONTAINERS = re.compile(r"(while|call|conditional)([._]\d+)*")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kind of kernel costs, all layers together.

    Attributes:
      name: as the compiler calls it, without its number.
      origin: the module and function that it comes from, empty if the trace does not
        say.
      seconds: in a step, on all devices.
      count: runs in a step.
    """

    name: str
    origin: str
    seconds: float
    count: float


def trace(one_step: Callable[[], None], directory: Path, *, num_steps: int) -> Path:
    """Runs steps under the profiler and returns the file that it wrote."""
    before = set(directory.rglob("*.xplane.pb"))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(directory, profiler_options=options):
        for _ in range(num_steps):
            one_step()
    (written,) = set(directory.rglob("*.xplane.pb")) - before
    return written


def events(path: Path) -> Iterator[tuple[str, str, float]]:
    """Yields kernel, operation of the program ("" if unknown) and seconds."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    lines = [
        line for plane in devices for line in plane.lines
        if line.name.startswith(_DEVICE_LINES)
    ]
    for line in lines or [line for plane in planes for line in plane.lines]:
        for event in line.events:
            operation = str(dict(event.stats).get("hlo_op", ""))
            is_mark = event.name.startswith("end: ")  # an end, with its own event
            if _CONTAINERS.fullmatch(operation or event.name):
                continue
            if lines or (operation and not is_mark):
                yield event.name, operation, event.duration_ns / 1e9


def origins(program: str) -> dict[str, str]:
    """Returns what the operations of a compiled program come from, by name."""
    pattern = r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata={[^}]*?op_name="([^"]*)"'
    return {
        name: _origin(path) for name, path in re.findall(pattern, program, re.MULTILINE)
    }


def _origin(path: str) -> str:
    """Shortens JAX's path of an operation to module and function."""
    when = ""
    if "transpose(" in path:
        when = "again: " if "rematted_computation" in path else "gradient: "
    # Of a path within a path, as rematerialisation makes them, the inner one.
    inner = re.split(r"jvp\(\w*\)+/", path.partition("/")[2])[-1]
    kept = [part for part in inner.split("/") if not _NOT_MODULES.fullmatch(part)]
    return when + re.sub(r"_\d+\b", "_*", "/".join(kept))


def kernels(path: Path, program: str, *, num_steps: int) -> list[Kernel]:
    """Adds up a trace; the most expensive first.

    Args:
      program: text of the compiled program that was traced.
    """
    known = origins(program)
    seconds, counts = collections.Counter(), collections.Counter()
    for name, operation, duration in events(path):
        origin = known.get(operation, "")
        key = re.sub(r"([._]\d+)+(\.clone)?$", "", name), origin
        seconds[key] += duration
        counts[key] += 1
    return [
        Kernel(*key, total / num_steps, counts[key] / num_steps)
        for key, total in seconds.most_common()
    ]


def table(timings: list[Kernel], *, most: int = 30) -> list[str]:
    """Returns the most expensive as lines of a Markdown table."""
    total = sum(kernel.seconds for kernel in timings)
    lines = [
        "| kernel | from | ms a step | share | runs a step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kernel in timings[:most]:
        lines.append(
            f"| {kernel.name} | {kernel.origin} | {kernel.seconds * 1e3:.2f} | "
            f"{kernel.seconds / total:.1%} | {kernel.count:g} |"
        )
    rest = timings[most:]
    if rest:
        left, runs = sum(k.seconds for k in rest), sum(k.count for k in rest)
        lines.append(
            f"| {len(rest)} others | | {left * 1e3:.2f} | {left / total:.1%} | "
            f"{runs:g} |"
        )
    return lines
