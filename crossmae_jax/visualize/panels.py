"""Images that were masked, what became of them, and which patches were taken."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib import colors, figure, patches

from crossmae_jax import glyphs
from crossmae_jax.visualize import canvas

# What a column leaves out must not look like part of the image: blue among greys, grey
# among colours.
_LEFT_OUT_OF_GREY = (0.42, 0.56, 0.76)
_LEFT_OUT_OF_COLOUR = (0.55, 0.55, 0.55)
# Dots. Small images are enlarged by a whole factor to about the first number, large
# ones shrunk to the second; a column stays wide enough for its title.
_ENLARGED, _LARGEST, _COLUMN = 200, 448, 190
_LEAST_CELL = 8  # dots, where orientations are drawn
_GAP, _HEADER, _LINE, _NAMES = 12, 70, 24, 190
# What becomes of a patch, and its colour. Told apart in grey, too.
_GROUPS = {"visible": "#f2d16b", "decoded": "#1f5fa8", "thrown": "#d9d9d9"}


@runtime_checkable
class Reconstruction(Protocol):
    """Images in 0..1, and which of their patches were hidden from the encoder.

    `thrown` are the hidden ones that the decoder did not see either. `target` is what
    was to be predicted; None where that is the image. Where it is not, predictions are
    pictures of the target's kind, and may be of another size than the image.
    """

    image: Float[np.ndarray, "b height width c"]
    prediction: Float[np.ndarray, "b height2 width2 c2"]
    pasted: Float[np.ndarray, "b height2 width2 c2"]
    mask: Bool[np.ndarray, "b n"]
    thrown: Bool[np.ndarray, "b n"]
    target: Float[np.ndarray, "b height2 width2 c2"] | None


@runtime_checkable
class TokenIds(Protocol):
    """Patch numbers of each sample that are seen, decoded and thrown."""

    keep: Int[np.ndarray, "b v"]
    pred: Int[np.ndarray, "b q"]
    thrown: Int[np.ndarray, "b thrown"]


def reconstruction_panel(
    pictures: Reconstruction, path: str | pathlib.Path, *, caption: str,
    names: Sequence[str] = (),
) -> pathlib.Path:
    """Draws a row per image: original, masked, prediction, prediction with the input.

    Patches that a column leaves out have one flat colour: in the second column the
    hidden ones, in the third the visible ones. Where patches were thrown, the third
    column becomes two: decoded patches, and those put together from their neighbours.
    Where something else than the image was to be predicted, it has a column of its own.
    One channel is drawn in grey, three in colour; of any other number the first three,
    or the first one of two.

    Args:
      caption: printed under the panel, such as `targets.Target.caption`.
      names: written beside the rows, if given.

    Returns:
      The path of the PNG; its folder is made if need be.

    Raises:
      ValueError: if there is no image, or the mask does not fit the images.
    """
    columns = _columns(pictures)
    drawn = _laid_out(columns, caption=caption, names=names)
    return canvas.save(drawn, path, caption=caption)


def _columns(
    pictures: Reconstruction,
) -> dict[str, Float[np.ndarray, "b height width 3"]]:
    """Returns what each column shows, by its title."""
    images = np.asarray(pictures.image)
    num, _, _, channels = images.shape
    if num == 0:
        raise ValueError("A panel of 0 images; give at least one valid image.")
    original, prediction, pasted = (
        canvas.drawable(np.asarray(array))
        for array in (images, pictures.prediction, pictures.pasted)
    )
    mask, thrown = np.asarray(pictures.mask), np.asarray(pictures.thrown)
    predictions = {"prediction\n(hidden patches)": mask}
    if thrown.any():
        predictions = {
            "prediction\n(decoded patches)": mask & ~thrown,
            "prediction\n(thrown patches)": thrown,
        }
    columns = {
        _shown_channels("original", channels): original,
        "masked\n(the model's input)": _only(original, ~mask, channels),
    }
    if pictures.target is not None:
        columns["target\n(all patches)"] = canvas.drawable(np.asarray(pictures.target))
    channels = np.shape(pictures.prediction)[-1]
    return columns | {
        title: _only(prediction, shown, channels)
        for title, shown in predictions.items()
    } | {"prediction\n+ visible patches": pasted}


def _only(
    pictures: Float[np.ndarray, "b height width 3"], shown: Bool[np.ndarray, "b n"],
    channels: int,
) -> Float[np.ndarray, "b height width 3"]:
    """Returns pictures with one flat colour in place of the other patches."""
    blank = np.asarray(
        _LEFT_OUT_OF_COLOUR if channels >= 3 else _LEFT_OUT_OF_GREY, np.float32
    )
    return np.where(_pixel_mask(shown, *pictures.shape[1:3]), pictures, blank)


def _laid_out(
    columns: Mapping[str, Float[np.ndarray, "b height width 3"]],
    *,
    caption: str,
    names: Sequence[str],
) -> figure.Figure:
    """Puts the columns side by side, titles above, names left, the caption below."""
    num, height, width, _ = max((x.shape for x in columns.values()), key=np.prod)
    factor = max(1, round(_ENLARGED / max(height, width)))
    factor = min(factor, _LARGEST / max(height, width))
    cell_width, cell_height = round(width * factor), round(height * factor)
    column = max(cell_width, _COLUMN)
    margin = _GAP + (_NAMES if names else 0)
    total_width = margin + len(columns) * (column + _GAP)
    lines = textwrap.wrap(caption, width=total_width // 9)
    footer = _GAP + _LINE * len(lines)
    total_height = _HEADER + num * (cell_height + _GAP) + footer

    drawing = figure.Figure(
        figsize=(total_width / canvas.DPI, total_height / canvas.DPI),
        dpi=canvas.DPI, facecolor="white",
    )

    def write(x, y, text, **options):
        drawing.text(
            x / total_width, 1 - y / total_height, text, color=canvas.INK, **options
        )

    for i, (title, cells) in enumerate(columns.items()):
        left = margin + i * (column + _GAP)
        write(
            left + column / 2, _HEADER / 2, title, ha="center", va="center",
            fontsize=12, linespacing=1.25,
        )
        left += (column - cell_width) // 2
        for j, cell in enumerate(cells):
            top = _HEADER + j * (cell_height + _GAP)
            axes = drawing.add_axes((
                left / total_width, 1 - (top + cell_height) / total_height,
                cell_width / total_width, cell_height / total_height,
            ))
            axes.set_axis_off()
            whole = cell_height % cell.shape[0] == cell_width % cell.shape[1] == 0
            smooth = "nearest" if whole else "antialiased"
            axes.imshow(cell, aspect="auto", interpolation=smooth)
    for j, name in enumerate(names):
        middle = _HEADER + j * (cell_height + _GAP) + cell_height / 2
        write(margin - _GAP, middle, name, ha="right", va="center", fontsize=11)
    write(
        _GAP, total_height - footer, "\n".join(lines), ha="left", va="top",
        fontsize=12, linespacing=1.3,
    )
    return drawing


def oriented_gradients(
    cells: Mapping[str, Float[np.ndarray, "b row col t"]],
    path: str | pathlib.Path,
    *,
    bins: int,
    images: Float[np.ndarray, "b height width c"] | None = None,
    caption: str = "",
) -> pathlib.Path:
    """Draws histograms of oriented gradients, a row per image.

    In each cell a line for each orientation, along the edge and so perpendicular to the
    gradients, and as bright as its value, from black at 0 to white at 1; see `glyphs`.
    Of several channels the mean is drawn.

    Args:
      cells: by what is written above them: targets, predictions, or several scales. At
        each place the bins of its channels, channels slowest, as `targets.hog` has
        them.
      bins: orientations between 0 and 180 degrees.
      images: in 0..1, drawn in front, if given.
      caption: printed under the pictures.

    Example:
      target = HOG((224, 224), channels=3, patch_size=16)({}, normalised_images)
      oriented_gradients(
          {name: np.asarray(tokens.laid_out()) for name, tokens in target.items()},
          "gradients.png", bins=9,
      )

    Returns:
      The path of the PNG; its folder is made if need be.

    Raises:
      ValueError: if the values of a cell are not so many bins of some channels.
    """
    columns = {}
    if images is not None:
        columns["image"] = canvas.drawable(np.asarray(images))
    for title, values in cells.items():
        values = np.asarray(values, np.float32)
        num, rows, cols, width = values.shape
        if width % bins:
            raise ValueError(
                f"{title} has {width} values in a cell, which are not {bins} bins of "
                "some channels; give the bins of its target."
            )
        side = max(_LEAST_CELL, _LARGEST // max(rows, cols))
        lines = glyphs.drawn(values, bins=bins, side=side)
        lines = lines.reshape(num, rows, cols, side, side).swapaxes(2, 3)
        columns[title] = canvas.drawable(
            lines.reshape(num, rows * side, cols * side, 1)
        )
    return canvas.save(
        _laid_out(columns, caption=caption, names=()), path, caption=caption
    )


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
        figsize=(1 + 2 * num, 0.6 + 2.1 * len(choices) * grid[0] / grid[1]),
        dpi=canvas.DPI, facecolor="white", layout="constrained",
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
        row[0].set_ylabel(name, fontsize=13, color=canvas.INK)
    drawing.legend(
        handles=[
            patches.Patch(color=colour, label=group)
            for group, colour in _GROUPS.items()
        ],
        loc="outside upper center", ncols=len(_GROUPS), frameon=False, fontsize=12,
    )
    return canvas.save(drawing, path)


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
