"""What a folder of images leaves aside: read, said, or refused."""

import shutil

import numpy as np
import pytest

from crossmae_jax.data import sources, transforms
from tests.image_files import config, encode, pixels, write

PNG = encode(pixels(0, 16, 16))


def _folder(root, *names):
    for name in names:
        write(root / name, PNG)
    return sources.make_source(config(dir=str(root)), "train")


@pytest.mark.parametrize("form,endings", [
    ("JPEG", ".jpg .jpeg .jpe .jfif .JPG .Jfif"), ("TIFF", ".tif .tiff"),
    ("PPM", ".ppm .pgm .pbm .pnm"), ("PNG", ".png"), ("BMP", ".bmp"), ("WEBP", ".webp"),
])
def test_every_ending_of_a_kind_that_is_read_is_read(tmp_path, form, endings):
    image = encode(np.full((16, 16, 3), 99, np.uint8), form)
    for ending in endings.split():
        write(tmp_path / f"image{ending}", image)
    source = sources.FolderSource(str(tmp_path))
    assert len(source) == len(endings.split())
    for record in map(source.__getitem__, range(len(source))):
        seen = transforms.eval_image(
            record["image"], image_size=(8, 8), channels=3, crop_ratio=1.0, name=""
        )
        assert np.abs(seen.astype(int) - 99).max() <= 1


# Of 14 pictures 10 are read, of three folders one is a class.
_MIXED = (
    "ant/0.jpg", "ant/1.JPG", "ant/2.jpe", "ant/3.jfif", "ant/4.ppm", "ant/5.pgm",
    "ant/6", "bee/0.heic", "bee/1.HEIC", "bee/2.gif", "cat/0.png", "cat/1.png",
    "cat/2.png", "cat/3.png", "cat/notes.txt", "cat/.DS_Store", ".trash/0.png",
)


def test_what_a_folder_leaves_aside_is_said_in_one_line(tmp_path):
    for name in _MIXED:
        write(tmp_path / name, PNG)
    (tmp_path / "dog").mkdir()
    source = sources.make_source(
        config(dir=str(tmp_path), max_skipped_share=1.0), "train"
    )
    assert source.classes == ("ant", "cat")
    assert sources.described(source) == (
        f"10 images, 2 classes, in {tmp_path}; skipped: 2 .heic, 1 without extension, "
        "1 .gif, 1 .txt (no kind of image that is read), 2 whose names begin with a "
        "dot, no class of 'bee', 'dog', without an image that is read"
    )
    whole = _folder(tmp_path / "whole", "a.png", "b.png")
    assert sources.described(whole) == f"2 images, no labels, in {tmp_path / 'whole'}"


def test_images_of_kinds_that_are_not_read_are_refused_beyond_a_share(tmp_path):
    for name in _MIXED:
        write(tmp_path / name, PNG)
    with pytest.raises(ValueError) as caught:
        sources.make_source(config(dir=str(tmp_path)), "train")
    assert str(caught.value) == (
        f"{tmp_path}: 4 of 14 images are of a kind that is not read (2 .heic, 1 "
        "without extension, 1 .gif), more than max_skipped_share=0.05; no image that "
        "is read lies in 'bee', which would be no class then, and later ones would "
        "have other numbers. Read are .jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp "
        ".ppm .pgm .pbm .pnm, whose names do not begin with a dot. Convert, rename or "
        "unpack what is an image, and move away what is none; or accept it: "
        "--config.data.max_skipped_share=1 (a command without --config: "
        "--max_skipped_share)."
    )
    # All of a class is too much, whatever its share of the whole.
    with pytest.raises(ValueError, match=f"{tmp_path}: no image that is read lies in "):
        sources.make_source(config(dir=str(tmp_path), max_skipped_share=0.5), "train")
    shutil.rmtree(tmp_path / "bee")
    assert len(_folder(tmp_path)) == 10  # one file alone is not too much
    with pytest.raises(ValueError, match="1 of 11 images .*max_skipped_share=0.1 "):
        sources.make_source(config(dir=str(tmp_path), max_skipped_share=0.0), "train")
    for k in range(2):
        write(tmp_path / f"ant/{k}.dng", PNG)
    for share, refused in ((3 / 13 - 0.01, True), (3 / 13, False)):
        data = config(dir=str(tmp_path), eval_dir=str(tmp_path))
        data.max_skipped_share = share
        if refused:
            with pytest.raises(ValueError, match="3 of 13 images are of.*share=0.24 "):
                sources.make_source(data, "eval")
        else:
            assert len(sources.make_source(data, "eval")) == 10
    with pytest.raises(ValueError, match="max_skipped_share=1.5 must lie between"):
        sources.FolderSource(str(tmp_path), max_skipped_share=1.5)


@pytest.mark.parametrize("ending", [".jpg_large", ".jpg?w=640", ".jpeg~"])
def test_endings_that_downloads_leave_behind_are_those_of_images(tmp_path, ending):
    names = [f"{folder}/{k}.jpg" for folder in "ac" for k in range(20)]
    names += [f"b/{k}{ending}" for k in range(2)]
    with pytest.raises(ValueError, match="lies in 'b', which would be no class then"):
        _folder(tmp_path, *names)


# What a folder may hold that somebody takes for a class.
_NO_IMAGE = {
    "nothing": (), "dot files": (".0.png", ".DS_Store"), "one picture": ("0.heic",),
    "a picture and a note": ("0.gif", "notes.txt"), "an archive": ("bee.tar",),
    "an archive in a folder": ("deep/bee.tar.gz",),
}


@pytest.mark.parametrize("files", _NO_IMAGE.values(), ids=_NO_IMAGE)
def test_a_class_folder_without_an_image_is_refused_unless_it_is_accepted(
    tmp_path, files
):
    for name in ("ant/0.png", "cat/0.png", *(f"bee/{file}" for file in files)):
        write(tmp_path / name, PNG)
    (tmp_path / "bee").mkdir(exist_ok=True)
    said = "no image that is read lies in 'bee', which would be no class then"
    for share in (0.0, 0.05, 0.99):
        with pytest.raises(ValueError, match=said) as refused:
            sources.FolderSource(str(tmp_path), max_skipped_share=share)
        assert "--config.data.max_skipped_share=1 (a" in str(refused.value)
    source = sources.FolderSource(str(tmp_path), max_skipped_share=1.0)
    assert source.classes == ("ant", "cat")
    assert "no class of 'bee', without an image that is read" in source.skipped


def test_folders_of_other_files_are_no_classes_and_no_obstacle(tmp_path):
    write(tmp_path / "notes" / "readme.txt", b"")
    write(tmp_path / "boxes" / "deep" / "0.xml", b"")
    source = _folder(tmp_path, "ant/0.png", "cat/0.png")
    assert source.classes == ("ant", "cat")
    assert source.skipped.endswith("no class of 'boxes', 'notes', without an image "
                                   "that is read")


def test_images_beside_folders_are_named_where_labels_are_missed(tmp_path):
    source = _folder(tmp_path, "ant/0.png", "cat/0.png", "cover.png")
    said = "since 'cover.png' lies beside folders"
    assert f"3 images, no labels, {said}, in {tmp_path}" in sources.described(source)
    assert said in repr(source)
    source = _folder(tmp_path, *(f"{k}.png" for k in range(6)))
    said = "since '0.png', '1.png', '2.png', '3.png', '4.png' and 2 more lie beside"
    assert said in sources.described(source)
    assert "since" not in sources.described(_folder(tmp_path / "x", "a.png", "b/0.png"))


def test_files_beside_the_images_that_are_no_pictures_are_not_too_many(tmp_path):
    names = [f"{k}.{end}" for k in range(3) for end in ("png", "png.npz", "txt", "xml")]
    source = _folder(tmp_path, *names)
    assert len(source) == 3
    assert source.skipped.startswith("3 .npz, 3 .txt, 3 .xml (no kind of")


@pytest.mark.parametrize("train,held_out", [
    ("train", "val"), ("Training", "test"), ("train", "validation"),
    ("train2017", "val2017"), ("train_images", "test-images"),
    ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
])
def test_the_directory_above_the_splits_is_refused_with_the_flags_for_it(
    tmp_path, train, held_out
):
    names = [f"{split}/{name}.png" for split in (train, held_out) for name in "ab"]
    with pytest.raises(ValueError) as caught:
        _folder(tmp_path, *names, "labels/0.png")
    flags = f"--config.data.dir={tmp_path}/{train}"
    flags += f" --config.data.eval_dir={tmp_path}/{held_out}."
    assert str(caught.value).endswith(f"Give each by itself: {flags}")
    # A class may be called so, where the other is none.
    assert _folder(tmp_path / "x", "train/0.png", "tram/0.png").classes[0] == "train"
    names = ("test_1/0.png", "test_2/0.png", "test track/0.png", "train/0.png")
    with pytest.raises(ValueError, match="test_1, which are splits"):
        _folder(tmp_path / "y", *names)
    assert len(_folder(tmp_path / "z", *names[:3]).classes) == 3


def test_of_several_splits_those_that_were_meant_are_given(tmp_path):
    names = ("train/0.png", "val/0.png", "test/0.png", "train_clean/0.png")
    with pytest.raises(ValueError) as caught:
        _folder(tmp_path / "set", *names)
    flags = f"dir={tmp_path}/set/train --config.data.eval_dir={tmp_path}/set/val."
    assert str(caught.value).endswith(f"Give each by itself: --config.data.{flags}")
    # Be it several levels above; what lies beside in other folders is no image.
    write(tmp_path / "notes.txt", b"")
    with pytest.raises(ValueError) as caught:
        _folder(tmp_path)
    assert str(caught.value).endswith(f"Give each by itself: --config.data.{flags}")


def test_splits_to_evaluate_on_are_splits_without_one_to_train_on(tmp_path):
    with pytest.raises(ValueError) as caught:
        _folder(tmp_path, "test/0.png", "val/0.png")
    assert str(caught.value) == (
        f"{tmp_path} holds {tmp_path}/val and {tmp_path}/test, which are splits of a "
        "data set and no classes. Give each by itself: --config.data.dir=DIR "
        f"--config.data.eval_dir={tmp_path}/val, with DIR for the images to train on."
    )
