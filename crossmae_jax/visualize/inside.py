"""Pictures of what is inside a model: attention, mixtures of maps, tokens, likeness."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from matplotlib import figure
from matplotlib import patches as shapes
from matplotlib.axes import Axes

from crossmae_jax.visualize import canvas

_VISIBLE, _MASKED = "#e0a526", "#1f5fa8"
_QUERY = "#e4002b"


@runtime_checkable
class Magnitudes(Protocol):
    """Attention from masked patches per key, a value per block: see its module."""

    visible: Float[np.ndarray, "i"]
    masked: Float[np.ndarray, "i"]
    share: Float[np.ndarray, "i"]


@runtime_checkable
class AttentionMaps(Protocol):
    """Weights of every block, and the patch number of each query and key, -1: class."""

    weights: Float[np.ndarray, "i b h q k"]
    queries: Int[np.ndarray, "b q"]
    keys: Int[np.ndarray, "b k"]


def attention_magnitudes(
    magnitudes: Magnitudes, path: str | pathlib.Path, *, title: str = ""
) -> pathlib.Path:
    """Draws where masked patches look: per key, as CrossMAE's figure 1, and by mass.

    Returns:
      The path of the PNG; its folder is made if need be.
    """
    blocks = np.arange(1, len(magnitudes.visible) + 1)
    drawing = figure.Figure(figsize=(12, 4.8), dpi=canvas.DPI, layout="constrained")
    left, right = drawing.subplots(1, 2)
    left.bar(blocks - 0.2, magnitudes.visible, 0.4, color=_VISIBLE, label=(
        f"to a visible patch (sum {magnitudes.visible.sum():.2f})"
    ))
    left.bar(blocks + 0.2, magnitudes.masked, 0.4, color=_MASKED, label=(
        f"to a masked patch (sum {magnitudes.masked.sum():.2f})"
    ))
    left.set_ylabel("attention per key, sum over heads", fontsize=13)
    visible = 100 * magnitudes.share
    right.bar(blocks, visible, 0.6, color=_VISIBLE, label="on visible patches")
    right.bar(
        blocks, 100 - visible, 0.6, bottom=visible, color=_MASKED,
        label="on masked patches",
    )
    right.set_ylim(0, 100)
    right.set_ylabel("share of the attention, %", fontsize=13)
    for axes, what in ((left, "per key"), (right, "in all")):
        axes.set_title(
            f"of a masked patch, {what}", fontsize=14, color=canvas.INK, loc="left"
        )
        axes.set_xticks(blocks)
        axes.set_xlabel("decoder block", fontsize=13)
        axes.tick_params(labelsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            fontsize=12, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.08),
            ncols=2,
        )
    drawing.suptitle(title, fontsize=14, color=canvas.INK)
    return canvas.save(drawing, path)


def attention_of_patch(
    image: Shaped[np.ndarray, "height width c"],
    mask: Bool[np.ndarray, "n"],
    maps: AttentionMaps,
    path: str | pathlib.Path,
    *,
    query: int,
    grid: tuple[int, int],
    sample: int = 0,
) -> pathlib.Path:
    """Draws which patches one masked patch attends to, in every decoder block.

    Weights are means over heads; what goes to the class token is written above.

    Args:
      image: in 0..1; `mask` are its masked patches.
      query: number of the patch, outlined in red.
      sample: which image of the maps.

    Raises:
      ValueError: if the patch asks for nothing, since it is visible.
    """
    places = np.flatnonzero(maps.queries[sample] == query)
    if not len(places):
        raise ValueError(
            f"query={query} is no query of the decoder; give the number of a masked "
            "patch."
        )
    weights = np.asarray(maps.weights)[:, sample, :, places[0]].mean(1)  # i k
    keys = maps.keys[sample]
    side = image.shape[0] // grid[0]
    hidden = mask.reshape(grid).repeat(side, 0).repeat(side, 1)[..., None]
    shown = np.where(hidden, 0.55, canvas.drawable(image[None])[0])
    num = len(weights)
    columns = min(num + 1, 5)
    rows = -(-(num + 1) // columns)
    drawing = figure.Figure(
        figsize=(2.7 * columns + 0.9, 2.95 * rows), dpi=canvas.DPI, layout="constrained"
    )
    cells = drawing.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
    cells[0].imshow(shown)
    cells[0].set_title("the model's input", fontsize=13)
    heats = np.full((num, len(mask)), np.nan)
    is_patch = keys >= 0
    heats[:, keys[is_patch]] = weights[:, is_patch]
    top = np.nanmax(heats)
    for block, heat in enumerate(heats):
        axes = cells[block + 1]
        drawn = axes.imshow(
            heat.reshape(grid), cmap="viridis", vmin=0, vmax=top,
            extent=(0, grid[1] * side, grid[0] * side, 0), interpolation="nearest",
        )
        to_class = 100 * weights[block, ~is_patch].sum()
        axes.set_title(f"block {block + 1}\nclass token {to_class:.0f} %", fontsize=13)
    for axes in cells[: num + 1]:
        row, column = divmod(query, grid[1])
        axes.add_patch(shapes.Rectangle(
            (column * side - 0.5, row * side - 0.5), side, side, fill=False,
            edgecolor=_QUERY, linewidth=2,
        ))
    bar = drawing.colorbar(drawn, ax=list(cells), shrink=0.7)
    bar.set_label("attention, mean over heads", fontsize=12)
    return canvas.save(drawing, path)


def inter_block_weights(
    weights: Mapping[str, Float[np.ndarray, "i maps"]],
    path: str | pathlib.Path,
    *,
    maps: Sequence[int],
    blocks: Sequence[str] = (),
) -> pathlib.Path:
    """Draws how much of each encoder map goes into each decoder block's context.

    Args:
      weights: by a name, such as that of a step; side by side, on one scale.
      maps: the columns: 0 for the encoder's input, then block numbers from 1.
      blocks: the rows, if they are not one for each decoder block: `("all",)` of MFF,
        whose only mixture, of projected maps, is for all of them.
    """
    top = max(np.abs(matrix).max() for matrix in weights.values())
    num, (depth, width) = len(weights), next(iter(weights.values())).shape
    drawing = figure.Figure(
        figsize=(1.6 + num * max(3.4, 0.42 * width), 2.2 + 0.42 * depth),
        dpi=canvas.DPI, layout="constrained",
    )
    panels = drawing.subplots(1, num, squeeze=False, sharey=True)[0]
    for axes, (name, matrix) in zip(panels, weights.items(), strict=True):
        drawn = axes.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
        axes.set_title(name, fontsize=13, color=canvas.INK)
        axes.set_xticks(
            np.arange(width), ["input" if m == 0 else str(m) for m in maps],
            rotation=90 if width > 8 else 0,
        )
        axes.set_xlabel("encoder map (output of block)", fontsize=12)
        axes.set_yticks(
            np.arange(depth), blocks or [str(i + 1) for i in range(depth)]
        )
        axes.tick_params(labelsize=11)
    panels[0].set_ylabel("decoder block", fontsize=12)
    drawing.colorbar(drawn, ax=list(panels)).set_label("weight", fontsize=12)
    return canvas.save(drawing, path)


def likeness(
    matrix: Float[np.ndarray, "i j"], path: str | pathlib.Path, *, title: str,
    rows: str, columns: str,
) -> pathlib.Path:
    """Draws a matrix of numbers from 0 to 1, such as CKA between blocks.

    Args:
      rows: what a row is, the label of its axis; likewise `columns`.
    """
    drawing = figure.Figure(figsize=(6.6, 5.4), dpi=canvas.DPI, layout="constrained")
    axes: Axes = drawing.subplots()
    drawn = axes.imshow(matrix, cmap="magma", vmin=0, vmax=1)
    axes.set_title(title, fontsize=14, color=canvas.INK, loc="left")
    axes.set_ylabel(rows, fontsize=13)
    axes.set_xlabel(columns, fontsize=13)
    axes.tick_params(labelsize=12)
    drawing.colorbar(drawn, ax=axes).set_label("CKA", fontsize=12)
    return canvas.save(drawing, path)


def picture_grid(
    rows: Sequence[Sequence[Shaped[np.ndarray, "height width c"]]],
    path: str | pathlib.Path,
    *,
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    caption: str = "",
) -> pathlib.Path:
    """Draws pictures in 0..1 in rows and columns, with titles.

    For what has a picture of its own in each cell: tokens as colours, neighbours,
    predictions after each block.

    Args:
      columns: titles above the columns, and `names` beside the rows, if given.
      caption: printed under the pictures.
    """
    num = max(map(len, rows))
    height, width = rows[0][0].shape[:2]
    cell = 1.75
    lines = textwrap.wrap(caption, width=int(12 * cell * num))
    drawing = figure.Figure(
        figsize=(
            0.3 + (0.5 if names else 0) + cell * num,
            (0.5 if columns else 0.1) + 0.25 * len(lines)
            + cell * len(rows) * height / width,
        ),
        dpi=canvas.DPI, layout="constrained",
    )
    cells = drawing.subplots(len(rows), num, squeeze=False)
    for axes in cells.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for i, row in enumerate(rows):
        for axes, picture in zip(cells[i], row):
            side = picture.shape[0]
            axes.imshow(
                canvas.drawable(np.asarray(picture)[None])[0],
                interpolation="nearest" if side < 100 else "antialiased",
            )
        if names:
            cells[i][0].set_ylabel(names[i], fontsize=12, color=canvas.INK)
    for axes, title in zip(cells[0], columns):
        axes.set_title(title, fontsize=12, color=canvas.INK)
    if caption:
        drawing.supxlabel("\n".join(lines), fontsize=11, color=canvas.INK)
    return canvas.save(drawing, path)


def values_over(
    curves: Mapping[str, tuple[Sequence[float | int], Sequence[float | int]]],
    path: str | pathlib.Path, *, title: str, label: str, axis: str = "step",
) -> pathlib.Path:
    """Draws values over steps, or over blocks: a line for each name.

    Args:
      curves: by name, steps and values.
      label: of the vertical axis; `axis` of the horizontal one.
    """
    drawing, axes = canvas.axes(title)
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, linewidth=2.5, marker="o", label=name)
    axes.set_xlabel(axis, fontsize=13)
    axes.set_ylabel(label, fontsize=13)
    axes.legend(fontsize=12, frameon=False)
    return canvas.save(drawing, path)


def spread_of(
    values: Float[np.ndarray, "n"], path: str | pathlib.Path, *,
    marks: Mapping[str, float], title: str, label: str,
) -> pathlib.Path:
    """Draws a histogram, its mean, and marks at other numbers.

    Args:
      label: of the horizontal axis.
    """
    drawing, axes = canvas.axes(title)
    axes.hist(values, bins=40, color="#9fb8d3")
    axes.axvline(values.mean(), color=_MASKED, linewidth=2.5, label="mean")
    for name, value in marks.items():
        axes.axvline(value, color=_QUERY, linewidth=2.5, linestyle="--", label=name)
    axes.set_xlabel(label, fontsize=13)
    axes.set_ylabel("how often", fontsize=13)
    axes.legend(fontsize=12, frameon=False)
    return canvas.save(drawing, path)
