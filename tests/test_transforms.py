"""Decoding, cropping and resizing, against hand-made numbers and PIL itself."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFile, JpegImagePlugin

from crossmae_jax.data import crops, decoding, transforms
from crossmae_jax.data.randaug import RandAugment
from tests.image_files import encode, pixels


def _rng(seed=0):
    return np.random.default_rng(seed)


def _pixels(image, rng, **changes):
    transform = transforms.Classification(**dict(
        image_size=(16, 16), channels=3, crop="ten_tries", crop_scale=(0.2, 1.0),
        flip=False, randaug=None, eval_crop_ratio=0.875,
    ) | changes)
    sample = transform({"name": "NAME", "image": image}, rng)
    assert sample["label"] == -1
    return sample["image"]


def _train(image, rng=None, **changes):
    return _pixels(image, rng or _rng(), **changes)


def _eval(image, *, crop_ratio=0.875, **changes):
    return _pixels(image, None, eval_crop_ratio=crop_ratio, **changes)


class _Stream(np.random.Generator):
    """A generator whose draws are known."""

    def __new__(cls, *draws):
        return super().__new__(cls, np.random.PCG64())

    def __init__(self, *draws):
        super().__init__(np.random.PCG64())
        self._draws = list(draws)

    def random(self):
        return self._draws.pop(0)


def test_crop_follows_the_draws():
    # Area .2 + .8 * .375 = .5 of 40 * 60, ratio exp(0) = 1: the side is sqrt(1200).
    box = crops.random_resized_crop(
        _Stream(0.375, 0.5, 0.5, 0.999), 40, 60, scale=(0.2, 1.0)
    )
    assert box == (3, 25, 35, 35)


def test_crop_that_does_not_fit_is_drawn_again():
    # All of the area at ratio 4/3 is too wide for a square; the second try is small.
    box = crops.random_resized_crop(
        _Stream(1.0, 1.0, 0.0, 0.5, 0.0, 0.0), 100, 100, scale=(0.25, 1.0)
    )
    assert box == (0, 0, 50, 50)


@pytest.mark.parametrize("height,width,expected", [
    (100, 10, (43, 0, 13, 10)),  # round(10 / .75) rows around the centre
    (10, 100, (0, 43, 10, 13)),  # round(10 * 4/3) columns
    (30, 30, (0, 0, 30, 30)),
])
def test_crop_falls_back_to_the_centre(height, width, expected):
    # More than the whole area never fits, so all ten tries fail.
    box = crops.random_resized_crop(_rng(), height, width, scale=(2.0, 3.0))
    assert box == expected


def test_single_try_cuts_the_sides_to_the_image():
    # All of the area of 100 x 200 at ratio 4/3: 122 x 163, of which 100 rows exist.
    box = crops.single_try_crop(
        _Stream(1.0, 1.0, 0.999, 0.999), 100, 200, scale=(0.25, 1.0)
    )
    assert box == (0, 37, 100, 163)
    # A quarter at ratio 3/4: 82 x 61, which fits, at the middle of the free places.
    box = crops.single_try_crop(
        _Stream(0.0, 0.0, 0.5, 0.5), 100, 200, scale=(0.25, 1.0)
    )
    assert box == (9, 70, 82, 61)
    assert crops.single_try_crop(_rng(), 1, 1, scale=(0.01, 0.01)) == (0, 0, 1, 1)


def test_train_image_takes_the_crop_that_is_named():
    array, settings, changed = pixels(0, 40, 60), dict(crop_scale=(0.5, 1.0)), 0
    for seed in range(20):
        box = crops.single_try_crop(_rng(seed), 40, 60, scale=(0.5, 1.0))
        area = (box.left, box.top, box.left + box.width, box.top + box.height)
        cropped = Image.fromarray(array).crop(area)
        expected = np.asarray(cropped.resize((16, 16), Image.Resampling.BICUBIC))
        single = _train(array, _rng(seed), crop="single_try", **settings)
        np.testing.assert_array_equal(single, expected)
        changed += not np.array_equal(single, _train(array, _rng(seed), **settings))
    assert 5 < changed < 20  # where the first of ten tries fits they agree


def test_crops_are_distributed_as_documented():
    rng, height, width = _rng(1), 500, 500
    boxes = [
        crops.random_resized_crop(rng, height, width, scale=(0.1, 0.4))
        for _ in range(4000)
    ]
    for box in boxes:
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width
    area = np.sort([b.height * b.width / (height * width) for b in boxes])
    ratio = np.sort([math.log(b.width / b.height) for b in boxes])
    place = np.sort([(b.top + 0.5) / (height - b.height + 1) for b in boxes])
    # Nothing is rejected at these areas, so the draws are uniform: Kolmogorov-Smirnov
    # at 1e-4, plus what rounding to pixels moves.
    limit = 2.2 / math.sqrt(len(boxes)) + 0.01
    grid = (np.arange(len(boxes)) + 0.5) / len(boxes)
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert np.abs((area - 0.1) / 0.3 - grid).max() < limit
    assert np.abs((ratio - low) / (high - low) - grid).max() < limit
    assert np.abs(place - grid).max() < limit


def test_train_image_is_crop_then_bicubic():
    array = pixels(0, 40, 60)
    box = crops.random_resized_crop(_rng(5), 40, 60, scale=(0.2, 1.0))
    area = (box.left, box.top, box.left + box.width, box.top + box.height)
    cropped = Image.fromarray(array).crop(area)
    expected = np.asarray(cropped.resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(_train(encode(array), _rng(5)), expected)


def test_crop_of_a_wide_target_keeps_its_shape():
    ratios = []
    array = pixels(0, 100, 200)
    for seed in range(50):
        rng, drawn = _rng(seed), []
        original = crops.random_resized_crop

        def spy(*args, **kwargs):
            drawn.append(original(*args, **kwargs))
            return drawn[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(crops.CROPS, "ten_tries", spy)
            assert _train(array, rng, image_size=(8, 16)).shape == (8, 16, 3)
        ratios.append(drawn[0].width / drawn[0].height)
    assert 1.45 < min(ratios) and max(ratios) < 2.75
    assert 1.8 < np.exp(np.mean(np.log(ratios))) < 2.2


def test_half_of_the_images_are_mirrored():
    image = encode(pixels(0, 16, 16))
    plain = dict(crop_scale=(1.0, 1.0))
    mirrored = 0
    for seed in range(400):
        flipped = _train(image, _rng(seed), flip=True, **plain)
        straight = _train(image, _rng(seed), flip=False, **plain)
        if not np.array_equal(flipped, straight):
            np.testing.assert_array_equal(flipped, straight[:, ::-1])
            mirrored += 1
    assert 150 < mirrored < 250


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_comes_after_crop_and_flip(channels):
    change = RandAugment(num_ops=2, magnitude=9.0, std=0.5, mean=(0.5,) * channels)
    array = pixels(0, 40, 60, channels)
    settings, changed = dict(channels=channels, flip=True), 0
    for seed in range(20):
        rng = _rng(seed)
        plain = _train(array, rng, **settings)
        image = Image.fromarray(plain[..., 0] if channels == 1 else plain)
        expected = np.asarray(change(image, rng)).reshape(16, 16, channels)
        found = _train(array, _rng(seed), randaug=change, **settings)
        np.testing.assert_array_equal(found, expected)
        changed += not np.array_equal(found, plain)
    assert 10 <= changed


def test_large_jpeg_is_reduced_without_visible_change(monkeypatch):
    noise = _rng().normal(0, 8, (900, 1200, 3))
    array = np.clip(pixels(3, 900, 1200) + noise, 0, 255).astype(np.uint8)
    image = encode(array, "JPEG", quality=90)
    sizes = []
    draft = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "draft",
        lambda self, mode, size: sizes.append(size) or draft(self, mode, size),
    )
    reduced = _train(image, _rng(2), image_size=(64, 64)).astype(int)
    assert sizes and sizes[0][0] < 1200
    monkeypatch.setattr(decoding, "_KEEP", 1000)
    full = _train(image, _rng(2), image_size=(64, 64)).astype(int)
    assert 0 < np.abs(reduced - full).mean() < 1


def test_ordinary_jpeg_is_decoded_in_full():
    array = np.asarray(Image.open(io.BytesIO(encode(pixels(1, 375, 500), "JPEG"))))
    image = encode(pixels(1, 375, 500), "JPEG")
    kwargs = dict(image_size=(224, 224))
    np.testing.assert_array_equal(
        _train(image, _rng(3), **kwargs), _train(array, _rng(3), **kwargs)
    )


def test_eval_resizes_the_shorter_side_and_takes_the_centre():
    array = pixels(0, 60, 100)
    # 224 -> 256 becomes 14 -> 16; the longer side int(16 * 100 / 60) = 26.
    resized = Image.fromarray(array).resize((26, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[1:15, 6:20]
    np.testing.assert_array_equal(_eval(encode(array), image_size=(14, 14)), expected)


def test_eval_keeps_the_share_of_the_crop_ratio():
    array = pixels(0, 60, 100)
    resized = Image.fromarray(array).resize((23, 14), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[:, 4:18]  # (23 - 14) / 2, to even
    whole = _eval(encode(array), image_size=(14, 14), crop_ratio=1.0)
    np.testing.assert_array_equal(whole, expected)


def test_eval_leaves_images_of_the_right_size_alone():
    array = pixels(0, 16, 16)
    np.testing.assert_array_equal(_eval(encode(array)), array)


@pytest.mark.parametrize("height,width", [(20, 90), (90, 20), (14, 28), (3, 3)])
def test_eval_fills_any_target(height, width):
    image = encode(np.full((height, width, 3), 77, np.uint8))
    result = _eval(image, image_size=(14, 28))
    np.testing.assert_array_equal(result, np.full((14, 28, 3), 77, np.uint8))


def test_grey_becomes_three_equal_channels():
    grey = pixels(0, 16, 16, channels=1)
    np.testing.assert_array_equal(_eval(encode(grey)), np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(_eval(grey), np.repeat(grey, 3, axis=-1))


def test_grey_stays_one_channel():
    grey = pixels(0, 16, 16, channels=1)
    np.testing.assert_array_equal(_eval(encode(grey), channels=1), grey)


def test_transparency_is_dropped():
    array = pixels(0, 16, 16, channels=4)
    np.testing.assert_array_equal(_eval(encode(array)), array[..., :3])


def test_palettes_are_resolved():
    array = np.zeros((16, 16, 3), np.uint8)
    array[:8] = (250, 20, 30)
    file = io.BytesIO()
    Image.fromarray(array).convert("P").save(file, "PNG")
    np.testing.assert_allclose(_eval(file.getvalue())[0, 0], (250, 20, 30), atol=30)
    grey = Image.fromarray(array[..., 0]).convert("P")
    file = io.BytesIO()
    grey.save(file, "PNG")
    result = _eval(file.getvalue(), channels=1)
    np.testing.assert_array_equal(result, array[..., :1])


def test_cmyk_becomes_rgb():
    file = io.BytesIO()
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red.save(file, "JPEG", quality=95)
    np.testing.assert_allclose(_eval(file.getvalue())[8, 8], (255, 0, 0), atol=6)


def test_sixteen_bits_keep_the_high_byte():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for form in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(values).save(file, form)
        grey = _eval(file.getvalue(), channels=1)
        np.testing.assert_array_equal(grey[..., 0], values >> 8)
        colour = _eval(file.getvalue())
        np.testing.assert_array_equal(colour[..., 2], values >> 8)


def test_four_channels_are_not_treated_as_opacity():
    array = pixels(0, 32, 32, channels=4)
    array[..., 3] = 0
    result = _train(array, channels=4)
    assert result[..., :3].std() > 10
    expected = _train(array[..., :1].copy(), channels=1)
    np.testing.assert_array_equal(result[..., :1], expected)
    np.testing.assert_array_equal(_train(encode(array), channels=4), result)


def test_any_number_of_channels_from_arrays():
    array = pixels(0, 32, 40, channels=7)
    assert _train(array, channels=7).shape == (16, 16, 7)
    assert _eval(array, channels=7).shape == (16, 16, 7)


@pytest.mark.parametrize("found,channels", [(3, 1), (3, 4), (4, 2), (1, 4)])
def test_channel_mismatch_says_what_to_set(found, channels):
    image = encode(pixels(0, 16, 16, channels=found))
    with pytest.raises(decoding.ChannelMismatch) as caught:
        _train(image, channels=channels)
    message = str(caught.value)
    assert message.startswith(f"NAME has {found} channels")
    advice = 3 if channels == 1 else found
    assert f"data.channels={channels}; set data.channels={advice}" in message


def test_array_of_the_wrong_channels_is_a_mismatch():
    with pytest.raises(decoding.ChannelMismatch, match="7 channels.*channels=3"):
        _eval(pixels(0, 16, 16, channels=7))


def test_array_of_another_type_is_an_error():
    with pytest.raises(TypeError, match="NAME.*float32.*8 bits"):
        _eval(np.zeros((16, 16, 3), np.float32))


def _claiming(height, width, form="PNG"):
    """A small file of one colour, of that many pixels."""
    file = io.BytesIO()
    Image.new("L", (width, height), 77).save(file, form)
    return file.getvalue()


def test_an_image_of_too_many_pixels_is_not_decoded(monkeypatch):
    image = _claiming(30, 50)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # nothing may be decoded
    message = (
        r"^NAME: it has 30 x 50 pixels; data.max_pixels=1499 is the most that is "
        "decoded. Make the image smaller, .* or raise data.max_pixels$"
    )
    for transform in (_train, _eval):
        with pytest.raises(decoding.BadImage, match=message):
            transform(image, max_pixels=1499)
    monkeypatch.undo()
    assert (_eval(image, max_pixels=1500) == 77).all()
    assert (_train(image, max_pixels=1500) == 77).all()
    with pytest.raises(ValueError, match="max_pixels=0 must be 1 or more; it is hei"):
        _eval(image, max_pixels=0)


def test_more_pixels_than_pil_opens_can_be_allowed(monkeypatch):
    # As if PIL's limits, and ours with them, were those of 20 x 50 pixels.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    with pytest.raises(decoding.BadImage, match="PIL refuses.*raise data.max_pixels$"):
        _eval(_claiming(30, 50), max_pixels=1000)
    assert Image.MAX_IMAGE_PIXELS == 500  # as long as nobody asks for more
    for transform in (_train, _eval):
        image = transform(_claiming(30, 50), max_pixels=1500, crop_scale=(1.0, 1.0))
        assert (image == 77).all()
    assert Image.MAX_IMAGE_PIXELS == 1500


def test_a_needle_is_seen_like_any_other_image():
    image = _claiming(1, 20_000)
    assert len(image) < 150
    for size in ((224, 224), (16, 16)):
        assert (_eval(image, image_size=size) == 77).all()
        assert (_train(image, image_size=size) == 77).all()
        whole = transforms.whole_images(
            [np.full((20_000, 1, 3), 77, np.uint8)], image_size=size, channels=3
        )
        assert (whole == 77).all()


def test_camera_rotation_is_not_applied():
    array = pixels(0, 16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    rotated = encode(array, "JPEG", exif=exif.tobytes())
    plain = encode(array, "JPEG")
    np.testing.assert_array_equal(_eval(rotated), _eval(plain))


def test_damaged_images_are_named():
    jpeg = encode(pixels(0, 64, 64), "JPEG")
    png = encode(pixels(0, 64, 64))
    floats = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.float32)).save(floats, "TIFF")
    damaged = {
        "truncated": jpeg[: len(jpeg) // 2],
        "file is truncated": png[:-200],
        "empty": b"",
        "known image format": b"<html>404 Not Found</html>",
        "floating-point": floats.getvalue(),
    }
    for reason, image in damaged.items():
        for transform in (_train, _eval):
            with pytest.raises(decoding.BadImage, match=f"(?i)^NAME: .*{reason}"):
                transform(image)
