"""What a training step holds in memory at its fullest moment, read off its compilation.

    python -m benchmarks.held --batch=1024 --config=configs/vitb_cross.py

The step that training runs is compiled for an H200 that need not be there, and what the
compiler has placed in its memory is looked up at the moment when most of it is in use:
the beginning of the gradient pass, with all that the forward pass keeps for it. What
comes from outside is not counted: weights, moments and images. Nothing is executed.
Needs jax[cuda13].
"""

import argparse
import collections
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from crossmae_jax.distributed import hardware

if __name__ == "__main__":
    hardware.without_devices()

import jax  # noqa: E402

from benchmarks import step  # noqa: E402
from crossmae_jax.cost import estimate  # noqa: E402

_ALLOCATION = re.compile(r"^allocation \d+: size \d+, (.*)", re.M)
_VALUE = re.compile(r"^ value: <\d+ ([\w.-]+(?:\{[\d,]*\})?) @\d+> \(size=(\d+)", re.M)
_RANGE = re.compile(r"^    ([\w.-]+\{[\d,]*\}):(\d+)-(\d+)$", re.M)
_NAME = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.M)
# Kinds of arrays, by the operation that makes them; the first that is found counts.
_KINDS = {
    "gradients, computed again": r"transpose\(jvp",
    "inputs of GELU": r"fc1/dot_general$",
    "queries, keys, values": r"/(qkv|q|kv)/dot_general$|/jit\(_pad\)/pad$",
    "results of attention": r"attention_fwd$|\.attend/.*/(slice|transpose|reshape)$",
    "residual stream": (
        r"/proj/dot_general$|/fc2/dot_general$|/concatenate$|\.queries/|_tokens/|"
        r"patch_embed/|/add$"
    ),
    "contexts": r"/fusion/",
    "GELU": r"mlp\.contract/",
    "target, loss": r"jvp\(\)/|loss|decoder_pred|/target",
}
OTHER = "other"


class Held(NamedTuple):
    """An array that the program keeps in the memory for its temporaries.

    Attributes:
      origin: the operation that makes it.
      begin: the first moment at which it is there, counted in operations.
      end: the last.
    """

    name: str
    origin: str
    num_bytes: int
    begin: int
    end: int

    @property
    def kind(self) -> str:
        """What it is to the model."""
        kinds = (kind for kind, made in _KINDS.items() if re.search(made, self.origin))
        return next(kinds, OTHER)


def arrays(folder: Path) -> Iterator[Held]:
    """Yields the arrays among a program's temporaries, from what XLA wrote of it."""

    def read(suffix):
        (file,) = folder.glob(f"*step*after_optimizations{suffix}.txt")
        return file.read_text()

    origins = dict(_NAME.findall(read("")))
    ranges = {name: (int(a), int(b)) for name, a, b in _RANGE.findall(
        read("-live-range")
    )}
    assignment = read("-buffer-assignment")
    starts = [*_ALLOCATION.finditer(assignment)]
    ends = [start.start() for start in starts[1:]] + [len(assignment)]
    for start, end in zip(starts, ends, strict=True):
        if "temp" not in start[1]:
            continue
        for name, size in _VALUE.findall(assignment, start.end(), end):
            key = name if name.endswith("}") else f"{name}{{}}"
            if key in ranges:
                origin = origins.get(name.partition("{")[0], "")
                yield Held(key, origin, int(size), *ranges[key])


def fullest(held: list[Held]) -> list[Held]:
    """Returns those of the moment when their bytes are most."""
    changes = collections.Counter()
    for each in held:
        changes[each.begin] += each.num_bytes
        changes[each.end + 1] -= each.num_bytes
    now = most = moment = 0
    for when, change in sorted(changes.items()):
        now += change
        if now > most:
            most, moment = now, when
    return [each for each in held if each.begin <= moment <= each.end]


def of_step(path: str, overrides: list[str], target: str) -> list[Held]:
    """Returns what a configuration's training step holds at its fullest moment."""
    config = step.load_config(path, overrides=overrides)
    lowered = estimate.lower_step(config, hardware.target_devices(target)).step
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # it writes nothing then
    try:
        with tempfile.TemporaryDirectory() as folder:
            dumped = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            lowered.compile(compiler_options=hardware.compiler_options(target) | dumped)
            return fullest(list(arrays(Path(folder))))
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def by_kind(held: list[Held]) -> dict[str, float]:
    """Returns the gigabytes of each kind, and of "all"."""
    total = dict.fromkeys([*_KINDS, OTHER], 0.0)
    for each in held:
        total[each.kind] += each.num_bytes / 1e9
    return total | {"all": sum(total.values())}


def main(argv: list[str] | None = None) -> None:
    """Prints a table with a column for each configuration on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.held", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE")
    parser.add_argument("--batch", type=int, required=True, help="global batch size")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--target", default="h200", help="as of estimate (h200)")
    parser.add_argument("--most", type=int, default=0, help="arrays to name (0)")
    args = parser.parse_args(argv)
    overrides = [f"data.batch_size={args.batch}", *args.override]
    what = f"batch {args.batch}: compiled for {args.target}, not run"
    print(step.conditions(args.override, what), flush=True)
    found = {Path(path).stem: of_step(path, overrides, args.target)
             for path in args.config}
    print(step.row(["GB", *found]), step.row(["---"] * (1 + len(found))), sep="\n")
    columns = [by_kind(held) for held in found.values()]
    for kind in columns[0]:
        print(step.row([kind, *(f"{column[kind]:.2f}" for column in columns)]))
    if not args.most:
        return
    for name, held in found.items():
        print(f"\n{name}:")
        for each in sorted(held, key=lambda x: -x.num_bytes)[:args.most]:
            print(f"{each.num_bytes / 1e9:8.3f}  {each.kind:22}  {each.origin}")


if __name__ == "__main__":
    main()
