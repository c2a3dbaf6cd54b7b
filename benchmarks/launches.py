"""What a GPU is asked to do in a training step, read off the compiled program.

    python -m benchmarks.launches --batch=256 --config=configs/vitb_cross.py

The step that training runs is compiled for an H200 that need not be there, and its
kernels are counted: matrix products, attention, and everything between them, which on a
GPU is bound by the bytes that it moves. Nothing is executed and no time is known; but
what launches fewer kernels and moves fewer bytes is there to be seen.

Bytes are those of a kernel's operands, of which only the slices that it takes count,
and of its results. Without a device XLA tunes nothing, and its own matrix kernels are
off (`hardware.compiler_options`): products are cuBLAS's here, where on a GPU some may
be fused with what follows. Needs jax[cuda13].
"""

import argparse
import collections
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from crossmae_jax.distributed import hardware

if __name__ == "__main__":
    hardware.without_devices()

from benchmarks import profiling, step  # noqa: E402
from crossmae_jax.cost import estimate  # noqa: E402

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", re.M | re.S)
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = (\([^=]*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)$", re.M
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_NO_KERNEL = re.compile(
    r"parameter|constant|get-tuple-element|tuple|bitcast|after-all|\w+-id|.*-done"
)
# What moves numbers and computes none.
_MOVES = {
    "parameter", "constant", "tuple", "bitcast", "reshape", "copy", "transpose",
    "slice", "concatenate", "broadcast", "dynamic-slice", "pad",
}
# What may use a part of its first operand, or hands a part on.
_PARTS = ("slice", "dynamic-slice", "gather", "bitcast", "convert")


class Kernel(NamedTuple):
    """A kernel that a program launches.

    Attributes:
      kind: "product", "attention", "copy" or "convert", which do nothing else, "pad",
        which may, or "other".
      origin: the module and function that it comes from, as in benchmarks/profiling.py.
      inputs: element types of what it takes, such as "bf16".
    """

    name: str
    kind: str
    origin: str
    inputs: frozenset[str]
    num_bytes: int


def _size(types: str) -> int:
    """Returns how many numbers are in an array, or in all of a tuple."""
    return sum(
        math.prod(int(side) for side in sides.split(",") if side)
        for _, sides in _ARRAY.findall(types)
    )


def _num_bytes(types: str) -> int:
    """Returns the bytes of an array, or of all in a tuple."""
    return sum(
        _size(f"{kind}[{sides}]")
        * (1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8)
        for kind, sides in _ARRAY.findall(types)
    )


def _kind(rest: str, opcodes: set[str]) -> str:
    """Returns the kind of a kernel from what is fused in it, or from itself."""
    if "__cublas" in rest or "dot" in opcodes:
        return "product"
    if "__cudnn$fmha" in rest or "__gpu$xla.gpu.triton" in rest:
        return "attention"
    if "pad" in opcodes:
        return "pad"
    if opcodes <= _MOVES:
        return "copy"
    return "convert" if opcodes <= {*_MOVES, "convert"} else "other"


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str

    @property
    def called(self) -> str:
        """The computation that it runs, "" if there is none."""
        match = re.search(r"(?:calls|to_apply|body)=%?([\w.-]+)", self.rest)
        return match[1] if match else ""

    @property
    def times(self) -> int:
        """How often a loop runs it."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(match[1]) if match else 1


def _parse(program: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the instructions of each computation, and the name of the first one."""
    program = re.sub(r"/\*.*?\*/", "", program)  # comments, within long tuples
    blocks, entry = {}, ""
    for first, block, text in _COMPUTATION.findall(program):
        entry = block if first else entry
        blocks[block] = [
            _Instruction(
                name, kind, opcode, re.findall(r"%([\w.-]+)", operands) or
                operands.split(), rest,
            )
            for name, kind, opcode, operands, rest in _INSTRUCTION.findall(text)
        ]
    return blocks, entry


def _read(block: list[_Instruction], number: int) -> int:
    """Returns the bytes of an operand that a fused computation reads."""

    def used(each):
        """Returns how many numbers of an array are used."""
        users = [user for user in block if each.name in user.operands]
        if not users or any(
            user.opcode not in _PARTS or user.operands[0] != each.name for user in users
        ):
            return _size(each.type)
        return min(sum(map(used, users)), _size(each.type))

    (operand,) = (
        each for each in block
        if each.opcode == "parameter" and each.operands == [str(number)]
    )
    size = _size(operand.type)
    return _num_bytes(operand.type) * used(operand) // size if size else 0


def kernels(program: str) -> Iterator[Kernel]:
    """Yields the kernels that a program launches, those of a loop each time."""
    blocks, entry = _parse(program)
    origins = profiling.origins(program)

    def walk(block: str) -> Iterator[Kernel]:
        types = {each.name: each.type for each in blocks[block]}
        for each in blocks[block]:
            if each.opcode in ("call", "while") or each.opcode.endswith("-start"):
                for _ in range(each.times):
                    yield from walk(each.called) if each.called else ()
                continue
            if _NO_KERNEL.fullmatch(each.opcode):
                continue
            fused = blocks[each.called] if each.opcode == "fusion" else [each]
            # A product's work space is the last of its results.
            made = re.sub(r", s8\[\d+\]\{0\}\)$", ")", each.type)
            taken = [types[operand] for operand in dict.fromkeys(each.operands)]
            read = map(_num_bytes, taken)
            if each.opcode == "fusion":
                read = (_read(fused, number) for number in range(len(each.operands)))
            yield Kernel(
                each.name, _kind(each.rest, {x.opcode for x in fused}),
                origins.get(each.name, ""),
                frozenset(kind for text in taken for kind, _ in _ARRAY.findall(text)),
                _num_bytes(made) + sum(read),
            )

    yield from walk(entry)


HEAD = [
    "config", "kernels", "products", "of float32", "attention", "between them",
    "GB moved there", "copies", "converts", "pads", "of norms",
]


def cells(name: str, found: list[Kernel]) -> list[str]:
    """Returns a line of the table: numbers of kernels, and GB that they move."""

    def told(chosen):
        total = sum(kernel.num_bytes for kernel in chosen)
        return f"{len(chosen)}, {total / 1e9:.2f} GB"

    kinds = collections.defaultdict(list)
    for kernel in found:
        kinds[kernel.kind].append(kernel)
    products, attention = kinds["product"], kinds["attention"]
    between = [k for k in found if k.kind not in ("product", "attention")]
    return [
        name, str(len(found)), str(len(products)),
        str(sum(bool(k.inputs & {"f32"}) for k in products)), str(len(attention)),
        str(len(between)), f"{sum(k.num_bytes for k in between) / 1e9:.1f}",
        *(told(kinds[kind]) for kind in ("copy", "convert", "pad")),
        told([k for k in between if re.search(r"norm[\w*]*(/|$)", k.origin)]),
    ]


def largest(found: list[Kernel], *, most: int) -> list[str]:
    """Returns what moves most between the products, all layers together, as a table."""
    moved, counts = collections.Counter(), collections.Counter()
    for kernel in found:
        if kernel.kind not in ("product", "attention"):
            key = re.sub(r"([._]\d+)+$", "", kernel.name), kernel.kind, kernel.origin
            moved[key] += kernel.num_bytes
            counts[key] += 1
    head = ["kernel", "kind", "from", "GB a step", "runs a step"]
    return [step.row(head), step.row(["---"] * len(head))] + [
        step.row([*key, f"{total / 1e9:.2f}", str(counts[key])])
        for key, total in moved.most_common(most)
    ]


def compiled(path: str, overrides: list[str], target: str) -> str:
    """Returns the text of a configuration's training step, compiled for a target."""
    config = step.load_config(path, overrides=overrides)
    lowered = estimate.lower_step(config, hardware.target_devices(target)).step
    options = hardware.compiler_options(target)
    return lowered.compile(compiler_options=options or None).as_text()


def main(argv: list[str] | None = None) -> None:
    """Prints the tables of the configurations named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE")
    parser.add_argument("--batch", type=int, required=True, help="global batch size")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--target", default="h200", help="as of estimate (h200)")
    parser.add_argument("--most", type=int, default=15, help="kernels to name (15)")
    args = parser.parse_args(argv)
    overrides = [f"data.batch_size={args.batch}", *args.override]
    what = f"batch {args.batch}: compiled for {args.target}, not run"
    print(step.conditions(args.override, what), flush=True)
    for path in args.config:
        found = list(kernels(compiled(path, overrides, args.target)))
        print(step.row(HEAD), step.row(["---"] * len(HEAD)), sep="\n")
        print(step.row(cells(Path(path).stem, found)) + "\n")
        print("\n".join(largest(found, most=args.most)) + "\n", flush=True)


if __name__ == "__main__":
    main()
