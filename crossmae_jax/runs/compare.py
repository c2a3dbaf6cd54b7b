"""Does a run train as others of its kind did? Its curve beside a band of references.

At the steps that the run and all references have logged:

    smoothed   `train/...` is of one batch: of a curve's distances from the mean of the
               references, the median of 5 neighbouring points (fewer at both ends), on
               that mean. Evaluations are of a whole split and stay as they are
    spread     standard deviation between the smoothed references, pooled over 11
               neighbouring points (3 of evaluations): one point of 3 seeds says little
    band       least to greatest of the references, widened on both sides by 2 spreads,
               and by 2 % of their mean at least
    outside    3 points of the smoothed run in a row (all, if there are fewer) that lie
               outside the band, on either side, or are not finite

A median moves no jump, and the mean takes the slope of the curve with it, so the step
that is named is the first logged one outside; at both ends, where there are fewer
points, it may be two logged ones off. Of a single reference the spread is not
known and the band is the 2 % alone: that says where two runs part, not which of them is
healthy, as seeds may differ by more.

Seeds need not lie evenly about their mean: one that is slow does not make fast ones
likely. Hence least and greatest, not the mean and so many deviations.

Leaving the band is a reason to look, not a proof. Where seeds are distributed normally
the band of three holds a fourth in 87 % of the cases (simulated, 400 000 draws); and
a seed that is slow is slow at many steps, so points in a row are no independent tests.

References shipped with the library have a name, see `shipped`.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from crossmae_jax import paths
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import metrics, workdir

SHIPPED = Path(__file__).parent / "references"
WINDOW = 5  # logged points of `train/...` that a median is of
DEVIATIONS = 2.0  # that the range of the references is widened by
LEAST = 0.02  # of the mean: likewise, where seeds agree by chance
IN_A_ROW = 3


class Band(NamedTuple):
    """Where a run of the references' kind is expected, at each step."""

    low: Float[np.ndarray, "s"]
    mean: Float[np.ndarray, "s"]
    high: Float[np.ndarray, "s"]


class Stretch(NamedTuple):
    """Steps, both included, between which a run was outside the band throughout."""

    first: int
    last: int
    side: str  # "above", "below", "not finite"


class Comparison(NamedTuple):
    """A run over the band of its references, at the steps that all have logged.

    Attributes:
      logged: the run's values as they were written; `smoothed` are those judged.
      stretches: where it was outside, in order; empty if it never was. What is not
        finite is outside.
      last_logged: last step of the run and of the shortest reference.
    """

    metric: str
    num_references: int
    window: int
    steps: Int[np.ndarray, "s"]
    logged: Float[np.ndarray, "s"]
    smoothed: Float[np.ndarray, "s"]
    band: Band
    stretches: tuple[Stretch, ...]
    last_logged: tuple[int, int]

    @property
    def outside_to_the_end(self) -> bool:
        """Whether the run is outside at the last step that was compared."""
        return bool(self.stretches) and self.stretches[-1].last == int(self.steps[-1])


def shipped() -> list[str]:
    """Returns the names of the references that come with the library."""
    return sorted(path.name for path in SHIPPED.iterdir() if path.is_dir())


def find(name: str | AnyPath) -> list[AnyPath]:
    """Returns the metrics files that a name means: one, or a shipped reference's.

    What exists goes before a shipped reference of that name.

    Args:
      name: a workdir, a file of metrics, or one of `shipped()`.

    Raises:
      ValueError: if there is nothing of that name, or a directory without metrics.
    """
    path = paths.path(name)
    if path.is_dir():
        if not (path / metrics.FILE).is_file():
            raise ValueError(
                f"{path} has no {metrics.FILE}; give the --workdir of a run that has "
                "logged a step."
            )
        return [path / metrics.FILE]
    if path.is_file():
        return [path]
    if str(name) in shipped():
        return sorted((SHIPPED / str(name)).glob("seed_*.jsonl"))
    raise ValueError(
        f"No run {str(name)!r}. Give a workdir, a {metrics.FILE}, or a reference that "
        f"comes with the library: {', '.join(shipped())}."
    )


def compare(
    run: AnyPath, references: Sequence[AnyPath], *, metric: str = "train/loss"
) -> Comparison:
    """Compares a run with references, which should differ from each other by seed only.

    Args:
      run: a file of metrics, as `find` returns them; likewise `references`.

    Raises:
      ValueError: if there is no reference, the run is one of them, a file has no such
        metric, they have no step in common, a reference is not finite, or the
        references are of different settings.
    """
    _check_files(run, references)
    check_alike(references)
    curves = [_curve(path, metric) for path in (run, *references)]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        logged = sorted(set.intersection(*map(set, curves[1:])))
        raise ValueError(
            f"{run} and the references have logged {metric} at no step in common: "
            f"{_some(sorted(curves[0]))} against {_some(logged)}; run with their "
            "log_every_steps or every_epochs, or give other references."
        )
    values = np.array([[curve[step] for step in steps] for curve in curves], float)
    if not np.isfinite(values[1:]).all():
        raise ValueError(
            f"{metric} of a reference is not finite; give references that are healthy."
        )
    window = WINDOW if metric.startswith("train/") else 1
    smoothed = values
    if window > 1:
        mean = values[1:].mean(axis=0)
        smoothed = np.stack([mean + _medians(row - mean, window) for row in values])
    band = band_of(smoothed[1:], pooled=2 * window + 1)
    return Comparison(
        metric, len(references), window, np.array(steps), values[0], smoothed[0], band,
        stretches=_stretches(np.array(steps), smoothed[0], band),
        last_logged=(max(curves[0]), min(max(curve) for curve in curves[1:])),
    )


def band_of(references: Float[np.ndarray, "n s"], *, pooled: int) -> Band:
    """Returns the band of smoothed references.

    Args:
      pooled: neighbouring points that the spread is estimated from, an odd number.
    """
    num, length = references.shape
    mean = references.mean(axis=0)
    margin = LEAST * np.abs(mean)
    if num > 1:
        variance = references.var(axis=0, ddof=1)
        around = pooled // 2
        spread = np.sqrt([
            variance[max(0, i - around) : i + around + 1].mean() for i in range(length)
        ])
        margin = np.maximum(margin, DEVIATIONS * spread)
    return Band(references.min(axis=0) - margin, mean, references.max(axis=0) + margin)


def _medians(values: Float[np.ndarray, "s"], window: int) -> Float[np.ndarray, "s"]:
    """Returns running medians of what is finite; what is not stays where it is."""
    around, medians = window // 2, np.full(len(values), np.nan)
    for i in np.flatnonzero(np.isfinite(values)):
        near = values[max(0, i - around) : i + around + 1]
        medians[i] = np.median(near[np.isfinite(near)])
    return medians


def _stretches(
    steps: Int[np.ndarray, "s"], values: Float[np.ndarray, "s"], band: Band
) -> tuple[Stretch, ...]:
    """Returns where the values are outside long enough, cut where the side changes."""
    sides = [
        "not finite" if not np.isfinite(value) else
        "above" if value > high else "below" if value < low else ""
        for value, low, high in zip(values, band.low, band.high, strict=True)
    ]
    stretches = []
    everywhere = range(len(steps))
    for outside, places in itertools.groupby(everywhere, lambda i: sides[i] > ""):
        places = list(places)
        if not outside or len(places) < min(IN_A_ROW, len(steps)):
            continue
        for side, part in itertools.groupby(places, lambda i: sides[i]):
            first, *rest = part
            last = rest[-1] if rest else first
            stretches.append(Stretch(int(steps[first]), int(steps[last]), side))
    return tuple(stretches)


def _check_files(run: AnyPath, references: Sequence[AnyPath]) -> None:
    if not references:
        raise ValueError("No reference to compare with; give one or several.")
    theirs = [str(paths.absolute(path)) for path in references]
    if str(paths.absolute(run)) in theirs:
        raise ValueError(
            f"{run} is one of its own references; name the others one by one."
        )
    if twice := [name for name in theirs if theirs.count(name) > 1]:
        raise ValueError(f"The reference {twice[0]} is given twice; give it once.")


def _curve(path: AnyPath, metric: str) -> dict[int, float]:
    curves = metrics.curves(path)
    if metric not in curves:
        raise ValueError(
            f"{path} has no {metric!r}. It has: {', '.join(sorted(curves)) or 'none'}."
        )
    return curves[metric]


def _some(steps: Sequence[int]) -> str:
    if len(steps) <= 4:
        return f"steps {', '.join(map(str, steps))}" if steps else "no step"
    return f"steps {steps[0]}, {steps[1]}, ... {steps[-1]}"


def _settings(path: AnyPath) -> dict[str, Any] | None:
    """Returns the configuration that lies beside metrics, without the seed."""
    if not (path.parent / "config.json").is_file():
        return None
    settings = json.loads(workdir.read_config(path.parent).to_json())
    settings.pop("seed", None)
    return settings


def check_alike(references: Sequence[AnyPath]) -> None:
    """Raises ValueError for references whose settings differ in more than the seed.

    References without a `config.json` beside them are taken as they are.
    """
    first, *others = references
    for other in others:
        ours, theirs = _settings(first), _settings(other)
        if ours is None or theirs is None:
            continue
        if different := workdir.differing(ours, theirs):
            lines = [f"  {name}: {a!r} and {b!r}" for name, (a, b) in different.items()]
            raise ValueError(
                f"The references {first} and {other} differ in more than the seed:\n"
                + "\n".join(lines)
                + "\nA band of unlike runs says nothing; give runs of one config."
            )


def hints(run: AnyPath, reference: AnyPath, *, metric: str) -> list[str] | None:
    """Returns the settings in which a run and a reference differ: where to look first.

    Of an evaluation that includes how it was made; of none the seed. None if one of
    them has no `config.json` beside it.

    Returns:
      Lines such as "optim.base_lr: 0.012 in the references, 0.3 in the run".
    """
    theirs, ours = _settings(reference), _settings(run)
    if theirs is None or ours is None:
        return None
    different = workdir.differing(theirs, ours)
    kind, _, name = metric.partition("/")
    if kind == "eval":
        name = name.partition("/")[0]
        options = [
            {f"evals.{name}": dict(config.get("evals", {}).get(name, {}))}
            for config in (theirs, ours)
        ]
        for option in options:
            option[f"evals.{name}"].pop("every_epochs", None)
        different |= {
            key: (options[0][key], options[1][key])
            for key in options[0] if options[0][key] != options[1][key]
        }
    return [
        f"{key}: {before!r} in the references, {now!r} in the run"
        for key, (before, now) in different.items()
    ]


def describe(comparison: Comparison) -> str:
    """Returns in words what the band is and where the run left it."""
    if comparison.num_references > 1:
        what = (
            f"least to greatest of {comparison.num_references} references, widened by "
            f"{DEVIATIONS:g} standard deviations\n"
            f"          between them, pooled over {2 * comparison.window + 1} points, "
            f"and by {LEAST:.0%} of their mean at least"
        )
    else:
        what = (
            f"the reference +- {LEAST:.0%}; how far seeds differ is not known of one:\n"
            "          give several to learn more than where the two part"
        )
    run_end, references_end = comparison.last_logged
    lines = [
        f"band      {what}",
        f"compared  {comparison.metric} at {len(comparison.steps)} steps, "
        f"{comparison.steps[0]} to {comparison.steps[-1]}" + (
            f"; medians of {comparison.window} distances from their mean"
            if comparison.window > 1 else ""
        ),
    ]
    if run_end < references_end:
        lines.append(
            f"          the run ends at step {run_end}, the references at "
            f"{references_end}"
        )
    if not comparison.stretches:
        share = _distance(comparison)
        furthest = int(np.nanargmax(share))
        lines.append(
            "result    never leaves the band; furthest from its middle at step "
            f"{comparison.steps[furthest]}, {share[furthest]:.0%} of the way to its "
            "edge"
        )
        return "\n".join(lines)
    for number, stretch in enumerate(comparison.stretches):
        lines.append(f"{'' if number else 'result':10}{_in_words(comparison, stretch)}")
    return "\n".join(lines)


def _distance(comparison: Comparison) -> Float[np.ndarray, "s"]:
    """Returns distances from the middle of the band; its edges have 1."""
    middle, half = (
        (comparison.band.high + sign * comparison.band.low) / 2 for sign in (1, -1)
    )
    # A band of zeros has no width.
    return np.abs(comparison.smoothed - middle) / np.maximum(half, np.finfo(float).tiny)


def _in_words(comparison: Comparison, stretch: Stretch) -> str:
    """Returns a stretch outside in words, with how far it went."""
    inside = (comparison.steps >= stretch.first) & (comparison.steps <= stretch.last)
    distance = _distance(comparison)
    for_good = stretch.last == comparison.steps[-1]
    until = "for good" if for_good else f"to step {stretch.last}"
    if stretch.side == "not finite":
        return f"not finite from step {stretch.first} {until}"
    at = int(np.argmax(np.where(inside, distance, -1)))
    return (
        f"{stretch.side} the band from step {stretch.first} {until}; furthest at step "
        f"{comparison.steps[at]}:\n          {comparison.smoothed[at]:.4g}, where the "
        f"band is {comparison.band.low[at]:.4g} to {comparison.band.high[at]:.4g}: "
        f"{distance[at]:.1f} half-widths from its middle"
    )
