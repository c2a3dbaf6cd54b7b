"""Curves of a run as SVG inside a page of HTML.

The page decides on fonts and colours, as it may be light or dark: colours are variables
of its style sheet, `--ink`, `--rule` and `--line-1` to `--line-4`, and text stays text.
"""

import html
import io
import re
from collections.abc import Mapping

import matplotlib
from matplotlib import figure, ticker

# Colours that stand for variables until the picture is text.
_VARIABLES = {"#010000": "--ink", "#020000": "--rule"} | {
    f"#03000{number}": f"--line-{number}" for number in (1, 2, 3, 4)
}
_INK, _RULE, *_LINES = _VARIABLES
_DASHES = ("-", "--", "-.", ":")
_INCHES, _POINTS = (4.8, 3.0), 10.5
# With more points than these, each is no longer marked.
_MARKED = 40


def curves(
    lines: Mapping[str, Mapping[int, int | float]],
    *,
    alt: str,
    name: str,
    percent: bool = False,
    from_zero: bool = False,
) -> str:
    """Draws values over steps.

    Args:
      lines: by the name of a curve, which a legend tells if there are several, its
        values by step.
      alt: what the picture shows, for those who do not see it.
      name: of the picture, like no other's of the page.
      percent: whether the values are shares of 1.
      from_zero: whether the vertical axis begins at 0.

    Returns:
      An `svg` element as wide as where it stands.

    Raises:
      ValueError: if there is no value.
    """
    if not any(lines.values()):
        raise ValueError(f"Curves {', '.join(lines)!r} have no values; leave them out.")
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        drawing = figure.Figure(
            figsize=_INCHES, facecolor="none", layout="constrained"
        )
        axes = drawing.add_subplot(facecolor="none")
        for number, (label, points) in enumerate(lines.items()):
            steps = sorted(points)
            axes.plot(
                steps, [points[step] for step in steps], label=label, linewidth=1.8,
                color=_LINES[number % len(_LINES)],
                linestyle=_DASHES[number % len(_DASHES)],
                marker="o" if len(steps) <= _MARKED else None, markersize=3,
            )
        _set_up(axes, percent=percent, from_zero=from_zero)
        if len(lines) > 1:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False,
                fontsize=_POINTS, labelcolor=_INK, borderaxespad=0.2,
            )
        file = io.StringIO()
        drawing.savefig(
            file, format="svg",
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    return _embedded(file.getvalue(), alt=alt, name=name)


def _set_up(axes, *, percent: bool, from_zero: bool) -> None:
    axes.margins(x=0.02)
    if from_zero:
        axes.set_ylim(0, axes.get_ylim()[1] + 0.05 * abs(axes.get_ylim()[1]))
    axes.grid(axis="y", color=_RULE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(labelsize=_POINTS, color=_RULE, labelcolor=_INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("step", fontsize=_POINTS, color=_INK)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: _number(round(x)))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.yaxis.set_major_formatter(
        lambda y, _: f"{100 * y:.4g} %" if percent else _number(y)
    )


def _number(value: int | float) -> str:
    """Returns it short: 0.00015, 12 000, 1e-07."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.4g}"


def _embedded(svg: str, *, alt: str, name: str) -> str:
    """Returns a picture without what it needs as a file of its own."""
    svg = svg[svg.index("<svg"):]
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(
        r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{html.escape(alt)}">', svg,
        count=1,
    )
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "",
                 svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda match: _rounded(match[0]), svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _rounded(path: str) -> str:
    """Returns a path with hundredths of a point, and on one line."""
    path = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", path)
    return re.sub(r"\s+", " ", path)
