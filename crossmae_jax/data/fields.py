"""What a sample is made of, and the one geometry that all of it follows.

A batch has one array for each `Field` of its transform. Where these are pictures of the
same place (the image, the classes of its pixels, boxes, weights) a single `View` takes
them all from what is stored to what is trained on:

    cut `area` out, resize it to `size`, mirror it, put it onto `canvas`

    pixels     bicubic with antialiasing (PIL), to uint8
    raster     nearest neighbour for classes; else the mean over what a cell covers
    boxes      corners move along, and stop at the edge of the view

so a crop or a flip that hits the image but not its labels cannot be written down.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

Bands = tuple[Image.Image, ...]  # images of one or three channels, one after another


class Field(NamedTuple):
    """One array of a sample.

    Attributes:
      fill: what it holds where there is nothing: in rows of padding, beside an image
        that does not cover its canvas, behind the last box.
    """

    shape: tuple[int, ...]
    dtype: str
    fill: int | float

    @property
    def num_bytes(self) -> int:
        """The size of one sample's array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class View(NamedTuple):
    """Which part of a stored image is seen, how large, and whether mirrored.

    Heights come before widths; the edges of an area or a box are left, top, right,
    bottom, in pixels of which the first reaches from 0 to 1.

    Attributes:
      stored: size of the whole image, in whose pixels `area` is measured.
      area: what is cut out; it lies within the image.
      mirrored: left and right are exchanged.
      size: what the area is resized to.
      canvas: size of the result. Where `size` is larger its centre is seen; where it is
        smaller it lies at the top left, and the rest is filled.
    """

    stored: tuple[int, int]
    area: tuple[float, float, float, float]
    mirrored: bool
    size: tuple[int, int]
    canvas: tuple[int, int]

    def pixels(
        self, bands: Bands, *, fill: int = 0
    ) -> UInt8[np.ndarray, "height width c"]:
        """Returns what is seen of an image, which may be stored at another scale."""
        arrays = [np.asarray(self._resized(band)) for band in bands]
        arrays = [a if a.ndim == 3 else a[..., None] for a in arrays]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
        return self._placed(whole, fill)

    def raster(
        self,
        values: Shaped[np.ndarray, "rows columns"],
        *,
        nearest: bool,
        fill: int | float,
    ) -> Shaped[np.ndarray, "height width"]:
        """Returns what is seen of values that lie on a grid over the image.

        Args:
          values: the grid covers the whole image and may be coarser or finer.
          nearest: values are numbers of classes: each is that at a cell's centre, of
            the same type. Otherwise values are amounts that are constant within a cell,
            and the result, float32, is their mean over the area of the new cell.
        """
        left, top, right, bottom = self._area_of(values.shape)
        sample = _nearest if nearest else _means
        return self._placed(
            sample(values, (top, bottom), (left, right), self.size), fill
        )

    def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Returns where boxes are seen: left, top, right, bottom on the canvas.

        As many as were given, in the same order: of one that is outside of the view
        nothing is left, and its right edge is its left one, or its bottom its top.
        """
        left, top, right, bottom = self.area
        height, width = self.size
        scale = np.array([width / (right - left), height / (bottom - top)])
        corners = (np.reshape(boxes, (-1, 2, 2)) - (left, top)) * scale  # n corner xy
        if self.mirrored:
            corners[..., 0] = width - corners[:, ::-1, 0]
        corners -= self._hidden()[::-1]
        edges = np.minimum(self.size, self.canvas)[::-1]
        return np.clip(corners, 0, edges).reshape(-1, 4).astype(np.float32)

    def _area_of(self, grid: tuple[int, int]) -> tuple[float, float, float, float]:
        """Returns the area in cells of a grid over the whole image."""
        x, y = grid[1] / self.stored[1], grid[0] / self.stored[0]
        left, top, right, bottom = self.area
        return left * x, top * y, right * x, bottom * y

    def _resized(self, band: Image.Image) -> Image.Image:
        area = self._area_of((band.height, band.width))
        left, top = math.floor(area[0]), math.floor(area[1])
        outer = (left, top, math.ceil(area[2]), math.ceil(area[3]))
        inner = (area[0] - left, area[1] - top, area[2] - left, area[3] - top)
        # Cut first: PIL's own `box` would let pixels from outside the area in.
        cut = band if outer == (0, 0, *band.size) else band.crop(outer)
        return cut.resize(self.size[::-1], Image.Resampling.BICUBIC, box=inner)

    def _hidden(self) -> tuple[int, int]:
        """Returns how many rows and columns of `size` lie before the canvas begins."""
        return tuple(
            max(0, round((size - canvas) / 2))
            for size, canvas in zip(self.size, self.canvas)
        )

    def _placed(self, values: np.ndarray, fill: int | float) -> np.ndarray:
        if self.mirrored:
            values = values[:, ::-1]
        top, left = self._hidden()
        height, width = self.canvas
        seen = values[top : top + height, left : left + width]
        if seen.shape[:2] == self.canvas:
            return seen
        canvas = np.full((height, width, *seen.shape[2:]), fill, seen.dtype)
        canvas[: seen.shape[0], : seen.shape[1]] = seen
        return canvas


def _nearest(values, rows, columns, size):
    """Returns the values at the centres of new cells."""
    at = []
    for (begin, end), old, new in zip((rows, columns), values.shape, size):
        centres = begin + (np.arange(new) + 0.5) * ((end - begin) / new)
        at.append(np.clip(np.floor(centres).astype(int), 0, old - 1))
    return values[np.ix_(*at)]


def _means(values, rows, columns, size):
    """Returns the means of values, constant within a cell, over new cells."""
    down = _shares(rows, values.shape[0], size[0])
    across = _shares(columns, values.shape[1], size[1])
    return (down @ values @ across.T).astype(np.float32)


def _shares(
    span: tuple[float, float], old: int, new: int
) -> Float[np.ndarray, "new old"]:
    """Returns which share of each new cell of the span lies in each old cell."""
    edges = np.linspace(*span, new + 1)
    cells = np.arange(old)
    common = np.minimum(edges[1:, None], cells + 1) - np.maximum(
        edges[:-1, None], cells
    )
    common = np.maximum(common, 0)
    return common / common.sum(axis=1, keepdims=True)
