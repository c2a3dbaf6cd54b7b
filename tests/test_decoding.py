"""Which files are decoded, and that nothing else than a bad image can come of one."""

import ast
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

import crossmae_jax
from crossmae_jax.data import decoding, listing, pipeline, sources
from tests.image_files import config, encode, pixels, write


def _decoded(image, channels=3):
    return decoding.open_image(image, name="NAME").decode(channels)


def _saved(form, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (16, 16), 77).save(file, form)
    return file.getvalue()


def test_formats_are_those_of_the_endings_that_are_listed():
    known = Image.registered_extensions()
    formats = {known[extension] for extension in listing.EXTENSIONS}
    assert formats == set(decoding.FORMATS)
    for form in decoding.FORMATS:
        assert _decoded(_saved(form))[0].size == (16, 16)
    # Cameras put a preview behind a JPEG, which PIL then calls MPO.
    assert Image.open(io.BytesIO(_saved("MPO"))).format in ("MPO", "JPEG")
    assert _decoded(_saved("MPO"))[0].size == (16, 16)


@pytest.mark.parametrize("form", ["GIF", "ICO", "TGA", "PCX", "SGI", "EPS", "PDF"])
def test_other_formats_are_bad_images_whatever_pil_can_open(form):
    image = _saved(form)
    with pytest.raises(decoding.BadImage) as caught:
        _decoded(image)
    assert str(caught.value) == (
        "NAME: not a known image format (JPEG, PNG, BMP, PPM, TIFF, WEBP) or damaged "
        f"at the start: it begins with {image[:8]!r}"
    )


def test_a_file_of_postscript_starts_no_program(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "gs"
    write(program, f"#!/bin/sh\ntouch {tmp_path}/started\necho 9\n".encode())
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    monkeypatch.setattr(EpsImagePlugin, "gs_windows_binary", None)
    for k in range(8):
        write(tmp_path / f"data/{k}.png", encode(pixels(k, 16, 16)))
    write(tmp_path / "data/8.jpg", _saved("EPS"))
    data = config(dir=str(tmp_path / "data"), max_bad_share=1.0)
    source = sources.make_source(data, "train")
    with pipeline.eval_batches(source, data, batch_size=9) as batches:
        next(batches)
        assert batches.num_bad == 1
    assert not (tmp_path / "started").exists()


def test_every_image_that_is_opened_anywhere_is_of_a_named_format():
    opened = 0
    for path in Path(crossmae_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                "Image.open"
            ):
                opened += 1
                assert "formats" in {k.arg for k in node.keywords}, path
    assert opened >= 4


@pytest.mark.parametrize("error", [
    ZeroDivisionError, AttributeError, RuntimeError, AssertionError, struct.error,
    RecursionError, UnicodeError, MemoryError,
])
@pytest.mark.parametrize("where", [(Image, "open"), (ImageFile.ImageFile, "load")])
def test_whatever_a_decoder_raises_is_a_bad_image(monkeypatch, where, error):
    def fail(*_, **__):
        raise error("what a damaged file does")

    image = encode(pixels(0, 16, 16))
    monkeypatch.setattr(*where, fail)
    with pytest.raises(decoding.BadImage, match=f"^NAME: {error.__name__}: what a dam"):
        _decoded(image)


# Images of which a part is not there.


def _chunk(kind, data):
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def _png(width, height, data, *, depth=8, colour=2, interlaced=0):
    """A PNG in good order, of any compressed rows."""
    header = struct.pack(
        ">IIBBBBB", width, height, depth, colour, 0, 0, interlaced
    )
    rows = zlib.compress(data)
    half = len(rows) // 2
    return b"\x89PNG\r\n\x1a\n" + b"".join((
        _chunk(b"IHDR", header), _chunk(b"IDAT", rows[:half]),
        _chunk(b"IDAT", rows[half:]), _chunk(b"IEND", b""),
    ))


@pytest.mark.parametrize("depth,colour,row", [
    (8, 2, 21), (8, 6, 28), (8, 0, 7), (16, 0, 14), (1, 0, 1), (8, 4, 14),
])
@pytest.mark.parametrize("missing", [1, 11_990])
def test_a_png_of_fewer_rows_than_its_height_is_a_bad_image(
    depth, colour, row, missing
):
    there = (b"\0" + b"\xc8" * row) * (12_000 - missing)
    image = _png(7, 12_000, there, depth=depth, colour=colour)
    total = 12_000 * (row + 1)
    reason = rf"^NAME: .*truncated \({len(there)} of {total} bytes of its rows\)"
    with pytest.raises(decoding.BadImage, match=reason):
        _decoded(image)


def test_an_interlaced_png_of_one_pass_is_a_bad_image():
    # Rows and columns of the passes, counted by hand: 5 x 3 pixels of one byte.
    passes = ((1, 1), (1, 1), (0, 2), (1, 1), (1, 3), (2, 2), (1, 5))
    data = b"".join((b"\0" + b"\xc8" * columns) * rows for rows, columns in passes)
    whole = _png(5, 3, data, colour=0, interlaced=1)
    assert (np.asarray(_decoded(whole)[0]) == 200).all()
    # Of 16 x 9 the first pass has 2 x 2 pixels, two of them in the last row; in all
    # there are 6 + 6 + 5 + 15 + 18 + 45 + 68 bytes.
    with pytest.raises(decoding.BadImage, match="truncated .6 of 163 bytes"):
        _decoded(_png(16, 9, b"\0\xc8\xc8" * 2, colour=0, interlaced=1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_black_images_are_images(mode):
    for size in ((1, 1), (300, 2), (9, 1200)):
        file = io.BytesIO()
        Image.new(mode, size).save(file, "PNG")
        assert _decoded(file.getvalue())[0].size == size


def test_a_tiff_of_fewer_strips_than_rows_is_a_bad_image():
    file = io.BytesIO()
    Image.new("L", (64, 64), 77).save(file, "TIFF", tiffinfo={278: 8})
    whole = file.getvalue()
    assert _decoded(whole)[0].size == (64, 64)
    offsets = struct.pack("<HHI", 273, 4, 8)
    assert offsets in whole
    fewer = whole.replace(offsets, struct.pack("<HHI", 273, 4, 5))
    with pytest.raises(decoding.BadImage, match="2560 of 4096 pixels are in the file"):
        _decoded(fewer)
