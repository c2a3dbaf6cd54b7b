"""Images that cannot be decoded: replaced, listed once, limited over all launches."""

import json
import os

import numpy as np
import pytest

from crossmae_jax.data import order, pipeline, sources, transforms
from crossmae_jax.data.bad_images import TooManyBadImages
from tests.image_files import config, encode, pixels, write
from tests.test_pipeline import _assert_equal, _evaluate, _train


@pytest.fixture
def damaged(tmp_path):
    """40 images, of which numbers 5 and 6 cannot be decoded."""
    for k in range(40):
        content = encode(pixels(k, 16, 16))
        content = content[:50] if k in (5, 6) else content
        write(tmp_path / "images" / f"{k:02d}.png", content)
    return sources.FolderSource(str(tmp_path / "images"))


def test_bad_image_is_replaced_by_the_next_good_one(damaged, tmp_path):
    data = config(max_bad_share=0.1, crop_scale=(1.0, 1.0), flip=False)
    with pipeline.train_batches(
        damaged, data, seed=0, start_step=0, num_steps=10, workdir=str(tmp_path)
    ) as iterator:
        batches = list(iterator)
    assert iterator.num_bad == 4  # two epochs, two files
    good = transforms.eval_image(
        damaged[7]["image"], image_size=(16, 16), channels=3, crop_ratio=0.875,
        name="",
    )
    images = np.concatenate([b["image"] for b in batches])
    replaced = [
        s for s in range(80) if order.shuffled(s, num_images=40, seed=0) in (5, 6)
    ]
    assert len(replaced) == 4
    for sample in replaced:
        np.testing.assert_array_equal(images[sample], good)
    lines = (tmp_path / "bad_images.jsonl").read_text().splitlines()
    noted = [json.loads(line) for line in lines]
    assert sorted(n["index"] for n in noted) == [5, 6]  # once each
    assert {n["name"] for n in noted} == {damaged.name(5), damaged.name(6)}
    assert all(n["name"] in n["reason"] for n in noted)


def test_a_workdir_lists_a_bad_image_once_however_often_it_is_met(damaged, tmp_path):
    path = tmp_path / "bad_images.jsonl"
    data = config(max_bad_share=0.1, batch_size=1)

    def listed():
        lines = path.read_text().splitlines()
        return [os.path.basename(json.loads(line)["name"]) for line in lines]

    whole = dict(batch_size=40, workdir=str(tmp_path))
    # Seed 2 has image 6 before 5, for which 6 would stand in. Evaluations come between.
    with pipeline.train_batches(
        damaged, data, seed=2, start_step=0, num_steps=80, workdir=str(tmp_path)
    ) as batches:
        while not path.exists():
            next(batches)
        assert len(listed()) == 1
        for _ in range(2):
            assert len(_evaluate(damaged, data, **whole)) == 1
        assert sorted(listed()) == ["05.png", "06.png"]
        assert sum(1 for _ in batches) and batches.num_bad == 4
    _train(damaged, data, num_steps=40, workdir=str(tmp_path))  # a second launch
    assert sorted(listed()) == ["05.png", "06.png"]
    # Of the line of a killed process nothing is known, and the next one is whole.
    path.write_text(path.read_text().splitlines(keepends=True)[0][:-9])
    _evaluate(damaged, data, **whole)
    _, *lines = path.read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [5, 6]


@pytest.mark.parametrize("stop", [1, 4, 5, 9, 13])
def test_a_launch_that_goes_on_counts_bad_images_on(damaged, tmp_path, stop):
    data = config(max_bad_share=0.1)
    with pipeline.train_batches(
        damaged, data, seed=0, start_step=0, num_steps=15, workdir=str(tmp_path / "a")
    ) as batches:
        counts = [batches.num_bad for _ in batches]
    assert counts[-1] == 6  # three epochs of 40, two files
    place = str(tmp_path / "b")
    _train(damaged, data, num_steps=stop, seed=0, workdir=place)
    _evaluate(damaged, data, batch_size=40, workdir=place)  # whose images count not
    with pipeline.train_batches(
        damaged, data, seed=0, start_step=stop, num_steps=15 - stop, workdir=place
    ) as batches:
        assert batches.num_bad == counts[stop - 1]
        assert [batches.num_bad for _ in batches] == counts[stop:]


def test_a_launch_that_goes_on_has_no_new_budget(damaged, tmp_path):
    write(tmp_path / "images" / "07.png", b"no image")
    data = config(max_bad_share=0.05)  # two of 40 in each epoch, and there are three

    def stopped_after(step, place):
        with pipeline.train_batches(
            damaged, data, seed=0, start_step=step, num_steps=50, workdir=str(place)
        ) as batches, pytest.raises(TooManyBadImages, match="3 of .*(3 files)"):
            for step, _ in enumerate(batches, start=step + 1):
                pass
        return step

    at_once = stopped_after(0, tmp_path / "a")
    assert at_once >= 1
    for stop in range(1, at_once + 1):
        place = tmp_path / f"b{stop}"
        _train(damaged, data, num_steps=stop, seed=0, workdir=str(place))
        assert stopped_after(stop, place) == at_once
    # Who has repaired them says so by removing the list.
    (place / "bad_images.jsonl").unlink()
    for k in (5, 6, 7):
        write(tmp_path / "images" / f"{k:02d}.png", encode(pixels(k, 16, 16)))
    assert len(_train(damaged, data, start_step=stop, workdir=str(place))) == 6


def test_several_processes_know_what_they_met_in_whole_epochs():
    drawn = dict(batch_size=8, num_images=40, seed=3)
    for image in (0, 17, 39):
        met = [
            order.times_met(image, num_samples=35, process=(n, 2), **drawn)
            for n in range(2)
        ]
        samples = [s for s in range(35) if order.shuffled(s, num_images=40, seed=3)
                   == image]
        assert met == [
            sum(n * 4 <= s % 8 < n * 4 + 4 for s in samples) for n in range(2)
        ]
        alone = dict(num_samples=43, process=(0, 1), **drawn)
        assert order.times_met(image, **alone) == sum(
            order.shuffled(s, num_images=40, seed=3) == image for s in range(43)
        )
    # Of an image that it has met, one of four is not taken to have met none.
    assert order.times_met(0, num_samples=40, process=(0, 4), **drawn) == 1


@pytest.mark.parametrize("line", [
    b"[1]", b"{}", b"\xff", b'{"name": 1, "reason": "", "index": 5, "sample": 0}',
    b'{"name": "x", "reason": "", "index": "5", "sample": 0}', b"[" * 100_000,
], ids=lambda line: line[:12].decode(errors="replace"))
def test_a_list_that_somebody_has_edited_stops_nothing(damaged, tmp_path, line):
    (tmp_path / "bad_images.jsonl").write_bytes(line + b"\n")
    data = config(max_bad_share=0.1)
    assert len(_train(damaged, data, start_step=5, workdir=str(tmp_path))) == 6


def test_workers_agree_on_bad_images(damaged, tmp_path):
    results = []
    for num in (0, 2):
        workdir = tmp_path / str(num)
        data = config(max_bad_share=0.1, workers=num)
        results.append(_train(damaged, data, num_steps=10, workdir=str(workdir)))
        results.append((workdir / "bad_images.jsonl").read_text())
    _assert_equal(results[0], results[2])
    assert results[1] == results[3]


def test_file_that_vanished_is_a_bad_image(damaged, tmp_path):
    os.remove(damaged.name(0))
    batches = _evaluate(
        damaged, config(max_bad_share=0.2), batch_size=40, workdir=str(tmp_path)
    )
    np.testing.assert_array_equal(batches[0]["image"][0], batches[0]["image"][1])
    assert "No such file" in (tmp_path / "bad_images.jsonl").read_text()


def test_too_many_bad_images_stop_the_run(damaged, tmp_path):
    data = config(max_bad_share=0.049)  # 2 of 40 are 5 %
    with pytest.raises(TooManyBadImages) as caught:
        _train(damaged, data, num_steps=5, workdir=str(tmp_path))
    message = str(caught.value)
    assert "(2 files)" in message and "data.max_bad_share=0.049" in message
    assert str(tmp_path / "bad_images.jsonl") in message
    assert damaged.name(5) in message or damaged.name(6) in message
    data.max_bad_share = 0.05
    assert len(_train(damaged, data, num_steps=50)) == 50


def test_one_bad_file_does_not_stop_a_run_unless_told_so(tmp_path):
    write(tmp_path / "0.png", b"no image")
    for k in range(1, 6):
        write(tmp_path / f"{k}.png", encode(pixels(k, 16, 16)))
    source = sources.FolderSource(str(tmp_path))
    assert len(_train(source, num_steps=20)) == 20
    with pytest.raises(TooManyBadImages, match="max_bad_share=0 allows 0"):
        _train(source, config(max_bad_share=0.0), num_steps=20)


def test_nothing_but_bad_images_is_an_error(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.jpg", b"<html>")
    source = sources.FolderSource(str(tmp_path))
    with pytest.raises(TooManyBadImages, match="3 images in a row.*FolderSource"):
        _train(source, config(max_bad_share=1.0))
