"""What a compiled program sends between devices, read from its HLO text.

An instruction that makes devices exchange arrays is one line:

    %all-reduce.1 = (f32[64,16]{1,0}, f32[16]{0}) all-reduce(%a, %b), ...

The shapes before its name are its result, on one device. Among n devices each must send
at least

    all-reduce            2 (n - 1) / n of it
    all-gather            (n - 1) / n
    reduce-scatter        n - 1 times it: the result is a share
    all-to-all            (n - 1) / n
    collective-permute    all of it

Lines in the body of a loop count as often as the loop runs. Compilers for CPUs and GPUs
note that; those for TPUs do not, but a loop that JAX wrote counts from 0 and compares
with a constant. An exchange that runs beside other work is written as a start and a
done, and is counted by the latter.
"""

import dataclasses
import math
import re

# Of the result, what a device sends at least among n.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)")
_OPCODE = re.compile(r"\s([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_LESS = re.compile(r" compare\(.*\bdirection=LT\b")
_CONSTANT = re.compile(r" constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind in a run of a program.

    Attributes:
      num_bytes: of all results together, on one device.
      exact: False if some are in a loop of unknown length, of which one turn counts.
    """

    kind: str
    count: int
    num_bytes: int
    exact: bool = True

    def sent(self, num_devices: int) -> float:
        """Returns the bytes that one of the devices must send at least."""
        return float(_SENT[self.kind](num_devices) * self.num_bytes)


def read(text: str) -> list[Collective]:
    """Returns what a program exchanges, by kind; `text` is `compiled.as_text()`."""
    computations, entry = _computations(text)
    found = _count(entry, computations, {})
    return [Collective(kind, *found[kind]) for kind in _SENT if kind in found]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the right-hand sides of each computation, and the name of the first."""
    computations, entry, lines = {}, "", []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            lines.append(found[1])
    return computations, entry


def _count(
    name: str,
    computations: dict[str, list[str]],
    known: dict[str, dict[str, tuple[int, int, bool]]],
) -> dict[str, tuple[int, int, bool]]:
    """Returns count, bytes and exactness by kind, of a computation and what it calls.

    Args:
      known: results for computations, to which those found here are added.
    """
    if name in known:
        return known[name]
    total: dict[str, tuple[int, int, bool]] = {}

    def add(kind, count, num_bytes, exact):
        old = total.get(kind, (0, 0, True))
        total[kind] = (old[0] + count, old[1] + num_bytes, old[2] and exact)

    for line in computations.get(name, []):
        operation = _OPCODE.search(line)
        if not operation or operation[1] in ("async-update", "async-done"):
            continue  # what these belong to was counted with async-start
        kind = operation[1].removesuffix("-done")
        if kind in _SENT:
            add(kind, 1, _num_bytes(line[:operation.start()]), True)
        times, exact = 1, True
        if kind == "while":
            turns = _turns(line, computations)
            times, exact = turns or 1, turns is not None
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for other in called:
            for inner, (count, num_bytes, sure) in _count(
                other, computations, known
            ).items():
                add(inner, times * count, times * num_bytes, exact and sure)
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
