"""What `estimate` found, as text for people."""

import math

from crossmae_jax import tables
from crossmae_jax.cost.estimate import Estimate, LargestBatch
from crossmae_jax.cost.fitting import Suggestion

_UNSURE = "what training runs may need some 15% more or less: add --optimized"


def size(num_bytes: int | float) -> str:
    """Returns a number of bytes in words."""
    unit, name = (1e9, "GB") if num_bytes >= 1e8 else (1e6, "MB")
    return f"{num_bytes / unit:.2f} {name}"


def verdict(found: Estimate) -> str:
    """Returns whether a step fits, and what it needs of what there is, in a line."""
    if found.refusal:
        text = f"no: the compiler refuses: {found.refusal.splitlines()[0]}"
        return text if found.optimized else f"{text}; {_UNSURE}"
    need = size(found.memory.total)
    if found.fits == "unknown":
        return f"unknown: no figures for {found.device_kind!r}; {need}"
    sure, most, why, between = found.capacity
    text = f"{found.fits}: {need} of {size(sure)}, {why}"
    if found.fits == "unsure":
        text += f"; {_UNSURE}"
    if found.fits == "barely":
        text += f"; {between}"
    elif found.fits == "no" and most > sure:
        text += f"; at most {size(most)} can be used"
    return text


def told(suggestions: list[Suggestion]) -> str:
    """Returns suggestions as flags, a line each, with what is known of each."""
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
            what = f"compiled, fits: {verdict(tried)}"
        if "data.batch_size" in settings:
            what += " (a smaller batch is another training)"
        lines.append(f"    {flag:34} {what}")
    return "\n".join(lines)


def _memory(found: Estimate) -> str:
    memory = found.memory
    rows = {
        "weights": memory.weights,
        "moments of the optimiser": memory.moments,
        "images": memory.images,
        "activations and other temporaries": memory.temporaries,
        "layout, results, code": memory.other,
        "all": memory.total,
    }
    unit, word = (1e9, "GB") if memory.total >= 1e8 else (1e6, "MB")
    cells = ((name, f"{used / unit:.3f}") for name, used in rows.items())
    return tables.markdown(tables.Table(("memory of a device", word), tuple(cells)))


def _exchanged(found: Estimate) -> str:
    if not found.exchanged:
        return "none"
    parts = []
    for kind in found.exchanged:
        least = "" if kind.exact else "at least "
        parts.append(f"{least}{kind.count} {kind.kind} of {size(kind.num_bytes)}")
    return f"{', '.join(parts)}; a device sends {size(found.sent)} or more"


_TERMS = {
    "operations": "counted, at the bfloat16 peak",
    "links": "what a device must send to the others",
    "memory": "not in the bound: as the compiler counts, on the chip and off it",
}


def _bound(found: Estimate, *, bfloat16: bool) -> str:
    terms = found.roofline()
    if not terms:
        return f"unknown: no figures for {found.device_kind!r}"
    least = max(seconds for name, seconds in terms.items() if name != "memory")
    lines = [
        f"{least * 1e3:.3g} ms or more, {found.batch_size / least:.0f} images/s or "
        "fewer: a bound, not measured"
    ]
    lines += [
        f"{name} {seconds * 1e3:.3g} ms, {_TERMS[name]}"
        for name, seconds in terms.items()
    ]
    if "memory" not in terms:
        lines.append(
            "memory not known: the compiler does not count its accesses"
            if found.optimized else
            "memory not said: a program that is made to run fast accesses less"
        )
    if not bfloat16:
        lines.append("this model does not compute in bfloat16, and is slower")
    return ("\n" + 16 * " ").join(lines)


def _largest(found: Estimate, largest: LargestBatch | None, tried: list[int]):
    if not tried:
        return "not sought; --batches=N,... compiles further batches to find it"
    if largest is None:
        return "not known: two batches are needed that the compiler did not refuse"
    if largest.batch_size == 0:
        return "none: not even one image a device"
    between = largest.compiled[0] <= largest.batch_size <= largest.compiled[1]
    how = "interpolated" if between else "extrapolated"
    unit = found.num_devices * found.accum_steps
    digits = max(0, int(math.log10(largest.batch_size)) - 1)
    about = largest.batch_size // 10**digits * 10**digits // unit * unit
    return (
        f"about {about or largest.batch_size} images ({how} from compilations at "
        f"{' and '.join(map(str, largest.compiled))})"
    )


def report(
    found: Estimate,
    *,
    bfloat16: bool,
    largest: LargestBatch | None = None,
    tried: list[int] | None = None,
    suggestions: list[Suggestion] | None = None,
) -> str:
    """Returns an estimate as text.

    Args:
      bfloat16: whether the model computes in that type, which the peak is of.
      tried: the further batches that `largest` was sought with.
      suggestions: what `fitting.suggest` returned, for one that does not fit.
    """
    a_device = found.batch_size // found.num_devices
    lines = [
        f"fits            {verdict(found)}",
        f"compiled        in {found.seconds:.0f} s for {found.num_devices} x "
        f"{found.device_kind}; not run"
        + ("" if found.optimized else
           ", nor made to run fast: training compiles for longer (--optimized)"),
        f"a device's step {a_device} images"
        + (f" in {found.accum_steps} parts" if found.accum_steps > 1 else "")
        + f", {found.flops / 1e12:.4g} TFLOP",
        f"layout          {found.layout}",
        f"step time       {_bound(found, bfloat16=bfloat16)}",
        f"largest batch   {_largest(found, largest, tried or [])}",
    ]
    parts = []
    if found.memory is not None:
        lines += [
            f"attention       {found.attention}",
            f"exchanged       {_exchanged(found)}",
        ]
        parts.append(_memory(found))
    parts.insert(0, "\n".join(lines))
    if suggestions is not None:
        parts.append(told(suggestions))
    return "\n\n".join(parts)
