"""Folders, TFDS sets, the digits: what is found, in which order, and what is said."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

import crossmae_jax.data
from crossmae_jax.commands import data as command
from crossmae_jax.data import sources, transforms
from crossmae_jax.data.sets import digits
from tests.image_files import config, encode, pixels, write

PNG = encode(pixels(0, 16, 16))


def _names(source):
    paths = [source.name(i) for i in range(len(source))]
    return [os.path.relpath(path, source.directory) for path in paths]


def _folder(root, *names):
    for name in names:
        write(root / name, PNG)
    return sources.make_source(config(dir=str(root)), "train")


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return digits.prepare(str(tmp_path_factory.mktemp("digits")))


# Folders.


def test_folder_is_read_at_any_depth_in_one_order(tmp_path):
    source = _folder(
        tmp_path, "b/z.JPG", "a/deep/er/y.png", "c.jpeg", "a/x.tif", "a-b/w.bmp",
        "a/u.webp", "a/t.tiff", "ä/ö.png",
    )
    assert _names(source) == [
        "a-b/w.bmp", "a/deep/er/y.png", "a/t.tiff", "a/u.webp", "a/x.tif", "b/z.JPG",
        "c.jpeg", "ä/ö.png",
    ]
    assert source[0]["image"] == PNG
    assert source[0]["name"] == str(tmp_path / "a-b/w.bmp")
    assert len(source) == 8


def test_first_level_folders_are_classes(tmp_path):
    source = _folder(tmp_path, "dog/2.png", "cat/x/1.png", "dog/0.png")
    assert source.classes == ("cat", "dog") and len(source.classes) == 2
    assert source.kinds == {"label"}
    assert [source[i]["label"] for i in range(3)] == [0, 1, 1]


@pytest.mark.parametrize("names", [
    ("cat/1.png", "dog/1.png", "3.png"),  # one image lies outside
    ("cat/1.png", "cat/dog/2.png"),  # one folder is no choice
    ("1.png", "2.png"),
])
def test_other_folders_have_no_labels(tmp_path, names):
    source = _folder(tmp_path, *names)
    assert source.classes == () and source.kinds == set()
    assert all(source[i].keys() == {"name", "image"} for i in range(len(source)))


def test_folders_without_images_are_no_classes(tmp_path):
    write(tmp_path / "notes/readme.txt", b"")
    assert _folder(tmp_path, "cat/1.png", "dog/1.png").classes == ("cat", "dog")


def test_evaluation_folder_uses_the_class_numbers_of_training(tmp_path):
    for name in ("train/ant/1.png", "train/bee/1.png", "train/cat/1.png",
                 "test/bee/1.png", "test/cat/1.png"):
        write(tmp_path / name, PNG)
    data = config(dir=str(tmp_path / "train"), eval_dir=str(tmp_path / "test"))
    source = sources.make_source(data, "eval")
    assert [source[i]["label"] for i in range(2)] == [1, 2] and len(source.classes) == 3
    write(tmp_path / "test/dog/1.png", PNG)
    with pytest.raises(ValueError, match="'dog' is none of the 3"):
        sources.make_source(data, "eval")
    data.eval_dir = ""
    assert sources.make_source(data, "eval") is None


def test_links_are_followed_once_and_loops_end(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    write(outside / "far.png", PNG)
    write(root / "b/near.png", PNG)
    (root / "b/up").symlink_to(root)
    (root / "a").symlink_to(root / "b")
    (root / "link").symlink_to(outside)
    (root / "link2").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (root / "file.png").symlink_to(outside / "far.png")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    assert _names(_folder(root)) == ["b/near.png", "file.png", "link/far.png"]


def test_hidden_files_are_skipped(tmp_path):
    # macOS leaves such files on foreign disks; they are no images.
    assert _names(_folder(tmp_path, "a.png", "._a.png", ".trash/b.png")) == ["a.png"]


def test_empty_folder_says_what_was_found(tmp_path):
    for k in range(12):
        write(tmp_path / f"phone/{k}.HEIC", b"")
    for k in range(3):
        write(tmp_path / f"notes/{k}.txt", b"")
    with pytest.raises(ValueError) as caught:
        _folder(tmp_path)
    assert str(caught.value) == (
        f"No images under {tmp_path}. Looked for .jpg .jpeg .jpe .jfif .png .webp .tif "
        ".tiff .bmp .ppm .pgm .pbm .pnm. Found instead: 12 .heic, 3 .txt."
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Found instead: no files at all"):
        _folder(tmp_path / "empty")


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected a directory"):
        sources.make_source(config(dir=str(tmp_path / "nowhere")), "train")
    write(tmp_path / "file", b"")
    with pytest.raises(ValueError, match="is a file; expected a directory"):
        sources.make_source(config(dir=str(tmp_path / "file")), "train")
    with pytest.raises(ValueError, match="--config.data.dir=DIR"):
        sources.make_source(config(), "train")


def test_unknown_source_lists_the_known():
    with pytest.raises(ValueError, match="'web'. Known: digits, folder, tfds."):
        sources.make_source(config(source="web"), "train")


def test_fingerprint_follows_names_and_order(tmp_path):
    first = _folder(tmp_path / "x", "a.png", "bc.png").fingerprint
    assert first == _folder(tmp_path / "copy", "a.png", "bc.png").fingerprint
    assert first.startswith("2-")
    assert first != _folder(tmp_path / "y", "ab.png", "c.png").fingerprint
    assert first != _folder(tmp_path / "x", "d.png").fingerprint


def test_sources_are_small_to_send_and_have_a_stable_name(tmp_path, digits_dir):
    folder = _folder(tmp_path, *(f"class{k % 3}/{k}.png" for k in range(300)))
    split = sources.TfdsSource(digits.NAME, data_dir=digits_dir, split="train")
    assert split[0]["image"]  # an open reader must not travel
    for source, limit in ((folder, 300 * 32 + 2000), (split, 2000)):
        sent = pickle.dumps(source)
        assert len(sent) < limit
        received = pickle.loads(sent)
        assert repr(received) == repr(source) and " at 0x" not in repr(source)
        assert received.fingerprint == source.fingerprint
        assert received[5] == source[5]


# TFDS sets.


def test_digits_are_those_of_scikit_learn(digits_dir):
    from sklearn import datasets

    values, labels = datasets.load_digits(return_X_y=True)
    rows = []
    for split, sign in (("train", 1), ("test", -1)):
        source = sources.make_source(
            config(source="digits", data_dir=digits_dir, split=split), "train"
        )
        assert len(source.classes) == 10
        counts = np.zeros(10, int)
        for i in range(len(source)):
            record = source[i]
            image = transforms.eval_image(
                record["image"], image_size=(8, 8), channels=1, crop_ratio=0.875,
                name=record["name"],
            )
            # 16 steps over 255: rounding is undone exactly.
            original = np.rint(image.reshape(64) * (16 / 255))
            rows.append((*original, record["label"]))
            counts[record["label"]] += 1
        expected = [np.sum(labels == k) for k in range(10)]
        share = [(n // 5) if sign < 0 else n - n // 5 for n in expected]
        assert counts.tolist() == share
    assert sorted(rows) == sorted((*v, k) for v, k in zip(values, labels))


def test_digits_prepared_by_two_processes_at_once(tmp_path):
    code = (
        "import sys\nfrom crossmae_jax.data import sources\n"
        "from crossmae_jax.data.sets import digits\n"
        "d = digits.prepare(sys.argv[1])\n"
        "s = sources.TfdsSource(digits.NAME, data_dir=d, split='test')\n"
        "print(len(s), s[0]['label'])\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    lines = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert lines[0] == lines[1] and lines[0].startswith("355 ")
    assert os.listdir(tmp_path) == [digits.NAME]


def test_digits_without_scikit_learn_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert command.main(["prepare", "digits", f"--data_dir={tmp_path}"]) == 1
    assert "pip install 'crossmae-jax[demo]'" in capsys.readouterr().err


def test_data_command_prepares_the_digits(tmp_path, capsys):
    assert command.main(["prepare", "digits", f"--data_dir={tmp_path}"]) == 0
    assert f"--config.data.data_dir={tmp_path}" in capsys.readouterr().out
    data = config(source="digits", data_dir=str(tmp_path), eval_split="test")
    assert len(sources.make_source(data, "eval")) == 355
    data.eval_split = ""
    assert sources.make_source(data, "eval") is None


def test_part_of_a_split_can_be_named(digits_dir):
    def split(name):
        return sources.TfdsSource(digits.NAME, data_dir=digits_dir, split=name)

    part = split("train[100:110]")
    assert len(part) == 10
    assert part[3]["image"] == split("train")[103]["image"]
    assert part.fingerprint != split("train[110:120]").fingerprint


def test_unknown_split_lists_the_known(digits_dir):
    data = config(source="digits", data_dir=digits_dir, split="validation")
    known = r"no split 'validation'. It has .*test \(355\)"
    with pytest.raises(ValueError, match=known):
        sources.make_source(data, "train")


def test_unprepared_set_says_what_to_run(tmp_path):
    data = config(source="tfds", name="imagenet2012", data_dir=str(tmp_path))
    with pytest.raises(ValueError) as caught:
        sources.make_source(data, "train")
    message = str(caught.value)
    assert "is not prepared under" in message and "Found there: nothing" in message
    assert (
        "python -m crossmae_jax data prepare imagenet2012 --manual_dir=TARS "
        f"--data_dir={tmp_path}" in message
    )
    (tmp_path / "other_set").mkdir()
    data.name = "no_such_set"
    found = "no_such_set.*Found there: other_set"
    with pytest.raises(ValueError, match=found) as caught:
        sources.make_source(data, "train")
    assert "download_and_prepare(file_format='array_record')" in str(caught.value)


def test_set_without_random_access_is_refused(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / digits.NAME / "1.0.0/dataset_info.json"
    info = json.loads(path.read_text()) | {"fileFormat": "tfrecord"}
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="stored as tfrecord.*as array_record"):
        sources.TfdsSource(digits.NAME, data_dir=str(tmp_path), split="train")


class ManyShards(tfds.core.GeneratorBasedBuilder):
    """A set of arrays without labels, in more files than a shell lets one open."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        features = {"image": tfds.features.Tensor(shape=(4, 4, 5), dtype=np.uint8)}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(80):
            yield k, {"image": np.full((4, 4, 5), k, np.uint8)}


def test_arrays_and_many_shards(tmp_path):
    config_ = tfds.download.DownloadConfig(num_shards=80)
    ManyShards(data_dir=tmp_path).download_and_prepare(
        file_format="array_record", download_config=config_
    )
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE,\n"
        "    (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "from crossmae_jax.data import sources\n"
        "s = sources.TfdsSource('many_shards', data_dir=sys.argv[1], split='train')\n"
        "assert s[0]['image'].shape == (4, 4, 5), s[0]\n"
        "print(len(s.classes), *s.kinds, *sorted(s[0]))\n"
        "print(sum(int(s[i]['image'][0, 0, 0]) for i in range(len(s))))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    total = str(sum(range(80)))
    assert result.stdout.split() == ["0", "image", "name", total], result.stderr


def test_data_files_do_not_import_jax():
    for path in Path(crossmae_jax.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"jax", "flax", "tensorflow"}
