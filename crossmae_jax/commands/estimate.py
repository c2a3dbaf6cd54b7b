"""Compiles the training step for hardware one need not own; says what it needs.

    python -m crossmae_jax estimate --config=FILE [--config.KEY=VALUE ...] --target=h200

Targets: h200; TPUs in the topologies that are sold, v5e:4x4, v5p:2x2x1, v6e:4x4;
this, the devices of this process. The batch of the configuration is cut over the
target's devices. Nothing is run: memory and exchanges are those of the compiled
program, operations are counted, and the step time is a bound.

Compiling ViT-B takes about half a minute for an H200 and several for a TPU. So the step
is compiled once, and again only where that is asked for:

    --batches=1024,2048   also at these batches: the largest that fits is interpolated
    --tests=1             of the settings that are suggested where it does not fit, how
                          many are compiled, each as long; 0 for none

Exit status 2 if the command line is wrong, 1 if a configuration contradicts itself or
the target's compiler is missing; 0 otherwise, whether it fits or not.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crossmae_jax import errors, tables
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag
from crossmae_jax.distributed import hardware

if TYPE_CHECKING:  # JAX is imported when the target is known
    from crossmae_jax.cost.estimate import Estimate, LargestBatch, Suggestion


def _size(num_bytes: int | float) -> str:
    unit, name = (1e9, "GB") if num_bytes >= 1e8 else (1e6, "MB")
    return f"{num_bytes / unit:.2f} {name}"


def _verdict(estimate: "Estimate") -> str:
    if estimate.refusal:
        return f"no: the compiler refuses: {estimate.refusal.splitlines()[0]}"
    if estimate.fits == "unknown":
        return f"unknown: no figures for {estimate.device_kind!r}; {_need(estimate)}"
    sure, most, why, between = estimate.capacity
    text = f"{estimate.fits}: {_need(estimate)} of {_size(sure)}, {why}"
    if estimate.fits == "barely":
        text += f"; {between}"
    elif estimate.fits == "no" and most > sure:
        text += f"; at most {_size(most)} can be used"
    return text


def _need(estimate: "Estimate") -> str:
    return _size(estimate.memory.total)


def _memory(estimate: "Estimate") -> str:
    memory = estimate.memory
    rows = {
        "weights": memory.weights,
        "moments of the optimiser": memory.moments,
        "images": memory.images,
        "activations and other temporaries": memory.temporaries,
        "layout, results, code": memory.other,
        "all": memory.total,
    }
    unit, word = (1e9, "GB") if memory.total >= 1e8 else (1e6, "MB")
    cells = ((name, f"{size / unit:.3f}") for name, size in rows.items())
    return tables.markdown(tables.Table(("memory of a device", word), tuple(cells)))


def _exchanged(estimate: "Estimate") -> str:
    if not estimate.exchanged:
        return "none"
    parts = []
    for kind in estimate.exchanged:
        least = "" if kind.exact else "at least "
        parts.append(f"{least}{kind.count} {kind.kind} of {_size(kind.num_bytes)}")
    return f"{', '.join(parts)}; a device sends {_size(estimate.sent)} or more"


_TERMS = {
    "operations": "counted, at the bfloat16 peak",
    "links": "what a device must send to the others",
    "memory": "not in the bound: as the compiler counts, on the chip and off it",
}


def _bound(estimate: "Estimate", *, bfloat16: bool) -> str:
    terms = estimate.roofline()
    if not terms:
        return f"unknown: no figures for {estimate.device_kind!r}"
    least = max(seconds for name, seconds in terms.items() if name != "memory")
    lines = [
        f"{least * 1e3:.3g} ms or more, {estimate.batch_size / least:.0f} images/s or "
        "fewer: a bound, not measured"
    ]
    lines += [
        f"{name} {seconds * 1e3:.3g} ms, {_TERMS[name]}"
        for name, seconds in terms.items()
    ]
    if "memory" not in terms:
        lines.append("memory not known: the compiler does not count its accesses")
    if not bfloat16:
        lines.append("this model does not compute in bfloat16, and is slower")
    return ("\n" + 16 * " ").join(lines)


def _largest(estimate: "Estimate", largest: "LargestBatch | None", tried: list[int]):
    if not tried:
        return "not sought; --batches=N,... compiles further batches to find it"
    if largest is None:
        return "not known: two batches are needed that the compiler did not refuse"
    if largest.batch_size == 0:
        return "none: not even one image a device"
    between = largest.compiled[0] <= largest.batch_size <= largest.compiled[1]
    how = "interpolated" if between else "extrapolated"
    unit = estimate.num_devices * estimate.accum_steps
    digits = max(0, int(math.log10(largest.batch_size)) - 1)
    about = largest.batch_size // 10**digits * 10**digits // unit * unit
    return (
        f"about {about or largest.batch_size} images ({how} from compilations at "
        f"{' and '.join(map(str, largest.compiled))})"
    )


def _suggested(estimate: "Estimate", suggestions: "list[Suggestion]") -> str:
    if not suggestions:
        return (
            "No number of micro-batches and no smaller batch makes it fit: weights, "
            "moments and\ngradients take nearly all of it, or the batch cannot be cut. "
            "More devices share\nthem with --config.mesh.fsdp=0."
        )
    lines = ["It may fit with one of"]
    for settings, tried in suggestions:
        flag = " ".join(f"--config.{name}={value}" for name, value in settings.items())
        what = "untested"
        if tried is not None:
            what = f"compiled, fits: {_verdict(tried)}"
        if "data.batch_size" in settings:
            what += " (a smaller batch is another training)"
        lines.append(f"    {flag:34} {what}")
    return "\n".join(lines)


def report(
    estimate: "Estimate",
    *,
    bfloat16: bool,
    largest: "LargestBatch | None" = None,
    tried: list[int] | None = None,
    suggestions: "list[Suggestion] | None" = None,
) -> str:
    """Returns an estimate as text.

    Args:
      bfloat16: whether the model computes in that type, which the peak is of.
      tried: the further batches that `largest` was sought with.
      suggestions: what `estimate.suggest` returned, for one that does not fit.
    """
    a_device = estimate.batch_size // estimate.num_devices
    lines = [
        f"fits            {_verdict(estimate)}",
        f"compiled        in {estimate.seconds:.0f} s for {estimate.num_devices} x "
        f"{estimate.device_kind}; not run",
        f"a device's step {a_device} images"
        + (f" in {estimate.accum_steps} parts" if estimate.accum_steps > 1 else "")
        + f", {estimate.flops / 1e12:.4g} TFLOP",
        f"layout          {estimate.layout}",
        f"step time       {_bound(estimate, bfloat16=bfloat16)}",
        f"largest batch   {_largest(estimate, largest, tried or [])}",
    ]
    parts = []
    if estimate.memory is not None:
        lines += [
            f"attention       {estimate.attention}",
            f"exchanged       {_exchanged(estimate)}",
        ]
        parts.append(_memory(estimate))
    parts.insert(0, "\n".join(lines))
    if suggestions is not None:
        parts.append(_suggested(estimate, suggestions))
    return "\n\n".join(parts)


def _target(text: str) -> str:
    hardware.check_target(text)
    return text


def _batches(text: str) -> tuple[int, ...]:
    sizes = flags.numbers(int)(text)
    if min(sizes, default=1) < 1:
        raise ValueError("expected numbers of images, 1 or more.")
    return sizes


def _tests(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError(f"{number} is not a non-negative integer.")
    return number


_FLAGS = {
    "target": Flag(
        _target, "this, h200, or TPUs such as v5e:4x4", required=True
    ),
    "batches": Flag(_batches, "further batches to compile, such as 1024,2048", ()),
    "tests": Flag(_tests, "suggestions to compile; default: 1", 1),
}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Prints what the configuration that `argv` describes needs of a target."""
    given = flags.parse("estimate", argv, _FLAGS, doc=__doc__, config=flags.of_file)
    config, target, batches = given.config, given.target, given.batches
    if target != "this":
        hardware.without_devices()
    from crossmae_jax.cost import estimate  # now that JAX may be imported

    print(f"{given.title}\nfor {target}\n", flush=True)
    with errors.naming(given.file):
        result = estimate.estimate(config, target)
        others = [
            estimate.estimate(
                estimate.with_settings(config, {"data.batch_size": size}), target
            )
            for size in batches if size != result.batch_size
        ]
        suggestions = None
        if result.fits == "no":
            suggestions = estimate.suggest(config, result, num_tests=given.tests)
    print(report(
        result, bfloat16=config.model.dtype == "bfloat16", tried=list(batches),
        largest=estimate.largest_batch([result, *others]), suggestions=suggestions,
    ))
