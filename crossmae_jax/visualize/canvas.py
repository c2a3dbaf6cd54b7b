"""What all pictures have in common: resolution, ink, axes, and the way to a file.

Figures are made without pyplot: nothing global is opened and no display is needed.
Letters can be read from the back of a room.
"""

import io
import pathlib

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib import figure
from matplotlib.axes import Axes

from crossmae_jax import paths

DPI = 100
INK = "#222222"


def axes(title: str) -> tuple[figure.Figure, Axes]:
    """Returns a figure with one diagram."""
    drawing = figure.Figure(figsize=(9, 5), dpi=DPI, facecolor="white")
    made = drawing.add_axes((0.1, 0.14, 0.86, 0.74))
    made.set_title(title, fontsize=14, color=INK, loc="left")
    made.tick_params(labelsize=12)
    made.grid(axis="y", color="#e5e5e5")
    made.set_axisbelow(True)
    made.spines[["top", "right"]].set_visible(False)
    return drawing, made


def drawable(
    images: Shaped[np.ndarray, "b height width c"],
) -> Float[np.ndarray, "b height width 3"]:
    """Returns images as RGB in 0..1, whatever their number of channels."""
    images = np.clip(images.astype(np.float32), 0, 1)
    if images.shape[-1] >= 3:
        return images[..., :3]
    return np.repeat(images[..., :1], 3, axis=-1)


def save(
    drawing: figure.Figure, path: str | pathlib.Path, *, caption: str = ""
) -> pathlib.Path:
    """Writes a PNG; makes its folder if need be.

    A picture that is there already stays until this one is whole.

    Args:
      caption: goes with the file, for readers of its field "Description".
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Description": caption} if caption else None
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=DPI, metadata=metadata)
    paths.write_whole(path, picture.getvalue())
    return path
