"""One view for everything that has a place in an image, against hand-made numbers."""

import numpy as np
import pytest
from PIL import Image

from crossmae_jax.data import crops
from crossmae_jax.data.fields import Field, View
from tests.image_files import pixels

GRID = np.arange(24, dtype=np.uint8).reshape(4, 6)
BOX = np.array([[1.0, 1.0, 3.0, 2.0]])


def _view(**changes):
    """All of an image of 4 x 6, as it is."""
    whole = View((4, 6), (0.0, 0.0, 6.0, 4.0), False, (4, 6), (4, 6))
    return whole._replace(**changes)


def _bands(array):
    return (Image.fromarray(array),)


# Classes.


def test_the_whole_image_as_it_is_stays_as_it_is():
    image = pixels(0, 4, 6)
    np.testing.assert_array_equal(_view().pixels(_bands(image)), image)
    np.testing.assert_array_equal(_view().raster(GRID, nearest=True, fill=9), GRID)
    amounts = np.float32(np.pi) ** GRID
    np.testing.assert_array_equal(
        _view().raster(amounts, nearest=False, fill=0), amounts
    )
    np.testing.assert_array_equal(_view().boxes(BOX), BOX)


def test_a_mirrored_cut_hits_everything_alike():
    view = _view(area=(2.0, 1.0, 5.0, 3.0), mirrored=True, size=(2, 3), canvas=(2, 3))
    image, cut = pixels(0, 4, 6), (slice(1, 3), slice(4, 1, -1))
    np.testing.assert_array_equal(view.pixels(_bands(image)), image[cut])
    for nearest in (True, False):
        values = view.raster(GRID.astype(np.float32), nearest=nearest, fill=0)
        np.testing.assert_array_equal(values, GRID[cut])
    # 1..3 lies at -1..1 of 0..3, of which 0..1 is seen; mirrored, 2..3.
    np.testing.assert_array_equal(view.boxes(BOX), [[2, 0, 3, 1]])


def test_classes_are_those_at_the_centres_of_the_new_cells():
    view = _view(area=(0.0, 0.0, 6.0, 4.0), size=(2, 4), canvas=(2, 4))
    # Rows around 1 and 3; columns around .75, 2.25, 3.75 and 5.25.
    expected = GRID[np.ix_([1, 3], [0, 2, 3, 5])]
    seen = view.raster(GRID, nearest=True, fill=0)
    np.testing.assert_array_equal(seen, expected)
    assert seen.dtype == np.uint8


def test_a_grid_of_classes_may_be_coarser_than_the_image():
    coarse = np.array([[1, 2, 3]], np.int32)  # of 4 x 2 pixels each
    view = _view(area=(1.0, 0.0, 6.0, 4.0), size=(1, 5), canvas=(1, 5))
    seen = view.raster(coarse, nearest=True, fill=0)
    np.testing.assert_array_equal(seen, [[1, 2, 2, 3, 3]])


# Amounts.


def test_amounts_are_means_over_the_new_cells():
    values = np.array([[0, 1, 2, 3]], np.float32)
    view = View((1, 4), (0.5, 0.0, 3.5, 1.0), False, (1, 3), (1, 3))
    seen = view.raster(values, nearest=False, fill=0)
    np.testing.assert_array_equal(seen, [[0.5, 1.5, 2.5]])
    view = view._replace(area=(0.0, 0.0, 3.0, 1.0), size=(1, 2), canvas=(1, 2))
    seen = view.raster(values, nearest=False, fill=0)  # of 1.5 cells each
    np.testing.assert_allclose(seen, [[0.5 / 1.5, 2.5 / 1.5]], rtol=1e-6)
    finer = view._replace(area=(1.0, 0.0, 3.0, 1.0), size=(1, 4), canvas=(1, 4))
    seen = finer.raster(values, nearest=False, fill=0)
    np.testing.assert_array_equal(seen, [[1, 1, 2, 2]])


def test_resizing_keeps_the_mean_and_stays_between_the_ends():
    rng = np.random.default_rng(0)
    values = rng.random((14, 14)).astype(np.float32)
    view = View((224, 224), (0.0, 0.0, 224.0, 224.0), True, (9, 20), (9, 20))
    seen = view.raster(values, nearest=False, fill=0)
    assert seen.dtype == np.float32 and seen.shape == (9, 20)
    np.testing.assert_allclose(seen.mean(), values.mean(), rtol=1e-6)
    assert values.min() <= seen.min() and seen.max() <= values.max()


# Boxes.


def test_a_box_is_cut_at_the_edge_of_the_view_and_keeps_its_place_in_the_list():
    boxes = np.array([
        [1, 1, 5, 3],  # its left column is not seen
        [0, 0, 1.5, 4],  # left of the view
        [4, 1, 6, 2],
        [0, 0, 6, 1],  # above
    ], float)
    view = _view(area=(2.0, 1.0, 6.0, 4.0), size=(6, 8), canvas=(6, 8))  # times two
    seen = view.boxes(boxes)
    assert seen.dtype == np.float32
    np.testing.assert_array_equal(seen[0], [0, 0, 6, 4])
    np.testing.assert_array_equal(seen[2], [4, 0, 8, 2])
    width, height = seen[:, 2] - seen[:, 0], seen[:, 3] - seen[:, 1]
    np.testing.assert_array_equal(width * height > 0, [True, False, True, False])
    mirrored = view._replace(mirrored=True).boxes(boxes)
    np.testing.assert_array_equal(mirrored[:, [2, 0]], 8 - seen[:, [0, 2]])
    np.testing.assert_array_equal(mirrored[:, 1::2], seen[:, 1::2])
    assert view.boxes(np.zeros((0, 4))).shape == (0, 4)


def test_a_mask_is_seen_in_the_frame_of_its_box():
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:4] = 1
    frame = _view(area=(2.0, 0.0, 6.0, 4.0), mirrored=True, size=(2, 2), canvas=(2, 2))
    seen = frame.raster(mask.astype(np.float32), nearest=False, fill=0)
    np.testing.assert_array_equal(seen, [[0, 0.5], [0, 0.5]])


# The canvas.


def test_beside_the_image_a_larger_canvas_is_filled():
    view = _view(mirrored=True, canvas=(5, 8))
    image = pixels(0, 4, 6)
    seen = view.pixels(_bands(image), fill=7)
    np.testing.assert_array_equal(seen[:4, :6], image[:, ::-1])
    assert (seen[4:] == 7).all() and (seen[:, 6:] == 7).all()
    classes = view.raster(GRID, nearest=True, fill=255)
    np.testing.assert_array_equal(classes[:4, :6], GRID[:, ::-1])
    assert (classes[4:] == 255).all() and (classes[:, 6:] == 255).all()
    # Mirrored in the image, not in the canvas; and not beyond the image.
    np.testing.assert_array_equal(view.boxes(BOX), [[3, 1, 5, 2]])
    everywhere = np.array([[-9.0, -9.0, 99.0, 99.0]])
    np.testing.assert_array_equal(view.boxes(everywhere), [[0, 0, 6, 4]])


def test_of_a_larger_image_a_canvas_shows_the_centre():
    view = _view(canvas=(2, 8))  # smaller one way, larger the other
    image = pixels(0, 4, 6)
    seen = view.pixels(_bands(image))
    np.testing.assert_array_equal(seen[:, :6], image[1:3])
    assert not seen[:, 6:].any()
    classes = view.raster(GRID, nearest=True, fill=255)
    np.testing.assert_array_equal(classes[:, :6], GRID[1:3])
    np.testing.assert_array_equal(view.boxes(BOX), [[1, 0, 3, 1]])
    np.testing.assert_array_equal(
        _view(canvas=(2, 2)).boxes(np.array([[0.0, 0.0, 3.0, 4.0]])), [[0, 0, 1, 2]]
    )


# What the canvas does not show is not made.


def _whole_then_cut(image, view):
    """What is seen, by a resize of all of the image."""
    resized = Image.fromarray(image).resize(view.size[::-1], Image.Resampling.BICUBIC)
    made = np.asarray(resized)
    made = made[:, ::-1] if view.mirrored else made
    top, left = (round((s - c) / 2) for s, c in zip(view.size, view.canvas))
    return made[top : top + view.canvas[0], left : left + view.canvas[1]].astype(int)


def _harsh(height, width):
    """Noise and stripes of black and white: what resizing can make the most of."""
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3))
    yield noise.astype(np.uint8)
    stripes = np.zeros((height, width, 3), np.uint8)
    stripes[:, ::2] = 255
    stripes[::3] ^= 255
    yield stripes


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
def test_evaluation_sees_what_a_resize_of_all_would_have_shown(crop_ratio, mirrored):
    # Any size and shape, down to one pixel; every fourth is 50 to 400 times as long.
    random, count = np.random.default_rng(0), {True: 0, False: 0}
    for case in range(80):
        height, width = (int(2 ** random.uniform(0, 9)) for _ in range(2))
        if case % 4 == 0:
            height, width = 1 + height % 9, (1 + height % 9) * (50 + width % 350)
        if case % 8 == 0:
            height, width = width, height
        for target in ((16, 16), (14, 28), (33, 33)):
            view = crops.centre_view(
                (height, width), image_size=target, crop_ratio=crop_ratio
            )._replace(mirrored=mirrored)
            ordinary = np.prod(view.size) <= 32 * np.prod(target)
            for image in _harsh(height, width):
                old = _whole_then_cut(image, view)
                difference = np.abs(view.pixels(_bands(image)) - old)
                assert difference.max() <= (0 if ordinary else 2), (height, width)
                assert (difference > 0).mean() < 0.15
                count[bool(ordinary)] += 1
    assert min(count.values()) > 80


def test_a_needle_costs_what_is_seen_of_it(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def watched(self, size, *args, **kwargs):
        sizes.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for stored in ((1, 20_000), (20_000, 1), (3, 90_000), (300, 30_000)):
        view = crops.centre_view(stored, image_size=(224, 224), crop_ratio=0.875)
        image = np.full((*stored, 3), 99, np.uint8)
        assert (view.pixels(_bands(image)) == 99).all()
        for nearest in (True, False):
            values = np.ones(stored, np.float32)
            assert (view.raster(values, nearest=nearest, fill=0) == 1).all()
    assert max(width * height for width, height in sizes) <= 32 * 224 * 224


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("nearest", [False, True])
def test_a_raster_is_the_middle_of_the_whole_one(nearest, mirrored):
    values = np.random.default_rng(0).random((7, 90)).astype(np.float32)
    area = (0.5, 1.0, 89.0, 6.25)
    view = View((7, 90), area, mirrored, (31, 600), (31, 600))
    whole = view.raster(values, nearest=nearest, fill=0)
    seen = view._replace(canvas=(15, 20)).raster(values, nearest=nearest, fill=0)
    np.testing.assert_allclose(seen, whole[8:23, 290:310], rtol=1e-6)


# Scales.


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_image_stored_at_another_scale_is_seen_at_the_same_place(mirrored):
    view = View((40, 60), (10.0, 4.0, 50.0, 36.0), mirrored, (8, 10), (8, 10))
    image = Image.fromarray(pixels(0, 40, 60))
    half = image.resize((30, 20), Image.Resampling.BOX)
    whole, reduced = (view.pixels((i,)).astype(int) for i in (image, half))
    assert np.abs(whole - reduced).mean() < 2
    assert np.abs(whole - reduced[:, ::-1]).mean() > 10


def test_a_field_knows_its_size():
    assert Field((224, 224, 3), "uint8", 0).num_bytes == 224 * 224 * 3
    assert Field((), "int32", -1).num_bytes == 4
    assert Field((100, 4), "float32", 0).num_bytes == 1600
