"""Which files are decoded, and that nothing else than a bad image can come of one."""

import ast
import io
import os
import struct
from pathlib import Path

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
