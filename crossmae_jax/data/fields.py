"""What a sample is made of, and the one geometry that all of it follows.

A batch has one array for each `Field` of its transform. Where these are pictures of the
same place (the image, the classes of its pixels, boxes, weights) a single `View` takes
them all from what is stored to what is trained on:

    cut `area` out, resize it to `size`, mirror it, put it onto `canvas`

    pixels     bicubic or bilinear with antialiasing (PIL), to uint8
    raster     nearest neighbour for classes; else the mean over what a cell covers
    boxes      corners move along, and stop at the edge of the view

so a crop or a flip that hits the image but not its labels cannot be written down.

The work is bounded by the canvas. An image 20,000 pixels wide and one high, resized to
256 rows, would have five million columns, of which 224 are seen. So where `size` has
more than 32 times the canvas's pixels, only what is seen of it is made. PIL keeps the
edges of its `box` in single precision, which moves some values by one or two of 255:
that is why sizes below, those of all but needles, are made whole and then cut.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

Bands = tuple[Image.Image, ...]  # images of one or three channels, one after another
Span = tuple[int, int]  # from the first row or column on, up to before the second

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR
}
_WHOLE = 32  # so many times the canvas's pixels are resized and then cut


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
      interpolation: of pixels, one of `INTERPOLATIONS`.
    """

    stored: tuple[int, int]
    area: tuple[float, float, float, float]
    mirrored: bool
    size: tuple[int, int]
    canvas: tuple[int, int]
    interpolation: str = "bicubic"

    def pixels(
        self, bands: Bands, *, fill: int = 0
    ) -> UInt8[np.ndarray, "height width c"]:
        """Returns what is seen of an image, which may be stored at another scale."""
        arrays = [np.asarray(self._resized(band)) for band in bands]
        arrays = [a if a.ndim == 3 else a[..., None] for a in arrays]
        seen = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
        return self._placed(seen, fill)

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
        made = sample(values, (top, bottom), (left, right), self.size, self._seen())
        return self._placed(made, fill)

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

    def _resized(self, band: Image.Image) -> Shaped[np.ndarray, "rows columns ..."]:
        """Returns what is seen of an image, not mirrored yet."""
        left, top, right, bottom = self._area_of((band.height, band.width))
        axes = (
            _Axis(top, bottom, math.floor(top), math.ceil(bottom)),
            _Axis(left, right, math.floor(left), math.ceil(right)),
        )
        seen = self._seen()
        whole = math.prod(self.size) <= _WHOLE * math.prod(self.canvas)
        if not whole:
            axes = map(_Axis.part, axes, self.size, seen)
        rows, columns = axes
        # Cut first: PIL's own `box` would let pixels from outside the area in.
        outer = (columns.first, rows.first, columns.last, rows.last)
        cut = band if outer == (0, 0, *band.size) else band.crop(outer)
        (top, bottom), (left, right) = rows.inner, columns.inner
        kind = INTERPOLATIONS[self.interpolation]
        if whole:
            made = cut.resize(self.size[::-1], kind, box=(left, top, right, bottom))
            return np.asarray(made)[slice(*seen[0]), slice(*seen[1])]
        height, width = (last - first for first, last in seen)
        passes = [
            ((width, cut.height), (left, 0, right, cut.height)),
            ((width, height), (0, top, width, bottom)),
        ]
        # What lies between the passes is rounded, and ends at black and white. So they
        # come in PIL's order, which is columns first unless tall images shrink.
        if band.height > max(band.width, self.size[0]):
            passes = [
                ((cut.width, height), (0, top, cut.width, bottom)),
                ((width, height), (left, 0, right, height)),
            ]
        for size, box in passes:
            cut = cut.resize(size, kind, box=box)
        return np.asarray(cut)

    def _hidden(self) -> tuple[int, int]:
        """Returns how many rows and columns of `size` lie before the canvas begins."""
        return tuple(
            max(0, round((size - canvas) / 2))
            for size, canvas in zip(self.size, self.canvas)
        )

    def _seen(self) -> tuple[Span, Span]:
        """Returns which rows and columns of `size` are seen, before they are mirrored.
        """
        (top, left), (height, width) = self._hidden(), self.size
        bottom = min(height, top + self.canvas[0])
        right = min(width, left + self.canvas[1])
        if self.mirrored:
            left, right = width - right, width - left
        return (top, bottom), (left, right)

    def _placed(self, seen: np.ndarray, fill: int | float) -> np.ndarray:
        """Mirrors what is seen, and puts it onto the canvas."""
        if self.mirrored:
            seen = seen[:, ::-1]
        if seen.shape[:2] == self.canvas:
            return seen
        canvas = np.full((*self.canvas, *seen.shape[2:]), fill, seen.dtype)
        canvas[: seen.shape[0], : seen.shape[1]] = seen
        return canvas


class _Axis(NamedTuple):
    """Rows or columns to resize: from edge to edge, made of whole pixels of an image.
    """

    begin: float
    end: float
    first: int
    last: int

    @property
    def inner(self) -> tuple[float, float]:
        """The edges as seen from the first pixel."""
        return self.begin - self.first, self.end - self.first

    def part(self, size: int, seen: Span) -> "_Axis":
        """Returns which part of the axis is seen when it is resized to `size`.

        A new pixel is made of what is nearer to it than two old pixels, or than two new
        ones where these are larger. PIL's `box` is more precise in a shorter cut, too.
        """
        step = (self.end - self.begin) / size
        begin, end = (self.begin + at * step for at in seen)
        reach = 2 * max(1.0, step) + 1
        first = max(self.first, math.floor(begin - reach))
        return _Axis(begin, end, first, min(self.last, math.ceil(end + reach)))


def _nearest(values, rows, columns, size, seen):
    """Returns the values at the centres of the new cells that are seen."""
    at = []
    axes = zip((rows, columns), values.shape, size, seen)
    for (begin, end), old, new, visible in axes:
        centres = begin + (np.arange(*visible) + 0.5) * ((end - begin) / new)
        at.append(np.clip(np.floor(centres).astype(int), 0, old - 1))
    return values[np.ix_(*at)]


def _means(values, rows, columns, size, seen):
    """Returns the means of values, constant within a cell, over new cells."""
    down = _shares(rows, values.shape[0], size[0], seen[0])
    across = _shares(columns, values.shape[1], size[1], seen[1])
    return (down @ values @ across.T).astype(np.float32)


def _shares(
    span: tuple[float, float], old: int, new: int, seen: Span
) -> Float[np.ndarray, "rows old"]:
    """Returns which share of each new cell that is seen lies in each old cell."""
    begin, end = span
    edges = begin + np.arange(seen[0], seen[1] + 1) * ((end - begin) / new)
    if seen[1] == new:
        edges[-1] = end  # and not beside it by a rounding error
    cells = np.arange(old)
    common = np.minimum(edges[1:, None], cells + 1) - np.maximum(
        edges[:-1, None], cells
    )
    common = np.maximum(common, 0)
    return common / common.sum(axis=1, keepdims=True)
