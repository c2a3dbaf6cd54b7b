"""What a compiled program sends between devices, read from its HLO text.

An instruction that makes devices exchange arrays is one line:

    %all-reduce.1 = (f32[64,16]{1,0}, f32[16]{0}) all-reduce(%a, %b), ...

The shapes before its name are its result, on one device. Among a group of n devices,
which the line names as `replica_groups`, each must send at least

    all-reduce            2 (n - 1) / n of it
    all-gather            (n - 1) / n
    reduce-scatter        n - 1 times it: the result is a share
    all-to-all            (n - 1) / n
    collective-permute    all of it

Lines in the body of a loop count as often as the loop runs. Compilers for CPUs and GPUs
note that; those for TPUs do not, but a loop that JAX wrote counts from 0 and compares
with a constant. An exchange that runs beside other work is written as a start and a
done, and is counted by the latter; or a TPU's compiler fuses it with that work, once in
each such fusion, under one `channel_id`. (Elsewhere different exchanges may share one.)
What it calls `all-reduce-scatter` is a reduce-scatter.
"""

import dataclasses
import math
import re
from typing import NamedTuple

# Of the result, what a device sends at least among n.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r"\s([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SCATTER = re.compile(r"\bcalls=%?all-reduce-scatter[\w.\-]*")
_STARTED = re.compile(r"-done\(%?([\w.\-]+)")
# Groups as lists, as the shape of an array of devices, and as axes of a mesh.
_LISTED = re.compile(r"\breplica_groups=\{\{([\d,]+)\}")
_SHAPED = re.compile(r"\breplica_groups=\[\d+,(\d+)\]")
_MESHED = re.compile(r"\breplica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")  # a part of it: (after)size
_LESS = re.compile(r" compare\(.*\bdirection=LT\b")
_CONSTANT = re.compile(r" constant\((\d+)\)")


class _Total(NamedTuple):
    count: int
    num_bytes: int
    sent: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind in a run of a program.

    Attributes:
      num_bytes: of all results together, on one device.
      sent: bytes that a device must send at least.
      exact: False if some are in a loop of unknown length, of which one turn counts.
    """

    kind: str
    count: int
    num_bytes: int
    sent: float
    exact: bool = True


def read(text: str, num_devices: int) -> list[Collective]:
    """Returns what a program exchanges, by kind.

    Args:
      text: `compiled.as_text()`.
      num_devices: that the program runs on.
    """
    computations, entry = _computations(text)
    totals = _count(entry, computations, num_devices, {})
    return [Collective(kind, *totals[kind]) for kind in _SENT if kind in totals]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the right-hand sides of each computation, and the name of the first.

    Of the lines that are one exchange only the first stays; a done gets what its start
    says of the groups.
    """
    computations, entry, lines, channels, groups = {}, "", [], set(), {}
    fused = False
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
            fused = "fusion" in match[2] or "fused" in match[2]
        elif match := _INSTRUCTION.match(line):
            name, right = match.groups()
            operation = _OPCODE.search(right)
            if fused and operation and operation[1] in _SENT:
                channel = _CHANNEL.search(right)
                if channel and channel[1] in channels:
                    continue
                channels.add(channel and channel[1])
            elif operation and operation[1].endswith("-start"):
                groups[name] = right.partition("replica_groups=")[2]
            elif started := _STARTED.search(right):
                right += f" replica_groups={groups.get(started[1], '')}"
            lines.append(right)
    return computations, entry


def _group_size(line: str, num_devices: int) -> int:
    """Returns among how many devices a line exchanges: all, if it does not say."""
    if listed := _LISTED.search(line):
        return len(listed[1].split(","))
    if shaped := _SHAPED.search(line):
        return int(shaped[1])
    if meshed := _MESHED.search(line):
        sizes = dict(_MESH_AXIS.findall(meshed[1]))
        axes = _GROUP_AXIS.findall(meshed[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return num_devices


def _count(
    name: str,
    computations: dict[str, list[str]],
    num_devices: int,
    known: dict[str, dict[str, _Total]],
) -> dict[str, _Total]:
    """Returns what a computation and those that it calls exchange, by kind.

    Args:
      known: results for computations, to which those found here are added.
    """
    if name in known:
        return known[name]
    total: dict[str, _Total] = {}

    def add(kind, new):
        old = total.get(kind, _Total(0, 0, 0.0, True))
        total[kind] = _Total(
            old.count + new.count, old.num_bytes + new.num_bytes, old.sent + new.sent,
            old.exact and new.exact,
        )

    for line in computations.get(name, []):
        operation = _OPCODE.search(line)
        if not operation or operation[1] in ("async-update", "async-done"):
            continue  # what these belong to was counted with async-start
        kind, exchange = operation[1].removesuffix("-done"), line
        if scatter := _SCATTER.search(line):
            kind = "reduce-scatter"
            body = computations.get(scatter[0].partition("=")[2].lstrip("%"), [])
            exchange = next((inner for inner in body if " all-reduce(" in inner), line)
        size = _group_size(exchange, num_devices)
        if kind in _SENT and size > 1:
            num_bytes = _num_bytes(line[:operation.start()])
            sent = float(_SENT[kind](size) * num_bytes)
            add(kind, _Total(1, num_bytes, sent, True))
        if kind in _SENT:
            continue
        times, exact = 1, True
        if kind == "while":
            turns = _turns(line, computations)
            times, exact = turns or 1, turns is not None
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for other in called:
            inner = _count(other, computations, num_devices, known)
            for inner_kind, part in inner.items():
                add(inner_kind, _Total(
                    times * part.count, times * part.num_bytes, times * part.sent,
                    exact and part.exact,
                ))
    known[name] = total
    return total


def _turns(loop: str, computations: dict[str, list[str]]) -> int | None:
    """Returns how often a loop runs, None if its text does not tell."""
    if noted := _TRIPS.search(loop):
        return int(noted[1])
    lines = "\n".join(computations.get(_CONDITION.search(loop)[1], []))
    compared, constants = _LESS.findall(lines), _CONSTANT.findall(lines)
    return int(constants[0]) if len(compared) == len(constants) == 1 else None


def _num_bytes(shapes: str) -> int:
    """Returns the bytes of arrays written `f32[64,16]{1,0}`, alone or in a tuple."""
    total = 0
    for kind, bits, sides in _ARRAY.findall(shapes):
        bits = 8 if kind == "pred" else int(bits)
        count = math.prod(map(int, filter(None, sides.split(","))))
        total += math.ceil(bits * count / 8)
    return total
