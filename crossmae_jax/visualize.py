"""Arrays to pictures; with `figures_curves` the only importer of matplotlib.

Figures are made without pyplot: nothing global is opened and no display is needed.
"""

import json
import pathlib
import textwrap
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from matplotlib import colors, figure, patches
from matplotlib.axes import Axes

_DPI = 100
# What a column leaves out must not look like part of the image: blue among greys, grey
# among colours.
_LEFT_OUT_OF_GREY = (0.42, 0.56, 0.76)
_LEFT_OUT_OF_COLOUR = (0.55, 0.55, 0.55)
_INK = "#222222"
# Dots. Small images are enlarged by a whole factor to about the first number, large
# ones shrunk to the second; a column stays wide enough for its title.
_ENLARGED, _LARGEST, _COLUMN = 200, 448, 190
_GAP, _HEADER, _LINE = 12, 70, 24
# What becomes of a patch, and its colour. Told apart in grey, too.
_GROUPS = {"visible": "#f2d16b", "decoded": "#1f5fa8", "thrown": "#d9d9d9"}


@runtime_checkable
class Reconstruction(Protocol):
    """Images in 0..1, and which of their patches were hidden from the encoder.

    `thrown` are the hidden ones that the decoder did not see either.
    """

    image: Float[np.ndarray, "b height width c"]
    prediction: Float[np.ndarray, "b height width c"]
    pasted: Float[np.ndarray, "b height width c"]
    mask: Bool[np.ndarray, "b n"]
    thrown: Bool[np.ndarray, "b n"]


@runtime_checkable
class TokenIds(Protocol):
    """Patch numbers of each sample that are seen, decoded and thrown."""

    keep: Int[np.ndarray, "b v"]
    pred: Int[np.ndarray, "b q"]
    thrown: Int[np.ndarray, "b thrown"]


def caption(*, normalize: bool) -> str:
    """Returns what a viewer of a panel must know, for standardised or raw targets."""
    if normalize:
        return (
            "Patch mean and standard deviation come from the true image (targets are "
            "standardised per patch): colours and contrast are not evidence of "
            "learning."
        )
    return (
        "Hidden patches are shown as predicted. In the last column the visible patches "
        "are copied from the input."
    )


def reconstruction_panel(
    pictures: Reconstruction, path: str | pathlib.Path, *, caption: str
) -> pathlib.Path:
    """Draws a row per image: original, masked, prediction, prediction with the input.

    Patches that a column leaves out have one flat colour: in the second column the
    hidden ones, in the third the visible ones. Where patches were thrown, the third
    column becomes two: decoded patches, and those put together from their neighbours.
    One channel is drawn in grey, three in colour; of any other number the first three,
    or the first one of two.

    Args:
      caption: printed under the panel, from `caption(normalize=...)`.

    Returns:
      The path of the PNG; its folder is made if need be.

    Raises:
      ValueError: if there is no image, or the mask does not fit the images.
    """
    images = np.asarray(pictures.image)
    num, height, width, channels = images.shape
    if num == 0:
        raise ValueError("A panel of 0 images; give at least one valid image.")
    hidden, thrown = (
        _pixel_mask(np.asarray(mask), height, width)
        for mask in (pictures.mask, pictures.thrown)
    )
    original, prediction, pasted = (
        _drawable(np.asarray(array))
        for array in (images, pictures.prediction, pictures.pasted)
    )
    blank = np.asarray(
        _LEFT_OUT_OF_COLOUR if channels >= 3 else _LEFT_OUT_OF_GREY, np.float32
    )
    predictions = {"prediction\n(hidden patches)": hidden}
    if thrown.any():
        predictions = {
            "prediction\n(decoded patches)": hidden & ~thrown,
            "prediction\n(thrown patches)": thrown,
        }
    columns = {
        _shown_channels("original", channels): original,
        "masked\n(the model's input)": np.where(hidden, blank, original),
    } | {
        title: np.where(shown, prediction, blank)
        for title, shown in predictions.items()
    } | {"prediction\n+ visible patches": pasted}

    factor = max(1, round(_ENLARGED / max(height, width)))
    factor = min(factor, _LARGEST / max(height, width))
    cell_width, cell_height = round(width * factor), round(height * factor)
    column = max(cell_width, _COLUMN)
    total_width = _GAP + len(columns) * (column + _GAP)
    lines = textwrap.wrap(caption, width=total_width // 9)
    footer = _GAP + _LINE * len(lines)
    total_height = _HEADER + num * (cell_height + _GAP) + footer

    drawing = figure.Figure(
        figsize=(total_width / _DPI, total_height / _DPI), dpi=_DPI, facecolor="white"
    )
    for i, (title, cells) in enumerate(columns.items()):
        left = _GAP + i * (column + _GAP)
        drawing.text(
            (left + column / 2) / total_width, 1 - _HEADER / 2 / total_height, title,
            ha="center", va="center", fontsize=12, linespacing=1.25, color=_INK,
        )
        left += (column - cell_width) // 2
        for j, cell in enumerate(cells):
            top = _HEADER + j * (cell_height + _GAP)
            axes = drawing.add_axes((
                left / total_width, 1 - (top + cell_height) / total_height,
                cell_width / total_width, cell_height / total_height,
            ))
            axes.set_axis_off()
            axes.imshow(
                cell, aspect="auto",
                interpolation="nearest" if factor >= 1 else "antialiased",
            )
    drawing.text(
        _GAP / total_width, footer / total_height, "\n".join(lines),
        ha="left", va="top", fontsize=12, linespacing=1.3, color=_INK,
    )
    return _save(drawing, path)


def sampling_panel(
    choices: Mapping[str, TokenIds], path: str | pathlib.Path, *, grid: tuple[int, int]
) -> pathlib.Path:
    """Draws which patches are visible, decoded and thrown: a row per choice.

    Patches that are none of them are white: neither seen nor predicted.

    Example:
      sampling_panel({"random": ids, "furthest": others}, "panel.png", grid=(14, 14))

    Returns:
      The path of the PNG; its folder is made if need be.
    """
    colours = [colors.to_rgb(colour) for colour in _GROUPS.values()]
    num = max(len(ids.keep) for ids in choices.values())
    drawing = figure.Figure(
        figsize=(1 + 2 * num, 0.6 + 2.1 * len(choices) * grid[0] / grid[1]), dpi=_DPI,
        facecolor="white", layout="constrained",
    )
    panels = drawing.subplots(len(choices), num, squeeze=False)
    for (name, ids), row in zip(choices.items(), panels, strict=True):
        for sample, axes in enumerate(row):
            cells = np.ones((grid[0] * grid[1], 3))
            if sample < len(ids.keep):
                for group, colour in zip((ids.keep, ids.pred, ids.thrown), colours):
                    cells[np.asarray(group[sample])] = colour
            axes.imshow(cells.reshape(*grid, 3), interpolation="nearest")
            axes.set_xticks(np.arange(grid[1] + 1) - 0.5, labels=[])
            axes.set_yticks(np.arange(grid[0] + 1) - 0.5, labels=[])
            axes.grid(color="white", linewidth=1)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=13, color=_INK)
    drawing.legend(
        handles=[
            patches.Patch(color=colour, label=group)
            for group, colour in _GROUPS.items()
        ],
        loc="outside upper center", ncols=len(_GROUPS), frameon=False, fontsize=12,
    )
    return _save(drawing, path)


def loss_curve(
    metrics_jsonl_path: str | pathlib.Path, path: str | pathlib.Path
) -> pathlib.Path:
    """Draws `train/loss` over steps, beside the loss of the trivial predictor.

    Steps that were logged twice, before and after a restart, count as logged last.

    Raises:
      ValueError: if the file holds no `train/loss`, or a line that is not JSON.
    """
    points = {}
    lines = pathlib.Path(metrics_jsonl_path).read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break  # still being written
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{metrics_jsonl_path} line {number} is not JSON ({error}); expected "
                'one object a line, such as {"step": 50, "train/loss": 0.9}.'
            ) from error
        if "train/loss" in row:
            points[row["step"]] = (row["train/loss"], row.get("train/loss_trivial"))
    if not points:
        raise ValueError(
            f"{metrics_jsonl_path} has {len(lines)} lines but no train/loss; it is "
            "written every log_every_steps, so let the run get that far."
        )
    steps = sorted(points)
    loss, trivial = (
        np.asarray([points[step][i] for step in steps], float) for i in range(2)
    )

    drawing, axes = _axes("Loss on hidden patches while training")
    axes.plot(
        steps, trivial, color="#777777", linewidth=2, linestyle="--",
        label="trivial: the mean of each patch",
    )
    axes.plot(steps, loss, color="#1f5fa8", linewidth=2.5, label="model")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.set_xlabel("step", fontsize=13)
    axes.set_ylabel("mean squared error", fontsize=13)
    axes.legend(fontsize=12, frameon=False)
    return _save(drawing, path)


def accuracy_by_blocks(
    curves: Mapping[str, Mapping[float, float]],
    path: str | pathlib.Path,
    *,
    title: str = "Partial fine-tuning",
) -> pathlib.Path:
    """Draws the accuracy of partial fine-tuning over the number of tuned blocks.

    Args:
      curves: by the name of the encoder, the accuracy, 0..1, by the number of blocks.
    """
    drawing, axes = _axes(title)
    ticks = sorted({count for curve in curves.values() for count in curve})
    places = {count: place for place, count in enumerate(ticks)}  # 0 and 0.5 apart
    markers = "osD^vP*X"
    for number, (name, curve) in enumerate(curves.items()):
        counts = sorted(curve)
        axes.plot(
            [places[count] for count in counts],
            [100 * curve[count] for count in counts],
            marker=markers[number % len(markers)], linewidth=2, label=name,
        )
    axes.set_xticks(list(places.values()), [f"{count:g}" for count in ticks])
    axes.set_xlabel("fine-tuned blocks", fontsize=13)
    axes.set_ylabel("top-1 accuracy, %", fontsize=13)
    axes.legend(fontsize=12, frameon=False)
    return _save(drawing, path)


def _axes(title: str) -> tuple[figure.Figure, Axes]:
    drawing = figure.Figure(figsize=(9, 5), dpi=_DPI, facecolor="white")
    axes = drawing.add_axes((0.1, 0.14, 0.86, 0.74))
    axes.set_title(title, fontsize=14, color=_INK, loc="left")
    axes.tick_params(labelsize=12)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _drawable(
    images: Shaped[np.ndarray, "b height width c"],
) -> Float[np.ndarray, "b height width 3"]:
    """Returns images as RGB in 0..1, whatever their number of channels."""
    images = np.clip(images.astype(np.float32), 0, 1)
    if images.shape[-1] >= 3:
        return images[..., :3]
    return np.repeat(images[..., :1], 3, axis=-1)


def _shown_channels(title: str, channels: int) -> str:
    if channels in (1, 3):
        return title
    shown = "channels 1-3" if channels > 3 else "channel 1"
    return f"{title}\n({shown} of {channels})"


def _pixel_mask(
    mask: Bool[np.ndarray, "b n"], height: int, width: int
) -> Bool[np.ndarray, "b {height} {width} 1"]:
    """Spreads the mask of square patches in raster order over their pixels."""
    num, num_patches = mask.shape
    side = round((height * width / num_patches) ** 0.5)
    if height % side or width % side or height * width != num_patches * side**2:
        raise ValueError(
            f"A mask of {num_patches} patches does not tile images of {height}x{width} "
            "with squares; give one entry per patch."
        )
    pixels = mask.reshape(num, height // side, width // side, 1)
    return pixels.repeat(side, axis=1).repeat(side, axis=2)


def _save(drawing: figure.Figure, path: str | pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, format="png", dpi=_DPI)
    return path
