"""Files of strangers, changed at random: each is read, or refused with its own error.

Whatever lies in a file, its reader returns or raises what its docstring says, within
memory and seconds that the size of the file warrants. Hypothesis changes small valid
files: bytes are flipped, cut, put in and repeated, lengths in headers become others,
and trees of JSON lose, gain and exchange their parts.

The examples are the same each time, whatever other tests run. More of them, and others
each time:

    FUZZ_EXAMPLES=20000 python -m pytest -n 2 tests/test_fuzz.py

What was found stands below as ordinary tests; put there what you find.
"""

import ast
import contextlib
import copy
import html.parser
import io
import json
import os
import resource
import shutil
import signal
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from crossmae_jax import errors
from crossmae_jax.checkpoints import digests
from crossmae_jax.convert import cards, names, opened, opening, structure
from crossmae_jax.convert.files import safetensors_file, tensor, torch_file
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.data import bad_images, decoding, sources
from crossmae_jax.data.sets import digits
from crossmae_jax.report import run_page
from crossmae_jax.runs import metrics, workdir
from tests import image_files, torch_files
from tests.saved_runs import tiny_config

_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
_MOST_SECONDS = 20  # of the processor, for one file of some kilobytes
_MOST_BYTES = 1_000_000_000  # of addresses, beside what the tests have already


if not _EXAMPLES:
    # Hypothesis also takes constants out of the modules that happen to be loaded, and
    # examples would depend on the tests before. There is no public setting for it.
    providers._get_local_constants = lambda none=providers._local_constants: none


def fuzzed(examples, **strategies):
    """Runs a test with so many files, or as many as FUZZ_EXAMPLES says."""
    def decorate(test):
        return settings(
            max_examples=_EXAMPLES or examples, derandomize=not _EXAMPLES,
            database=None, deadline=None, suppress_health_check=list(HealthCheck),
            # To find the smallest input of a finding may take minutes.
            phases=list(Phase) if _EXAMPLES else [Phase.generate],
        )(given(**strategies)(test))

    return decorate


def _too_long(*_):
    raise AssertionError(f"a small file took {_MOST_SECONDS} s of the processor")


@contextlib.contextmanager
def _limits():
    """Allows what runs inside some memory beside what there is, and some seconds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)
    if os.path.exists("/proc/self/statm"):  # Linux
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def refused_with(*kinds):
    """Allows a reader nothing but these errors."""
    try:
        with _limits():
            yield
    except kinds as error:
        assert not isinstance(error, UnicodeError), "not what a user can act on"


# What is done to bytes: a place, as a share of the file, and what happens there.
_LENGTHS = st.sampled_from([
    b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0" * 8, b"\0\0\0\x80\0\0\0\0",
    b"\x40\x42\x0f\0\0\0\0\0",
])
_EDITS = st.tuples(
    st.floats(0, 1),
    st.one_of(
        st.tuples(st.just("flip"), st.integers(1, 255)),
        st.tuples(st.just("put"), st.binary(min_size=1, max_size=6)),
        st.tuples(st.just("over"), st.one_of(_LENGTHS, st.binary(max_size=4))),
        st.tuples(st.just("drop"), st.integers(1, 40)),
        st.tuples(st.just("again"), st.integers(1, 40)),
        st.tuples(st.just("cut"), st.none()),
    ),
)
edits = st.lists(_EDITS, min_size=1, max_size=4)


def edited(content, changes):
    """Returns bytes with changes made, one after the other."""
    for share, (what, value) in changes:
        at = round(share * max(0, len(content) - 1))
        before, after = content[:at], content[at:]
        if what == "flip" and after:
            content = before + bytes([after[0] ^ value]) + after[1:]
        elif what == "put":
            content = before + value + after
        elif what == "over":
            content = before + value + after[len(value):]
        elif what == "drop":
            content = before + after[value:]
        elif what == "again":
            content = before + after[:value] + after
        elif what == "cut":
            content = before
    return content


# What a value of JSON becomes. Numbers larger than any float are valid JSON, too.
_DEEP = json.loads("[" * 200 + "]" * 200)
_JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5),
    st.sampled_from([
        10**400, -(10**400), 2**31, 2**63, 1e308, float("nan"), float("inf"), 0.5,
        "", "x", "\ud800", "\0", "../x", "/x", "<script>", "W32-D99999999-H2/4",
        "W-1-D0-H0/0", [], {}, [[]], {"": {}}, [None] * 5, {"kind": "vit"},
        {"kind": ["mae"]}, "9" * 5000, _DEEP,
    ]),
    st.text(max_size=5), st.lists(st.integers(-1, 300), max_size=4),
)
_JSON_EDITS = st.tuples(
    st.integers(0, 10**6), st.sampled_from(["becomes", "goes", "gains", "moves"]), _JUNK
)
json_edits = st.lists(_JSON_EDITS, min_size=1, max_size=3)


def _nodes(tree):
    """Returns each place in a tree, as what holds it and its key there."""
    found, level = [], [tree]
    while level:
        holder = level.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                level.append(holder[key])
    return found


def edited_tree(tree, changes):
    """Returns a tree of JSON with changes made, one after the other."""
    tree = copy.deepcopy(tree)
    for number, what, junk in changes:
        junk, nodes = copy.deepcopy(junk), _nodes(tree)
        if not nodes:
            return junk
        holder, key = nodes[number % len(nodes)]
        if what == "becomes":
            holder[key] = junk
        elif what == "goes":
            del holder[key]
        elif what == "gains" and isinstance(holder, dict):
            holder[f"{key}x"] = junk
        elif what == "moves":
            holder[key] = {"kind": holder[key]}
    return tree


def _text(tree):
    return json.dumps(tree).encode()


# Bytes that no edit of a small tree gives.
ODD_JSON = [
    b"", b"\xff\xfe", b"\xef\xbb\xbf{}", b"null", b"[]", b"7", b"[" * 100_000,
    b'{"a":' * 100_000, b"9" * 100_000, b'{"a": ' + b"9" * 100_000 + b"}", b"{}{}",
    b'{"a": NaN}', b'"\\ud800"', b"\0" * 9,
]


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
    text = _text(edited_tree(json.loads(whole[8:8 + length]), changes))
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
    (path / "config.json").write_bytes(_text(edited_tree(tree, changes)))
    if not (path / "model.safetensors").exists():
        safetensors_file.write(path / "model.safetensors", FEW, {"format": "pt"})
    _open(path)


@pytest.mark.parametrize("text", ODD_JSON, ids=range(len(ODD_JSON)))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_settings_that_are_no_json(tmp_path, name, text):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / name).write_bytes(text)
    _open(tmp_path)


# A workdir.


@pytest.fixture(scope="module")
def run_files():
    """The small files of a run that was made, as trees and as bytes."""
    config = json.loads(tiny_config("digits_cross").to_json())
    return {
        "config.json": config,
        "dataset.json": {
            "num_images": 40, "fingerprint": "40-ab", "classes": ["a", "b"],
            "content": "0:ab 1:cd",
        },
        "environment.json": {
            "versions": {"jax": "1"}, "devices": ["cpu", "cpu"], "processes": 1,
            "command": ["python", "-m", "x"],
        },
        "time.json": {
            "seconds": {
                "steps": 1.5, "data": 0.1, "compile": 2.0, "evaluate": 0.5,
                "save": 0.1, "start": 1.0, "restart": 0.0,
            },
            "until": 1.7e9, "saved_steps": 1.5, "finished": True,
        },
        "results.json": {
            "train/loss": 0.5, "eval/knn/top1": 0.5, "pixels/knn/top1": 0.25,
            "eval/accuracy/top1": 0.5, "eval/accuracy/images": 10,
        },
        "best/best.json": {
            "metric": "eval/knn/top1", "value": 0.5, "step": 2, "higher": True,
        },
    }


METRICS = b"".join(
    json.dumps({"step": step, "train/loss": 1 / step, "train/epoch": 0.5 * step})
    .encode() + b"\n" for step in range(1, 6)
)


@pytest.fixture
def run(run_files, tmp_path):
    for name, tree in run_files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(_text(tree))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_bytes(METRICS)
    return tmp_path


def _read_run(path):
    """Reads all that there is to read of a run; a page can always be made of it."""
    with refused_with(errors.UserError, FileNotFoundError):
        workdir.read_config(path)
    with refused_with(errors.UserError):
        workdir.read_classes(path)
    with refused_with(ValueError):
        metrics.rows(path / "metrics.jsonl")
    with refused_with(ValueError):
        metrics.curves(path / "metrics.jsonl")
    with refused_with(errors.UserError):
        run_page.write(path)


RUN_FILES = (
    "config.json", "dataset.json", "environment.json", "time.json", "results.json",
    "best/best.json",
)


@pytest.mark.parametrize("name", RUN_FILES)
def test_files_of_a_run(run, run_files, name, capsys):
    (run / "metrics.jsonl").write_bytes(b"")  # whose curves take time to draw

    @fuzzed(60, changes=json_edits)
    def change(changes):
        (run / name).write_bytes(_text(edited_tree(run_files[name], changes)))
        _read_run(run)

    change()


@pytest.mark.parametrize("text", ODD_JSON, ids=range(len(ODD_JSON)))
def test_files_of_a_run_that_are_no_json(run, text):
    (run / "metrics.jsonl").write_bytes(b"")
    for name in RUN_FILES:
        (run / name).write_bytes(text)
        _read_run(run)


def test_metrics(run):
    @fuzzed(25, changes=edits)
    def change(changes):
        (run / "metrics.jsonl").write_bytes(edited(METRICS, changes))
        _read_run(run)

    change()


@pytest.mark.parametrize("line", [
    b'{"step": ' + b"9" * 5000 + b"}", b'{"step": ' + b"9" * 400 + b', "a": 1}',
    b'{"step": 1, "a": ' + b"9" * 400 + b"}", b'{"step": 1, "a": 1e999}',
    b'{"step": -5, "\\ud800": 1}', b'{"step": true, "train/loss": false}', *ODD_JSON,
])
def test_odd_lines_of_metrics(run, line):
    (run / "metrics.jsonl").write_bytes(METRICS + line + b"\n")
    _read_run(run)


def test_lists_of_bad_images(tmp_path):
    listed = bad_images.BadImages(5, 1.0, str(tmp_path))
    listed.add(3, [bad_images.Bad(f"a/{k}.png", "cut short", k, k) for k in range(3)])
    path = tmp_path / "bad_images.jsonl"
    whole = path.read_bytes()

    class Source:
        def __len__(self):
            return 5

        def name(self, index):
            return f"a/{index}.png"

    @fuzzed(150, changes=edits)
    def change(changes):
        path.write_bytes(edited(whole, changes))
        with refused_with():
            bad_images.listed(tmp_path)
            again = bad_images.BadImages(5, 1.0, str(tmp_path))
            again.resume(Source(), 10, lambda index: 1)
            again.add(1, [bad_images.Bad("a/4.png", "cut", 4, 4)])

    change()


def test_lists_of_digests(tmp_path):
    (tmp_path / "part" / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        (tmp_path / "part" / name).write_text(name)
    digests.write(tmp_path)
    whole = (tmp_path / digests.LIST).read_bytes()
    assert digests.damage(tmp_path, ("part",)) is None

    @fuzzed(150, changes=edits)
    def change(changes):
        content = edited(whole, changes)
        (tmp_path / digests.LIST).write_bytes(content)
        with refused_with():
            found = digests.damage(tmp_path, ("part",))
            assert found or set(content.split()) == set(whole.split())

    change()


# A TFDS data set.


@pytest.fixture(scope="module")
def tfds_set(tmp_path_factory):
    prepared = digits.prepare(str(tmp_path_factory.mktemp("digits")))
    folder = tmp_path_factory.mktemp("sets") / digits.NAME / "1.0.0"
    shutil.copytree(f"{prepared}/{digits.NAME}/1.0.0", folder)
    return folder


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_metadata_of_a_tfds_set(tfds_set, name):
    whole = (tfds_set / name).read_bytes()
    tree = json.loads(whole)

    def check(content):
        (tfds_set / name).write_bytes(content)
        with refused_with(ValueError):
            source = sources.TfdsSource(
                digits.NAME, data_dir=str(tfds_set.parent.parent), split="train"
            )
            assert len(source) >= 0 and source.name(0)

    @fuzzed(60, changes=json_edits)
    def change_tree(changes):
        check(_text(edited_tree(tree, changes)))

    @fuzzed(30, changes=edits)
    def change_bytes(changes):
        check(edited(whole, changes))

    try:
        change_tree()
        change_bytes()
        for text in ODD_JSON:
            check(text)
    finally:
        (tfds_set / name).write_bytes(whole)


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
    with _limits(), pytest.raises(ConversionError, match=message):
        opening.open_weights(path)


@pytest.mark.parametrize("statistics", [[0.5, None, 0.5], [10**400] * 3, {"a": 1}])
def test_statistics_of_timm_that_are_no_numbers_are_refused(tmp_path, statistics):
    config = {"mean": [0.5] * 3, "std": statistics, "architecture": "vit"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors_file.write(tmp_path / "model.safetensors", FEW, {"format": "pt"})
    with pytest.raises(ConversionError):
        opening.open_weights(tmp_path)


@pytest.mark.parametrize("change", [
    lambda config: config.update(model={"decoder": None}),
    lambda config: config["data"].update(batch_size="8"),
    lambda config: config["model"].pop("encoder"),
])
def test_a_configuration_of_other_kinds_is_refused(run, run_files, change):
    config = copy.deepcopy(run_files["config.json"])
    change(config)
    (run / "config.json").write_bytes(_text(config))
    with pytest.raises(errors.SetupError, match="config.json is damaged"):
        workdir.read_config(run)
    with pytest.raises(errors.SetupError, match="config.json is damaged"):
        run_page.write(run)


def test_classes_that_are_no_names_are_refused(run):
    (run / "dataset.json").write_text('{"classes": [null, "b"]}')
    with pytest.raises(errors.SetupError, match="its classes are no list of names"):
        workdir.read_classes(run)


@pytest.mark.parametrize("name, content", [
    ("dataset.json", {"num_images": None}),
    ("environment.json", {"versions": None}),
    ("environment.json", {"devices": [[]]}),
    ("time.json", {"seconds": None}),
    ("time.json", {
        "seconds": {"steps": 1.0}, "saved_steps": 1.0, "until": 1e300,
        "finished": False,
    }),
    ("best/best.json", {"metric": None, "value": 1, "step": 1}),
])
def test_a_page_leaves_out_what_is_none_of_ours(run, capsys, name, content):
    (run / name).write_text(json.dumps(content))
    (run / "metrics.jsonl").write_bytes(b"")
    run_page.write(run)
    assert f"{run / name} is damaged (not what is written there" in (
        capsys.readouterr().out
    )


def test_a_page_does_without_the_number_of_images_of_an_accuracy(run, run_files):
    results = dict(run_files["results.json"])
    del results["eval/accuracy/images"]
    (run / "results.json").write_bytes(_text(results))
    assert "Accuracy, top-1" in run_page.write(run).read_text()


@pytest.mark.parametrize("line", [
    b'{"step": ' + b"9" * 400 + b"}", b'{"step": 1, "a": ' + b"9" * 400 + b"}",
    b'{"step": -5}', b'{"step": true}',
])
def test_numbers_that_nothing_can_be_computed_with_are_no_metrics(run, line):
    (run / "metrics.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="line 1 is not an object with a step"):
        metrics.rows(run / "metrics.jsonl")


def test_a_tfds_set_whose_metadata_is_none_is_refused(tfds_set):
    path = tfds_set / "dataset_info.json"
    whole = path.read_bytes()
    path.write_text('{"supervisedKeys": {"tuple": {"items": [null]}}}')
    try:
        with pytest.raises(ValueError, match="'sklearn_digits' .* cannot be read"):
            sources.TfdsSource(
                digits.NAME, data_dir=str(tfds_set.parent.parent), split="train"
            )
    finally:
        path.write_bytes(whole)


# Names of files, which may be anything that a file system takes.


class _Tags(html.parser.HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.attributes += [name for name, _ in attributes]


_NAMES = st.one_of(
    st.sampled_from([
        "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='x",
        "a\nb", "&lt;", "</pre><iframe>", "$(touch x)", "`x`", "; rm x", "-x", "%00",
    ]),
    st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1),
)


@fuzzed(30, name=_NAMES, metric=_NAMES)
def test_names_are_text_on_a_page(run_files, folder, name, metric):
    home = folder / "named"
    for file in ("config.json", "dataset.json", "environment.json", "results.json"):
        tree = copy.deepcopy(run_files[file])
        if file == "config.json":
            tree["data"].update(source="folder", dir=f"/{name}")
        if file == "dataset.json":
            tree["classes"] = [name, "b"]
        if file == "environment.json":
            tree["command"] += [f"--config={name}"]
        if file == "results.json":
            tree[metric] = 0.5
        home.mkdir(exist_ok=True)
        (home / file).write_bytes(_text(tree))
    page = run_page.write(home, name=name).read_text()
    plain = run_page.write(home, name="plain").read_text()
    tags = _Tags(page)
    expected = {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p",
        "code", "span", "nav", "ul", "li", "a", "main", "section", "dl", "div", "dt",
        "dd", "table", "thead", "tbody", "tr", "th", "td", "wbr", "pre", "footer",
    }
    assert set(tags.found) <= expected
    assert set(tags.attributes) <= {
        "lang", "charset", "name", "content", "class", "id", "href", "aria-label",
    }
    assert len(page) and _Tags(plain).found.count("section") == (
        tags.found.count("section")
    )


def test_nothing_that_is_started_is_read_by_a_shell():
    """Programs get lists of arguments, so names of files are never commands."""
    root = Path(__file__).parents[1] / "crossmae_jax"
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("os.system", "os.popen", "exec", "eval"), path
                assert not any(key.arg == "shell" for key in node.keywords), path
                if called.startswith("subprocess."):
                    first = node.args[0]
                    assert isinstance(first, (ast.List, ast.Name)), path
