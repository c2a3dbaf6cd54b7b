"""ImageNet prepared without TensorFlow is the set that TFDS with TensorFlow writes.

stock_imagenet2012.zip was written by TFDS 4.9.10 with TensorFlow 2.21: its own
`imagenet2012` builder, ArrayRecord form, from two tar files laid out like the originals
with 7 training and 4 validation images of ours. From the JPEGs in it the tars are made
again, and prepared by our command.
"""

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import shuffle

from crossmae_jax.commands import data as command
from crossmae_jax.data import pipeline, sources
from crossmae_jax.data.sets import imagenet, writing
from tests import full_disk
from tests.image_files import config, encode, pixels

VERSION = "imagenet2012/5.1.0"


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The data_dir that TFDS and TensorFlow have written."""
    directory = tmp_path_factory.mktemp("stock")
    archive = Path(__file__).parent / "stock_imagenet2012.zip"
    zipfile.ZipFile(archive).extractall(directory)
    return directory


def _records(data_dir, split):
    builder = tfds.builder("imagenet2012", data_dir=str(data_dir))
    skip = {"image": tfds.decode.SkipDecoding()}
    return [
        (r["file_name"].decode(), r["label"], r["image"])
        for r in builder.as_data_source(split, decoders=skip)
    ]


def _tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _write_tars(directory, train, validation):
    """Writes (name, bytes) pairs as the two original tars hold them."""
    os.makedirs(directory, exist_ok=True)
    classes = []
    for synset in sorted({name.split("_")[0] for name, _ in train}):
        inner = directory / f"{synset}.tar"
        _tar(inner, [item for item in train if item[0].startswith(synset)])
        classes.append((f"{synset}.tar", inner.read_bytes()))
        inner.unlink()
    _tar(directory / imagenet.TARS["train"], classes)
    _tar(directory / imagenet.TARS["validation"], validation)


def _jpeg(seed):
    return encode(pixels(seed, 12, 16), "JPEG")


@pytest.fixture(scope="module")
def tars(stock, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tars")
    _write_tars(directory, *(
        [(name, image) for name, _, image in _records(stock, split)]
        for split in ("train", "validation")
    ))
    return directory


@pytest.mark.parametrize("in_memory", [True, False])
def test_result_is_that_of_tfds_with_tensorflow(
    stock, tars, tmp_path, in_memory, monkeypatch, capfd
):
    if not in_memory:  # as with the real tars, which are shuffled on disk
        monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 500)
    assert command.main([
        "prepare", "imagenet2012", f"--manual_dir={tars}", f"--data_dir={tmp_path}"
    ]) == 0
    assert "tensorflow" not in sys.modules
    ours, theirs = tmp_path / VERSION, stock / VERSION
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    for name in ("dataset_info.json", "features.json"):
        assert json.loads((ours / name).read_text()) == json.loads(
            (theirs / name).read_text()
        )
    labels = "label.labels.txt"
    assert (ours / labels).read_bytes() == (theirs / labels).read_bytes()
    for split, number in (("train", 7), ("validation", 4)):
        records = _records(tmp_path, split)
        assert len(records) == number
        assert records == _records(stock, split)  # in the same order
    out, progress = capfd.readouterr()
    assert "train: 7 images (the full split has 1,281,167) in 1 shards." in out
    assert f"--config.data.data_dir={tmp_path}" in out
    assert "Generating train examples" in progress


def test_preparing_again_does_nothing(tars, tmp_path):
    said = []
    for _ in range(2):
        directory = imagenet.prepare(str(tars), str(tmp_path), report=said.append)
    assert directory == str(tmp_path / VERSION)
    assert said[-1] == f"{directory} is prepared already."
    assert os.listdir(tmp_path / "imagenet2012") == ["5.1.0"]


def test_set_written_by_tfds_with_tensorflow_is_read(stock):
    data = config(
        source="tfds", name="imagenet2012", data_dir=str(stock),
        eval_split="validation", batch_size=7, workers=1,
    )
    source = sources.make_source(data, "train")
    assert len(source.classes) == 1000 and len(source) == 7
    synsets = {source[i]["name"].split()[-1][:9]: source[i]["label"] for i in range(7)}
    assert synsets == {"n01440764": 0, "n02105855": 230, "n15075141": 999}
    with pipeline.train_batches(
        source, data, seed=0, start_step=0, num_steps=2
    ) as batches:
        for batch in batches:
            assert batch["image"].shape == (7, 16, 16, 3)
            assert sorted(batch["label"]) == [0, 0, 230, 230, 230, 999, 999]
    assert len(sources.make_source(data, "eval")) == 4


def test_validation_labels_follow_the_sorted_names(tars, tmp_path):
    imagenet.prepare(str(tars), str(tmp_path), report=lambda line: None)
    package = os.path.dirname(sys.modules[
        "tensorflow_datasets.datasets.imagenet2012.imagenet_common"
    ].__file__)
    names = Path(package, "labels.txt").read_text().split()
    published = Path(package, "validation_labels.txt").read_text().split()
    for name, label, _ in _records(tmp_path, "validation"):
        number = int(name[len("ILSVRC2012_val_") : -len(".JPEG")])
        assert names[label] == published[number - 1]


def test_the_odd_images_become_rgb_jpegs(tmp_path):
    cmyk = io.BytesIO()
    Image.new("CMYK", (16, 12), (0, 255, 255, 0)).save(cmyk, "JPEG", quality=95)
    blue = np.zeros((12, 16, 3), np.uint8)
    blue[..., 2] = 255
    train = [
        ("n01739381_1309.JPEG", cmyk.getvalue()),
        ("n01739381_1.JPEG", _jpeg(0)),
        ("n02105855_2933.JPEG", encode(blue)),
    ]
    _write_tars(tmp_path / "tars", train, [("ILSVRC2012_val_00000001.JPEG", _jpeg(1))])
    imagenet.prepare(
        str(tmp_path / "tars"), str(tmp_path / "sets"), report=lambda line: None
    )
    images = {name: image for name, _, image in _records(tmp_path / "sets", "train")}
    assert images["n01739381_1.JPEG"] == _jpeg(0)
    for name, colour in (
        ("n01739381_1309.JPEG", (255, 0, 0)), ("n02105855_2933.JPEG", (0, 0, 255))
    ):
        picture = Image.open(io.BytesIO(images[name]))
        assert (picture.format, picture.mode) == ("JPEG", "RGB")
        np.testing.assert_allclose(np.asarray(picture)[6, 8], colour, atol=4)


def test_cmyk_without_adobe_marker_is_not_inverted():
    file = io.BytesIO()
    Image.new("CMYK", (16, 12), (0, 255, 255, 0)).save(file, "JPEG", quality=95)
    data = file.getvalue()
    start = data.index(b"\xff\xee")  # APP14, Adobe's
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    plain = data[:start] + data[start + 2 + length :]
    # Without the marker the stored numbers are ink: 255, 0, 0 and 255 is black.
    image = np.asarray(Image.open(io.BytesIO(imagenet._cmyk_to_rgb(plain))))
    np.testing.assert_allclose(image[6, 8], (0, 0, 0), atol=4)
    image = np.asarray(Image.open(io.BytesIO(imagenet._cmyk_to_rgb(data))))
    np.testing.assert_allclose(image[6, 8], (255, 0, 0), atol=4)


def test_missing_tars_are_named_with_what_was_found(tars, tmp_path, capsys):
    manual = tmp_path / "tars"
    arguments = [
        "prepare", "imagenet2012", f"--manual_dir={manual}",
        f"--data_dir={tmp_path}/sets",
    ]
    assert command.main(arguments) == 1
    assert "no such directory" in capsys.readouterr().err
    manual.mkdir()
    (manual / "ILSVRC2012_img_val.tar.part").write_bytes(b"")
    os.symlink(tars / imagenet.TARS["train"], manual / imagenet.TARS["train"])
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert f"error: {manual}/ILSVRC2012_img_val.tar is missing" in error
    assert "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar.part" in error
    assert "https://image-net.org/download-images" in error
    assert not (tmp_path / "sets/imagenet2012").exists()


def test_incomplete_tar_is_an_error_that_leaves_nothing(tars, tmp_path, capsys):
    manual = tmp_path / "tars"
    manual.mkdir()
    for tar in imagenet.TARS.values():
        content = (tars / tar).read_bytes()
        (manual / tar).write_bytes(content[: len(content) // 3])
    assert command.main([
        "prepare", "imagenet2012", f"--manual_dir={manual}",
        f"--data_dir={tmp_path}/sets",
    ]) == 1
    assert "is damaged or incomplete" in capsys.readouterr().err
    assert os.listdir(tmp_path / "sets/imagenet2012") == []


def test_full_disk_is_noticed_before_the_work(tars, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="0 GiB free; the set needs about"):
        imagenet.prepare(str(tars), str(tmp_path), report=lambda line: None)


def test_a_set_in_another_form_is_not_overwritten(stock, tars, tmp_path):
    path = tmp_path / VERSION / "dataset_info.json"
    path.parent.mkdir(parents=True)
    info = json.loads((stock / VERSION / "dataset_info.json").read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    features = stock / VERSION / "features.json"
    (path.parent / "features.json").write_bytes(features.read_bytes())
    with pytest.raises(ValueError, match="holds the set as tfrecord"):
        imagenet.prepare(str(tars), str(tmp_path), report=lambda line: None)


def test_stock_builder_is_restored_afterwards(tars, tmp_path):
    before = (shuffle.tf, tfds.core.utils.png_to_jpeg)
    with pytest.raises(RuntimeError), imagenet._without_tensorflow():
        assert shuffle.tf.io.gfile.GFile is open
        raise RuntimeError
    assert (shuffle.tf, tfds.core.utils.png_to_jpeg) == before


@pytest.mark.parametrize("name", ["digits", "imagenet2012"])
def test_a_place_that_cannot_be_written_is_one_line(name, tars, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = [f"--data_dir={tmp_path}/file/sets"]
    if name == "imagenet2012":
        arguments.append(f"--manual_dir={tars}")
    assert command.main(["prepare", name, *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: [Errno 20] Not a directory: ")
    assert f"{tmp_path}/file" in error and "can be written" in error


def test_a_disk_that_fills_up_is_one_line(tars, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "bucket")

    # Where the stock builder's shuffler, deep inside, writes to disk.
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 500)
    monkeypatch.setattr(shuffle._Bucket, "add", full)
    assert command.main([
        "prepare", "imagenet2012", f"--manual_dir={tars}", f"--data_dir={tmp_path}"
    ]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "No space left on device" in error
    assert f"{tmp_path} was not prepared; see that it can be written and" in error
    assert "its disk has room, of which" in error


@pytest.mark.parametrize("name", ["digits", "imagenet2012", "photographs"])
def test_a_disk_that_is_full_is_one_line(name, tars, tmp_path, capsys):
    """ArrayRecord raises a RuntimeError."""
    arguments = [f"--data_dir={tmp_path}/sets"]
    if name == "imagenet2012":
        arguments.append(f"--manual_dir={tars}")
    with full_disk.beyond(1000):
        assert command.main(["prepare", name, *arguments]) == 1
    said = capsys.readouterr().err.splitlines()
    error, = (line for line in said if line.startswith("error: "))
    assert "File too large" in error and "GB are free" in error
    assert f"{tmp_path}/sets" in error and "Traceback" not in "".join(said)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_no_error_of_a_disk_stays_a_bug(tmp_path):
    for error in (NotImplementedError("a bug"), ValueError("a bug")):
        with pytest.raises(type(error)), writing.into(tmp_path):
            raise error


def test_front_door_prepares_and_reports_errors(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "crossmae_jax", "data", "prepare", "imagenet2012",
         f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}/sets"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 1
    assert "found in" in result.stderr and "Traceback" not in result.stderr
