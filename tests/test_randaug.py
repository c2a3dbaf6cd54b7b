"""RandAugment, pixel for pixel against timm."""

import collections
import math
import pickle
import statistics

import numpy as np
import pytest
from PIL import Image

from crossmae_jax.data.randaug import OPERATIONS, RandAugment
from tests.image_files import pixels
from tests.interop import timm

MEAN = (0.485, 0.456, 0.406)


def _image(channels, seed=0, height=40, width=56):
    array = pixels(seed, height, width, channels)
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def _randaug(channels=3, **changes):
    return RandAugment(
        **(dict(num_ops=2, magnitude=9.0, std=0.5, mean=MEAN[:channels]) | changes)
    )


def _theirs(channels=3):
    """Returns timm's RandAugment, made as MAE's fine-tuning makes it."""
    made = timm.data.create_transform(
        input_size=224, is_training=True, color_jitter=None, interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1", mean=MEAN[:channels], std=MEAN[:channels],
        re_prob=0.25, re_mode="pixel",
    )
    [found] = [
        step for step in made.transforms
        if isinstance(step, timm.data.auto_augment.RandAugment)
    ]
    return found


def _apply_theirs(op, image, monkeypatch, *, magnitude, sign):
    """Applies an operation of timm with known magnitude and sign."""
    op.prob, op.magnitude, op.magnitude_std = 1.0, magnitude, 0.0
    with monkeypatch.context() as patch:  # timm draws nothing but the sign
        patch.setattr("random.random", lambda: 0.25 if sign == 1 else 0.75)
        return op(image)


def _drawn(monkeypatch, rng, **settings):
    """Returns (operation, magnitude, sign) of what would be applied."""
    drawn = []

    def note(self, operation, image, *, magnitude, sign):
        drawn.append((operation, magnitude, sign))
        return image

    with monkeypatch.context() as patch:
        patch.setattr(RandAugment, "apply", note)
        _randaug(**settings)(_image(3, height=4, width=4), rng)
    return drawn


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(15), ids=OPERATIONS)
def test_operation_is_timms_pixel_for_pixel(monkeypatch, number, channels):
    op, ours = _theirs(channels).ops[number], _randaug(channels)
    name = op.name.lower().removesuffix("increasing").removesuffix("rel")
    assert name == OPERATIONS[number].replace("_", "")
    image = _image(channels)
    results = []
    for magnitude in (0.0, 0.1, 2.5, 5.0, 7.3, 8.4142, 9.0, 9.999, 10.0):
        for sign in (1, -1):
            setting = dict(magnitude=magnitude, sign=sign)
            if OPERATIONS[number] == "posterize" and magnitude == 10:
                # No bits are left, which Pillow refuses from 13 on.
                expected = np.zeros_like(image)
            else:
                expected = _apply_theirs(op, image, monkeypatch, **setting)
            found = ours.apply(OPERATIONS[number], image, **setting)
            assert (found.mode, found.size) == (image.mode, image.size)
            np.testing.assert_array_equal(found, expected, err_msg=f"{setting}")
            results.append(found.tobytes())
    kinds = len(set(results))
    if OPERATIONS[number] in ("auto_contrast", "equalize", "invert"):
        assert kinds == 1
    elif (OPERATIONS[number], channels) == ("color", 1):
        assert set(results) == {image.tobytes()}
    else:
        assert kinds >= 5


def test_timm_draws_as_we_do():
    theirs = _theirs()
    assert theirs.num_layers == 2 and theirs.choice_weights is None
    assert len(theirs.ops) == len(OPERATIONS) == 15
    for op in theirs.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        assert op.magnitude_max is None  # then 10
        assert op.kwargs["resample"] == Image.Resampling.BICUBIC


def test_operations_magnitudes_and_signs_are_distributed_as_documented(monkeypatch):
    count = 20_000
    drawn = _drawn(monkeypatch, np.random.default_rng(0), num_ops=count)
    # Four standard deviations of a binomial count.
    assert abs(len(drawn) - count / 2) < 4 * math.sqrt(count / 4)
    names = collections.Counter(name for name, _, _ in drawn)
    assert set(names) == set(OPERATIONS)
    expected = len(drawn) / 15
    squares = sum((n - expected) ** 2 / expected for n in names.values())
    assert squares < 42.6  # chi-square, 14 degrees of freedom: 1e-4
    magnitudes = np.sort([magnitude for _, magnitude, _ in drawn])
    signs = np.asarray([sign for _, _, sign in drawn])
    assert set(signs) == {1, -1}
    assert abs(signs.sum()) < 4 * math.sqrt(len(drawn))
    # Kolmogorov-Smirnov at 1e-4 below 10, where the tail is clipped to.
    normal = statistics.NormalDist(9, 0.5)
    inside = magnitudes[magnitudes < 10]
    assert magnitudes.max() == 10
    tail = (1 - len(inside) / len(drawn), 1 - normal.cdf(10))
    assert abs(tail[0] - tail[1]) < 4 * math.sqrt(tail[1] / len(drawn))
    cdf = np.vectorize(normal.cdf)(inside)
    steps = np.arange(1, len(inside) + 1) / len(drawn)
    assert np.abs(steps - cdf).max() < 2.2 / math.sqrt(len(drawn))


def test_magnitudes_stay_between_0_and_10(monkeypatch):
    for magnitude in (0.0, 10.0):
        settings = dict(num_ops=400, magnitude=magnitude, std=3.0)
        drawn = _drawn(monkeypatch, np.random.default_rng(1), **settings)
        found = [m for _, m, _ in drawn]
        assert 0 <= min(found) and max(found) <= 10
        assert 0.35 < found.count(magnitude) / len(found) < 0.65


def test_operations_are_applied_one_after_the_other(monkeypatch):
    theirs, image = _theirs(), _image(3)
    changed = 0
    for seed in range(30):
        drawn = _drawn(monkeypatch, np.random.default_rng(seed), num_ops=3)
        expected = image
        for name, magnitude, sign in drawn:
            expected = _apply_theirs(
                theirs.ops[OPERATIONS.index(name)], expected, monkeypatch,
                magnitude=magnitude, sign=sign,
            )
        found = _randaug(num_ops=3)(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, expected)
        changed += len(drawn) > 1
    assert changed > 5


class _Constant(np.random.Generator):
    """Gives one number for ever, and counts how often."""

    def __new__(cls, value):
        return super().__new__(cls, np.random.PCG64())

    def __init__(self, value):
        super().__init__(np.random.PCG64())
        self.value, self.count = value, 0

    def random(self):
        self.count += 1
        return self.value


def test_every_operation_takes_as_many_draws_and_extreme_ones_are_legal():
    # Below a half all is applied, above nothing.
    for value in (0.0, 0.4999, 0.5, 1 - 2**-53):
        rng = _Constant(value)
        _randaug(num_ops=3)(_image(3, height=8, width=8), rng)
        assert rng.count == 15


def test_it_travels_to_worker_processes():
    again, image = pickle.loads(pickle.dumps(_randaug())), _image(3)
    for seed in range(5):
        first, second = (
            ra(image, np.random.default_rng(seed)) for ra in (_randaug(), again)
        )
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("changes,message", [
    (dict(mean=(0.5,) * 4), "1 channel .grey. or 3 .RGB., but the images have 4; set "
     "config.data.randaug_ops=0"),
    (dict(num_ops=-1), "config.data.randaug_ops=-1; expected 1 or more, or 0 for no"),
    (dict(magnitude=11.0), "config.data.randaug_magnitude=11.0 must lie between 0 and"),
])
def test_bad_settings_say_what_to_set(changes, message):
    with pytest.raises(ValueError, match=message):
        _randaug(**changes)
