"""Measures everything that needs a GPU, in one command.

    python -m benchmarks.gpu --reference=REFERENCE --write

1. `ceiling`        copies and bf16 matrix products: what the device can do
2. `attention`      every implementation: how far from float32, its time, at our shapes
3. `steps`          training steps of MAE, CrossMAE and PR-MIM
4. `profile`        where the time of a step goes, by kind of kernel
5. `peer`           our step beside the PyTorch reference's (benchmarks/peer.py)
6. `remat`          the same step with rematerialisation "none" and "selective"
7. `compiled_peer`  our step beside the reference's through torch.compile
8. `large`          larger batches and larger models, each alone

A row is printed, and with `--write` appended to results/gpu.md, as soon as it is known,
the most important first: what was measured stays, whatever ends the command. `--only`
runs some of the parts, `--case` some of the rows of those that train, and
`--attention-case` some shapes of attention. A training step has a process of its own
(benchmarks/turns.py), so one that runs out of memory leaves the others alone, and
PyTorch finds the memory that JAX does not use. When a step is ready to be timed, the
standard error output says so.

`--quick` runs all of it on tiny sizes, on a CPU as well: its numbers mean nothing.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before JAX looks for devices: the others need memory, too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402

from benchmarks import attention_times, kernels, peer, step, turns  # noqa: E402
from crossmae_jax.commands import flags  # noqa: E402
from crossmae_jax.cost import counting  # noqa: E402
from crossmae_jax.distributed import environment  # noqa: E402
from tests import attention_cases  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "gpu.md"
PACKAGES = ("jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "tokamax")
TRACES = Path("runs/profile")
PROFILED = ("vitb_cross", "vitb_mae")
PEER_CONFIGS = ("vitb_cross", "vitb_mae", "vitb_cross75")
ATTENTION = {
    case.name: case for case in attention_cases.CASES + attention_cases.SMALL
}

TINY = (
    "model.encoder.size=W16-D1-H2/16", "model.decoder.dim=16", "model.decoder.depth=1",
    "model.decoder.num_heads=2", "data.image_size=(64, 64)",
)


class Row(NamedTuple):
    """A training step to measure: a configuration, its batch in units of `--batch`."""

    config: str
    scale: float = 1.0
    overrides: tuple[str, ...] = ()


# Rows of a group are in memory together, each takes turns with the first; ratios are
# to that.
STEPS = ((
    Row("vitb_mae"), Row("vitb_cross"), Row("vitb_mae_prmim"), Row("vitb_cross75"),
),)
REMAT = tuple(
    tuple(Row(name, 1.0, (f"model.remat={kind}",)) for kind in ("none", "selective"))
    for name in ("vitb_cross", "vitb_mae")
)
LARGE = (
    (Row("vitb_cross", 4.0),), (Row("vitb_mae", 4.0),), (Row("vitb_cross75", 4.0),),
    (Row("vitl_cross"),), (Row("vith_cross", 0.5),),
)

HEAD = [
    "config", "batch", "images/s", "step, ms: median (min..max)", "TFLOP/s",
    "of the measured ceiling", "peak memory, GiB", "compile, s", "step / first",
    "GFLOPs / first",
]


def _path(name: str) -> str:
    return f"configs/{name}.py"


def overrides_of(row: Row, args: argparse.Namespace) -> list[str]:
    """Returns what a row changes in its configuration."""
    batch = max(int(args.batch * row.scale), 1) if not args.quick else args.batch
    return [
        f"data.batch_size={batch}", *row.overrides, *(TINY if args.quick else ())
    ]


def cells(
    row: Row, player: turns.Player, first: turns.Player, *, args, tflops: float | None
) -> list[str]:
    """Returns a line of the table of steps: what was measured, or why it was not."""
    overrides = overrides_of(row, args)
    config = step.load_config(_path(row.config), overrides=overrides)
    name = " ".join([row.config, *row.overrides])
    batch = config.data.batch_size
    if player.fallen:
        return [name, str(batch), player.fallen.replace("|", "/"), *[""] * 7]
    median = statistics.median(player.seconds)
    flops = counting.count(config).train_flops
    done = flops * batch / median / 1e12 / jax.device_count()
    low, high = min(player.seconds) * 1e3, max(player.seconds) * 1e3
    compared = ["", ""]
    if player is not first and not first.fallen:
        compared = [f"{turns.ratio(player.seconds, first.seconds):.3f}"]
        base = step.load_config(first.name, overrides=overrides)
        compared.append(f"{flops / counting.count(base).train_flops:.3f}")
    return [
        name, str(batch), f"{batch / median:.1f}",
        f"{median * 1e3:.1f} ({low:.1f}..{high:.1f})", f"{done:.3g}",
        f"{done / tflops:.1%}" if tflops else "unknown",
        f"{player.peak_bytes / 2**30:.2f}",
        f"{player.facts['compile_seconds']:.1f}", *compared,
    ]


def steps(groups: tuple[tuple[Row, ...], ...], args) -> Iterator[str]:
    """Yields the lines of a table of training steps, group by group."""
    tflops = None
    if jax.default_backend() != "cpu":
        tflops = kernels.matmul_tflops(8192, 8192, 8192)
        yield f"Ceiling: {tflops:.1f} TFLOP/s in bf16, 8192 x 8192 x 8192.\n"
    yield step.row(HEAD)
    yield step.row(["---"] * len(HEAD))
    for group in groups:
        with contextlib.ExitStack() as stack:
            players = {
                stack.enter_context(turns.our_player(
                    _path(row.config), _path(row.config), overrides_of(row, args)
                )): row
                for row in group
                if args.case in " ".join([row.config, *row.overrides])
            }
            first = next(iter(players), None)
            for player in turns.measured(list(players), num_steps=args.steps):
                yield step.row(cells(
                    players[player], player, first, args=args, tflops=tflops
                ))


def profile(args) -> Iterator[str]:
    """Yields what benchmarks.step says of profiled steps; keeps traces in `TRACES`."""
    for name in PROFILED:
        if args.case not in name:
            continue
        overrides = overrides_of(Row(name), args)
        command = [
            sys.executable, "-m", "benchmarks.step", f"--config={_path(name)}",
            f"--batch={args.batch}", f"--steps={args.steps}", f"--profile={TRACES}",
            *(f"--override={override}" for override in overrides),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            yield from map(str.rstrip, process.stdout)
        if process.returncode:
            yield f"{name}: ended with status {process.returncode}\n"


def against_peer(args, *, theirs: str) -> Iterator[str]:
    """Yields the table of our steps and the reference's, or why there is none."""
    if args.reference is None:
        yield "Not measured: --reference=DIR was not given."
        return
    if environment.package_version("torch") is None:
        yield "Not measured: torch is not installed."
        return
    yield step.row(peer.HEAD)
    yield step.row(["---"] * len(peer.HEAD))
    for name in PEER_CONFIGS:
        if args.case in name:
            yield from peer.compare(
                _path(name), overrides_of(Row(name), args), directory=args.reference,
                num_steps=args.steps, theirs=[theirs],
            )


def attention(args) -> Iterator[str]:
    """Yields the table of attention, at the shapes that were asked for."""
    default = attention_cases.SMALL[::5] if args.quick else attention_cases.CASES
    yield from attention_times.table(
        [ATTENTION[name] for name in args.attention_case or ()] or default,
        attention_times.implementations(), images=args.batch, quick=args.quick,
    )


PARTS = {
    "ceiling": lambda args: kernels.ceiling(images=args.batch, quick=args.quick),
    "attention": attention,
    "steps": lambda args: steps(STEPS, args),
    "profile": profile,
    "peer": lambda args: against_peer(args, theirs="reference"),
    "remat": lambda args: steps(REMAT, args),
    "compiled_peer": lambda args: against_peer(args, theirs="reference, compiled"),
    "large": lambda args: steps(LARGE, args),
}


def report(args: argparse.Namespace) -> Iterator[str]:
    """Yields everything that was asked for, line by line."""
    what = f"batch {args.batch}, {args.steps} steps in turns"
    yield step.conditions([], what + (", tiny sizes" if args.quick else "")).rstrip()
    versions = {name: environment.package_version(name) for name in PACKAGES}
    yield ", ".join(f"{name} {version or 'none'}" for name, version in versions.items())
    if jax.default_backend() == "cpu":
        yield "\nThere is no GPU: what needs one says so, and no number means anything."
    for part in args.only or PARTS:
        begin = time.perf_counter()
        yield f"\n#### {part}\n"
        yield from PARTS[part](args)
        yield f"\n({part}: {time.perf_counter() - begin:.0f} s)"
    yield ""


def main(argv: list[str] | None = None) -> None:
    """Measures and prints, and with `--write` keeps, what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--only", action="append", choices=list(PARTS),
        help="may be given several times",
    )
    parser.add_argument("--case", default="", help="only rows with this in their name")
    parser.add_argument(
        "--attention-case", action="append", choices=list(ATTENTION), metavar="NAME",
        help="a shape of tests/attention_cases.py; may be given several times",
    )
    parser.add_argument("--batch", type=int, help="images a step (256; quick: 8)")
    parser.add_argument("--steps", type=int, help="steps to time (20; quick: 2)")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="see peer.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument(
        "--write", action="store_true", help=f"append the tables to {RESULTS.name}"
    )
    args = parser.parse_args(argv)
    args.batch = args.batch or (8 if args.quick else 256)
    args.steps = args.steps or (2 if args.quick else 20)
    if jax.default_backend() == "cpu" and not args.quick:
        flags.stop("There is no GPU; --quick runs everything on tiny sizes.")
    if args.reference is not None:
        peer.check_reference(args.reference)
    with contextlib.ExitStack() as stack:
        file = None
        if args.write:
            RESULTS.parent.mkdir(exist_ok=True)
            file = stack.enter_context(RESULTS.open("a"))
        for line in report(args):
            print(line, flush=True)
            if file is not None:
                print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
