"""Images that PIL decodes although a part of them is not there.

Cut files are errors of PIL's. But a file can end in good order and still hold less than
its header promises: the compressed rows of a PNG may be fewer than its height, the
strips of a TIFF fewer than its rows. PIL leaves black what it has no values for.

What is missing is black down to the last row, so that only images with a black last row
are counted through, and interlaced ones, whose rows come in seven passes.
"""

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by the colour type of a PNG
# First column and row of each pass, and the steps between them (PNG, 8.2).
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_AT_ONCE = 1 << 20  # bytes that are inflated to be counted


def before_decoding(image: Image.Image) -> str | None:
    """Returns what an opened image lacks, by where its parts are said to lie."""
    parts = {tuple(tile[1]) for tile in getattr(image, "tile", ())}
    covered = sum((right - left) * (low - top) for left, top, right, low in parts)
    if parts and covered < image.width * image.height:
        return f"{covered} of {image.width * image.height} pixels are in the file"
    return None


def after_decoding(image: Image.Image, encoded: bytes) -> str | None:
    """Returns what a decoded PNG lacks, None of any other image."""
    if image.format != "PNG":
        return None
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if any(last_row.tobytes()) and "interlace" not in image.info:
        return None
    promised, there = _promised(encoded), 0
    inflate = zlib.decompressobj()
    try:
        for data in _compressed(encoded):
            while data and there < promised:
                there += len(inflate.decompress(data, _AT_ONCE))
                data = inflate.unconsumed_tail
    except zlib.error:  # behind the rows, or PIL had not decoded it
        return None
    if there < promised:
        return f"image file is truncated ({there} of {promised} bytes of its rows)"
    return None


def _promised(png: bytes) -> int:
    """Returns how many bytes all rows of a PNG have, by its header."""
    header = struct.unpack_from(">IIBBBBB", png, 16)
    width, height, depth, colour, _, _, interlaced = header
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0:
            total += rows * (1 + -(-columns * _SAMPLES[colour] * depth // 8))
    return total


def _compressed(png: bytes) -> Iterator[bytes]:
    """Yields the parts of a PNG's compressed rows."""
    at = 8  # after the signature
    while at + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"IDAT":
            yield png[at + 8 : at + 8 + length]
        at += 12 + length
