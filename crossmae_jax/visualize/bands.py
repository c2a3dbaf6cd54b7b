"""Curves over steps: a run on the band of its references, and several runs at once."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib import figure
from matplotlib.axes import Axes

from crossmae_jax.visualize import canvas

_GREY = "#777777"
# Wong, "Points of view: Color blindness", Nature Methods 2011: told apart by everybody.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


class Shown(NamedTuple):
    """A curve of a figure.

    Attributes:
      dashed: what the curve is to be compared with, in grey.
    """

    label: str
    steps: Shaped[np.ndarray, "s"]
    values: Float[np.ndarray, "s"]
    dashed: bool = False


def band(
    path: str | pathlib.Path,
    *,
    steps: Shaped[np.ndarray, "s"],
    logged: Float[np.ndarray, "s"],
    smoothed: Float[np.ndarray, "s"],
    low: Float[np.ndarray, "s"],
    mean: Float[np.ndarray, "s"],
    high: Float[np.ndarray, "s"],
    outside: Sequence[tuple[int, int]],
    metric: str,
    title: str,
) -> pathlib.Path:
    """Draws a run over the band of its references; returns the path of the PNG.

    The axis ends at twice the band's greatest height: what is further out is cut off.

    Args:
      outside: first and last steps of what is marked below the curve.
    """
    drawing = _drawing(9.0, 5.4)
    axes = drawing.subplots()
    _dress(axes, title=title, ylabel=metric)
    axes.fill_between(
        steps, low, high, color="#bcd6ea", linewidth=0, label="band of the references"
    )
    axes.plot(steps, mean, color=_COLOURS[0], linewidth=2, label="their mean")
    colour = _COLOURS[1]
    if not np.array_equal(logged, smoothed, equal_nan=True):
        axes.plot(
            steps, logged, color=colour, linewidth=1, alpha=0.45, label="as logged"
        )
    axes.plot(steps, smoothed, color=colour, linewidth=3, label="run")
    for number, (first, last) in enumerate(outside):
        axes.axvspan(
            first, last, ymax=0.025, color=canvas.INK, linewidth=0,
            label=None if number else f"outside, from step {first}",
        )
    drawn = np.concatenate([low, high, logged[np.isfinite(logged)]])
    bottom, top = drawn.min(), min(drawn.max(), 2 * high.max() - min(0, low.min()))
    air = 0.05 * (top - bottom) or 1.0
    axes.set_ylim(bottom - air, top + air)
    axes.legend(fontsize=14, frameon=False)
    return canvas.save(drawing, path)


def stacked(
    panels: Mapping[str, Sequence[Shown]],
    path: str | pathlib.Path,
    *,
    title: str,
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> pathlib.Path:
    """Draws panels beside each other, one a metric; returns the path of the PNG.

    Curves of the same label have the same colour in all of them, and one legend.

    Args:
      panels: curves by the title of their axis.
      limits: of the axes that are not to find their own, so that figures can be laid
        beside each other.
    """
    drawing = _drawing(5.2 * len(panels), 5.0)
    drawing.suptitle(title, fontsize=20, color=canvas.INK, x=0.01, ha="left")
    known: dict[str, str] = {}
    handles = {}
    for (name, curves), axes in zip(
        panels.items(), np.atleast_1d(drawing.subplots(1, len(panels))), strict=True
    ):
        _dress(axes, title="", ylabel=name)
        for curve in curves:
            colour = known.setdefault(
                curve.label,
                _GREY if curve.dashed else _COLOURS[
                    sum(c != _GREY for c in known.values()) % len(_COLOURS)
                ],
            )
            handles[curve.label], = axes.plot(
                curve.steps, curve.values, color=colour, linewidth=2.5,
                linestyle="--" if curve.dashed else "-",
                marker="o" if len(curve.steps) < 30 and not curve.dashed else None,
                markersize=5,
            )
        if limits and name in limits:
            axes.set_ylim(limits[name])
    drawing.legend(
        handles.values(), handles.keys(), loc="outside lower center",
        ncols=len(handles), frameon=False, fontsize=16,
    )
    return canvas.save(drawing, path)


def _drawing(width: float, height: float) -> figure.Figure:
    return figure.Figure(
        figsize=(width, height), dpi=canvas.DPI, facecolor="white",
        layout="constrained",
    )


def _dress(axes: Axes, *, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=16, color=canvas.INK, loc="left")
    axes.set_xlabel("step", fontsize=16)
    axes.set_ylabel(ylabel, fontsize=16)
    axes.tick_params(labelsize=14)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
