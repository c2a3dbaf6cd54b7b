"""Batches: a function of seed and step alone, for any workers and hosts."""

import numpy as np
import pytest

from crossmae_jax.data import decoding, order, pipeline, sources, transforms
from crossmae_jax.data.randaug import RandAugment
from tests.image_files import config, write_folder

N = 21
ORDER = [3, 5, 2, 9, 7, 0, 8, 6, 1, 4, 0, 6, 5, 3, 4, 9, 7, 8, 2, 1]
DRAWS = [0.575300433347867, 0.4214513002125032, 0.6987130805958253]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sources.FolderSource(write_folder(tmp_path_factory.mktemp("images"), N))


def _train(source, data=None, *, start_step=0, num_steps=6, **kwargs):
    kwargs = dict(seed=3) | kwargs
    with pipeline.train_batches(
        source, data or config(), start_step=start_step, num_steps=num_steps, **kwargs
    ) as batches:
        return list(batches)


def _evaluate(source, data=None, **kwargs):
    with pipeline.eval_batches(source, data or config(), **kwargs) as batches:
        return list(batches)


def _assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


# What a batch is.


def test_batches_have_the_promised_form(folder):
    batches = _train(folder, config(image_size=(8, 24)))
    assert len(batches) == 6
    for step, batch in enumerate(batches):
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "image": ((8, 8, 24, 3), "uint8"), "label": ((8,), "int32"),
            "sample": ((8,), "uint32"),
        }
        assert batch["sample"].tolist() == list(range(8 * step, 8 * step + 8))


def test_every_image_comes_once_an_epoch(folder):
    batches = _train(folder, config(batch_size=N), num_steps=3)
    orders = []
    for epoch in range(3):
        numbers = [
            order.shuffled(s, num_images=N, seed=3)
            for s in range(N * epoch, N * epoch + N)
        ]
        assert sorted(numbers) == list(range(N))
        labels = [folder[i]["label"] for i in numbers]
        assert batches[epoch]["label"].tolist() == labels
        orders.append(numbers)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_another_seed_is_another_order_and_other_crops(folder):
    first, second = _train(folder), _train(folder, seed=4)
    assert not np.array_equal(first[0]["label"], second[0]["label"])
    one = sources.FolderSource(folder.directory)
    crops = [_train(one, config(batch_size=N * 4), num_steps=1, seed=s) for s in (0, 1)]
    assert not np.array_equal(crops[0][0]["image"], crops[1][0]["image"])


@pytest.mark.parametrize("crop,num_ops,num_workers", [
    ("ten_tries", 0, 0), ("single_try", 2, 0), ("ten_tries", 3, 1),
])
def test_batch_pixels_are_those_of_the_transform(folder, crop, num_ops, num_workers):
    randaug, mean = None, (0.1, 0.2, 0.3)
    if num_ops:
        randaug = RandAugment(num_ops=num_ops, magnitude=8.0, std=0.5, mean=mean)
    data = config(
        crop=crop, randaug_ops=num_ops, randaug_magnitude=8.0, mean=mean,
        workers=num_workers,
    )
    batch = _train(folder, data, start_step=4, num_steps=1)[0]
    for row, sample in enumerate(batch["sample"].tolist()):
        record = folder[order.shuffled(sample, num_images=N, seed=3)]
        expected = transforms.Classification(
            image_size=(16, 16), channels=3, crop=crop, crop_scale=(0.2, 1.0),
            flip=True, randaug=randaug, eval_crop_ratio=0.875,
        )(record, order.draws(sample, seed=3))
        assert expected.keys() == batch.keys() - {"sample"}
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name][row], value)


def test_the_order_is_what_it_was():
    # A change here changes every run that is under way: never adapt the numbers.
    numbers = [order.shuffled(s, num_images=10, seed=1) for s in range(20)]
    assert numbers == ORDER
    draws = order.draws(2, seed=1).random(3)
    np.testing.assert_allclose(draws, DRAWS, atol=1e-12)


# What it does not depend on.


def test_workers_do_not_change_batches(folder):
    # 130 images make three chunks, not all of one size.
    data = config(batch_size=130, image_size=(16, 16))
    expected = _train(folder, data, num_steps=3)
    for num in (1, 2):
        data.workers = num
        _assert_equal(_train(folder, data, num_steps=3), expected)


def test_restart_continues_where_it_stopped(folder):
    whole = _train(folder, num_steps=7)
    first = _train(folder, num_steps=3)
    second = _train(folder, start_step=3, num_steps=4)
    _assert_equal(first + second, whole)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_hold_the_slices_of_one_batch(folder, count):
    whole = _train(folder, num_steps=3)
    parts = [
        _train(folder, num_steps=3, process_index=k, process_count=count)
        for k in range(count)
    ]
    joined = [
        {key: np.concatenate([p[key] for p in step]) for key in step[0]}
        for step in zip(*parts)
    ]
    _assert_equal(joined, whole)


def test_batch_larger_than_the_data_runs_over_epochs(folder):
    large = _train(folder, config(batch_size=3 * N + 1), num_steps=1)[0]
    small = _train(folder, config(batch_size=8), num_steps=8)
    for key in ("image", "label", "sample"):
        joined = np.concatenate([b[key] for b in small])
        np.testing.assert_array_equal(large[key], joined[: 3 * N + 1])


def test_batch_must_divide_among_processes(folder):
    with pytest.raises(ValueError, match="batch_size=8 cannot be divided among 3"):
        _train(folder, process_count=3)


# Evaluation.


@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
def test_evaluation_sees_every_image_once_in_order(folder, crop_ratio):
    batches = _evaluate(folder, config(eval_crop_ratio=crop_ratio), batch_size=8)
    assert [int(b["valid"].sum()) for b in batches] == [8, 8, 5]
    valid = np.concatenate([b["valid"] for b in batches])
    indices = np.concatenate([b["sample"] for b in batches])[valid]
    assert indices.tolist() == list(range(N))
    labels = np.concatenate([b["label"] for b in batches])
    assert labels[valid].tolist() == [folder[i]["label"] for i in range(N)]
    assert (labels[~valid] == -1).all() and not batches[-1]["image"][5:].any()
    expected = transforms.eval_image(
        folder[9]["image"], image_size=(16, 16), channels=3, crop_ratio=crop_ratio,
        name="",
    )
    np.testing.assert_array_equal(batches[1]["image"][1], expected)


def test_part_of_an_evaluation_is_spread_evenly(folder):
    batches = _evaluate(folder, batch_size=4, num_images=7)
    valid = np.concatenate([b["valid"] for b in batches])
    assert np.concatenate([b["sample"] for b in batches])[valid].tolist() == list(
        range(0, N, 3)
    )
    # Sorted by class as they are, the first seven would be one class.
    assert len(set(np.concatenate([b["label"] for b in batches])[valid])) == 3
    assert len(_evaluate(folder, batch_size=8, num_images=1000)) == 3


def test_evaluation_divides_among_processes(folder):
    whole = _evaluate(folder, config(workers=1), batch_size=8)
    parts = [
        _evaluate(folder, batch_size=8, process_index=k, process_count=2)
        for k in range(2)
    ]
    assert len(parts[0]) == len(parts[1]) == 3
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts)
    ]
    _assert_equal(joined, whole)


def test_digits_come_through_the_same_way(tmp_path):
    data = config(
        source="digits", data_dir=str(tmp_path), image_size=(8, 8), channels=1
    )
    source = sources.make_source(data, "train")
    expected = _train(source, data, num_steps=2)
    data.workers = 1
    _assert_equal(_train(source, data, num_steps=2), expected)
    assert expected[0]["image"].shape == (8, 8, 8, 1)
    assert set(expected[0]["label"]) <= set(range(10))


@pytest.mark.parametrize("num", [0, 1])
def test_channel_mismatch_stops_at_once_and_names_the_file(folder, num):
    with pytest.raises(decoding.ChannelMismatch, match=r"class\d.*data.channels=1"):
        _train(folder, config(channels=1, max_bad_share=1.0, workers=num))


# What is refused.


@pytest.mark.parametrize("changes,message", [
    (dict(crop="one_try"), "Unknown data.crop 'one_try'. Known: single_try, ten_tries"),
    (dict(randaug_ops=2, channels=4, mean=(0.5,) * 4), "images have 4; set config."),
    (dict(randaug_ops=-2), "config.data.randaug_ops=-2; expected 1 or more"),
])
def test_bad_settings_are_refused_before_the_first_image(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        _train(folder, config(**changes))


@pytest.mark.parametrize("ratio", [0.0, 1.1, -1.0])
def test_crop_ratios_of_nothing_or_more_than_all_are_refused(folder, ratio):
    with pytest.raises(ValueError, match=f"eval_crop_ratio={ratio} must lie between"):
        _evaluate(folder, config(eval_crop_ratio=ratio), batch_size=8)
