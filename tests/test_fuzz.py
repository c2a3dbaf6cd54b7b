"""Images and weights of strangers, changed at random: read, or refused with own errors.

Whatever lies in a file, its reader returns or raises what its docstring says, within
memory and seconds that the size of the file warrants; see `fuzzing`. What was found
stands below as ordinary tests; put there what you find.
"""

import copy
import io
import json
import shutil
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import strategies as st

from crossmae_jax.convert import cards, names, opened, opening, structure
from crossmae_jax.convert.files import safetensors_file, tensor, torch_file
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.data import decoding
from tests import image_files, torch_files
from tests.fuzzing import (
    ODD_JSON,
    edited,
    edited_tree,
    edits,
    fuzzed,
    json_edits,
    limits,
    refused_with,
    text_of,
)
from tests.saved_runs import tiny_config


# Images.


IMAGES = {
    "jpeg": image_files.encode(image_files.pixels(0, 20, 30), "JPEG"),
    "progressive": image_files.encode(
        image_files.pixels(0, 20, 30), "JPEG", progressive=True
    ),
    "png": image_files.encode(image_files.pixels(1, 12, 9), "PNG"),
    "grey": image_files.encode(image_files.pixels(1, 12, 9, 1), "PNG"),
    "bmp": image_files.encode(image_files.pixels(2, 8, 8), "BMP"),
    "ppm": image_files.encode(image_files.pixels(2, 8, 8), "PPM"),
    "tiff": image_files.encode(image_files.pixels(3, 8, 8), "TIFF"),
    "lzw": image_files.encode(
        image_files.pixels(3, 8, 8), "TIFF", compression="tiff_lzw"
    ),
    "webp": image_files.encode(image_files.pixels(4, 16, 16), "WEBP"),
}


def _decode(content, channels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about metadata
        with refused_with(decoding.BadImage, decoding.ChannelMismatch):
            picture = decoding.open_image(content, name="x", max_pixels=1_000_000)
            bands = picture.decode(channels)
            assert all(band.size == picture.size[::-1] for band in bands)


@fuzzed(300, name=st.sampled_from(sorted(IMAGES)), changes=edits,
        channels=st.sampled_from([1, 3]))
def test_images(name, changes, channels):
    _decode(edited(IMAGES[name], changes), channels)


# Weights.


@pytest.fixture(scope="module")
def card():
    return cards.of_run(tiny_config("digits_cross"), step=3, origin="runs/x")


@pytest.fixture(scope="module")
def card_tree(card):
    return json.loads(card.to_json())


@pytest.fixture(scope="module")
def weights(card):
    """Tensors of the card's model, of which the values take no memory."""
    expected = names.without_collections(structure.abstract_variables(card))
    return {
        name: tensor.of_array(np.zeros(leaf.shape, leaf.dtype))
        for name, leaf in expected.items()
    }


def _read_card(text):
    with refused_with(ConversionError):
        card = cards.from_json(text)
        assert card.lines()
        cards.from_json(card.to_json())


@fuzzed(200, changes=json_edits)
def test_cards(card_tree, changes):
    _read_card(json.dumps(edited_tree(card_tree, changes)))


@pytest.mark.parametrize("text", ODD_JSON, ids=range(len(ODD_JSON)))
def test_cards_that_are_no_json(text):
    _read_card(text.decode("latin1"))


def _open(path):
    with refused_with(ConversionError):
        opened_weights = opening.open_weights(path)
        for value in opened_weights.tensors.values():
            value.read()


@fuzzed(15, changes=json_edits)
def test_cards_beside_their_weights(card_tree, weights, tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("w", numbered=True) / "model.safetensors"
    text = json.dumps(edited_tree(card_tree, changes))
    safetensors_file.write(path, weights, {opened.CARD: text})
    _open(path)
    shutil.rmtree(path.parent)


FEW = {
    "patch_embed.proj.weight": tensor.of_array(np.zeros((2, 3, 2, 2), np.float32)),
    "b": tensor.of_array(np.arange(3)), "c": tensor.of_array(np.zeros((), bool)),
}


def _read_tensors(reader, path):
    with refused_with(ValueError):
        content = reader(path)
        level = [content]
        while level:
            for value in list(level.pop().values()):
                if isinstance(value, dict):
                    level.append(value)
                elif isinstance(value, tensor.Tensor):
                    value.read()


def _tensors_of_safetensors(path):
    return safetensors_file.read(path)[0]


def _dictionary(path):
    content = torch_file.read(path)
    return content if isinstance(content, dict) else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def small_files(folder):
    safetensors_file.write(folder / "a.safetensors", FEW, {"format": "pt"})
    torch_file.write(folder / "a.pth", {"model": FEW})
    described = torch_files.built(torch_files.stored(), 0, (2, 2), (2, 1))
    torch_files.make(
        folder / "b.pth", "legacy",
        b"}(" + torch_files.plain("w") + described + b"u",
    )
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "b.pth"])
def test_files_of_weights(small_files, folder, name):
    reader = _tensors_of_safetensors if name.endswith("tensors") else _dictionary
    path = folder / f"changed_{name}"

    @fuzzed(150, changes=edits)
    def change(changes):
        path.write_bytes(edited(small_files[name], changes))
        _read_tensors(reader, path)
        _open(path)

    change()


@fuzzed(150, changes=json_edits)
def test_headers_of_safetensors(small_files, folder, changes):
    whole, path = small_files["a.safetensors"], folder / "header.safetensors"
    length = int.from_bytes(whole[:8], "little")
    text = text_of(edited_tree(json.loads(whole[8:8 + length]), changes))
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length:])
    _read_tensors(_tensors_of_safetensors, path)


@fuzzed(150, changes=edits)
def test_pickles_inside_of_pytorch_files(small_files, folder, changes):
    path = folder / "inside.pth"
    with zipfile.ZipFile(io.BytesIO(small_files["a.pth"])) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            inside = name.endswith("data.pkl")
            archive.writestr(name, edited(content, changes) if inside else content)
    _read_tensors(_dictionary, path)


# A folder of another library.


@fuzzed(150, changes=json_edits, which=st.sampled_from(["timm", "huggingface"]))
def test_settings_of_other_libraries(folder, changes, which):
    tree = {
        "timm": {
            "architecture": "vit_tiny_patch16_224", "num_classes": 0,
            "pretrained_cfg": {
                "input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3,
            },
        },
        "huggingface": {
            "model_type": "vit_mae", "image_size": 4, "patch_size": 2, "hidden_size": 2,
            "num_attention_heads": 1, "num_hidden_layers": 1, "mask_ratio": 0.75,
            "norm_pix_loss": False, "decoder_hidden_size": 2, "num_channels": 3,
        },
    }[which]
    path = folder / which
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes(text_of(edited_tree(tree, changes)))
    if not (path / "model.safetensors").exists():
        safetensors_file.write(path / "model.safetensors", FEW, {"format": "pt"})
    _open(path)


@pytest.mark.parametrize("text", ODD_JSON, ids=range(len(ODD_JSON)))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_settings_that_are_no_json(tmp_path, name, text):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / name).write_bytes(text)
    _open(tmp_path)


# What was found so far, by its smallest input.


def test_a_card_with_a_target_of_no_kind_is_refused(card_tree):
    with pytest.raises(ConversionError, match="A card cannot be read .KeyError: 'kind"):
        cards.from_json(json.dumps(card_tree | {"target": {"normalize": True}}))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_a_card_that_is_nested_without_end_is_refused(text):
    with pytest.raises(ConversionError, match="nested too deeply"):
        cards.from_json(text)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_settings_that_are_nested_without_end_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ConversionError, match=f"{name} is no JSON: nested too deeply"):
        opening.open_weights(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda card: card["model"]["encoder"].update(size="W16-D9999999-H2/4"),
     "A card cannot be read .*: 9999999 blocks"),
    (lambda card: card["model"]["encoder"].update(size="W16-D9999-H2/4"),
     "its card has more blocks than the file has tensors for"),
    (lambda card: card["model"]["decoder"].update(depth=10**9),
     "its card has more blocks than the file has tensors for"),
    (lambda card: card.update(image_size=[2**20, 2**20]),
     "its card has more patches than the file has tensors for"),
    (lambda card: card["masking"].update(throw_ratio={"kind": 0.0}),
     "its card is none of a model"),
])
def test_a_card_may_only_be_of_a_model_that_the_file_can_hold(
    card_tree, weights, tmp_path, change, message
):
    changed, path = copy.deepcopy(card_tree), tmp_path / "model.safetensors"
    change(changed)
    safetensors_file.write(path, weights, {opened.CARD: json.dumps(changed)})
    with limits(), pytest.raises(ConversionError, match=message):
        opening.open_weights(path)


@pytest.mark.parametrize("statistics", [[0.5, None, 0.5], [10**400] * 3, {"a": 1}])
def test_statistics_of_timm_that_are_no_numbers_are_refused(tmp_path, statistics):
    config = {"mean": [0.5] * 3, "std": statistics, "architecture": "vit"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors_file.write(tmp_path / "model.safetensors", FEW, {"format": "pt"})
    with pytest.raises(ConversionError):
        opening.open_weights(tmp_path)
