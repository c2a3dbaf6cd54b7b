"""Labels with a place in the image go through the real pipeline and stay on it.

Nothing here is shipped: a source and a transform as segmentation, detection and masking
by attention need them, made of the library's parts. The images hold their own
coordinates (red is four times the column, green four times the row), so from the pixels
of a batch alone one can tell where each came from, and check every other field by that.
"""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from crossmae_jax import errors
from crossmae_jax.data import crops, decoding, pipeline, sources, transforms
from crossmae_jax.data.fields import Field, View
from tests.image_files import config, encode, write

N = 12
BROKEN = 4
SIZE, CANVAS, CELLS = (24, 32), (28, 40), (3, 4)
MAX_BOXES = 4
BLOCK = 8  # side of a square of one class


class WithLabels:
    """A folder of images with what belongs to each in a file beside it."""

    kinds = frozenset({"boxes", "segmentation", "weights"})
    classes = tuple(map(str, range(64)))

    def __init__(self, directory):
        self._images = sources.FolderSource(directory)
        self.fingerprint = self._images.fingerprint
        # Read here: np.load parses Python, and Python 3.11 cannot in several threads.
        self._labels = []
        for index in range(len(self)):
            with np.load(f"{self.name(index)}.npz") as labels:
                self._labels.append({kind: labels[kind] for kind in self.kinds})

    def __len__(self):
        return len(self._images)

    def name(self, index):
        return self._images.name(index)

    def __getitem__(self, index):
        return self._images[index] | self._labels[index]

    def __repr__(self):
        return f"WithLabels({len(self)} images)"


@dataclasses.dataclass(frozen=True)
class Structured:
    """A crop, the classes of its pixels, its boxes, and the weights of its patches."""

    crop_scale: tuple[float, float]
    needs: ClassVar[frozenset[str]] = WithLabels.kinds
    fields: ClassVar[dict[str, Field]] = {
        "image": Field((*CANVAS, 3), "uint8", 0),
        "segmentation": Field(CANVAS, "uint8", 255),
        "boxes": Field((MAX_BOXES, 4), "float32", 0),
        "weights": Field((2, *CELLS), "float32", 0),
    }

    def __call__(self, record, rng):
        picture = decoding.open_image(record["image"], name=record["name"])
        if rng is None:
            height, width = map(float, picture.size)
            view = View(picture.size, (0.0, 0.0, width, height), False, SIZE, SIZE)
        else:
            view = crops.random_view(
                rng, picture.size, image_size=SIZE, crop="ten_tries",
                crop_scale=self.crop_scale, flip=True,
            )
        boxes = np.zeros((MAX_BOXES, 4), np.float32)
        seen = view.boxes(record["boxes"])
        seen = seen[(seen[:, 2] > seen[:, 0]) & (seen[:, 3] > seen[:, 1])]
        boxes[: len(seen)] = seen
        # Boxes and cells are those of the part that the image covers.
        cells = view._replace(size=CELLS, canvas=CELLS)
        on_canvas = view._replace(canvas=CANVAS)
        return {
            "image": on_canvas.pixels(picture.decode(3)),
            "segmentation": on_canvas.raster(
                record["segmentation"], nearest=True, fill=255
            ),
            "boxes": boxes,
            "weights": np.stack([
                cells.raster(values, nearest=False, fill=0)
                for values in record["weights"]
            ]),
        }


def _boxes(number):
    """One or two boxes of an image, as left, top, right, bottom."""
    boxes = np.array([[10 + number, 5, 40, 20 + 2 * number], [0, 30, 25, 44]], float)
    return boxes[: 1 + number % 2]


@pytest.fixture
def data(tmp_path, monkeypatch):
    for k in range(N):
        height, width = 46 + k, 63 - k
        rows, columns = np.mgrid[:height, :width]
        blue = np.full_like(rows, 20 * k)  # which image it is
        image = np.stack([4 * columns, 4 * rows, blue], axis=-1).astype(np.uint8)
        path = tmp_path / "images" / f"{k:02d}.png"
        write(path, b"no image" if k == BROKEN else encode(image))
        np.savez(
            f"{path}.npz", boxes=_boxes(k),
            segmentation=(rows // BLOCK * 8 + columns // BLOCK).astype(np.uint8),
            weights=np.stack([columns + 0.5, rows + 0.5]).astype(np.float32),
        )
    monkeypatch.setitem(
        sources.SOURCES, "with_labels",
        lambda data, split, classes: WithLabels(data.dir),
    )
    monkeypatch.setitem(
        transforms.TRANSFORMS, "structured", lambda data: Structured(data.crop_scale)
    )
    return config(
        source="with_labels", transform="structured", dir=str(tmp_path / "images"),
        crop_scale=(0.2, 1.0), max_bad_share=0.2,
    )


def _train(data, *, start_step=0, num_steps=6, **kwargs):
    with pipeline.train_batches(
        sources.make_source(data, "train"), data, seed=1, start_step=start_step,
        num_steps=num_steps, **kwargs,
    ) as batches:
        return list(batches)


def _assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def _check(image, segmentation, boxes, weights):
    """Compares labels with the coordinates in the pixels; returns pixels a column."""
    assert not image[SIZE[0]:].any() and not image[:, SIZE[1]:].any()
    assert (segmentation[SIZE[0]:] == 255).all()
    assert (segmentation[:, SIZE[1]:] == 255).all()
    inner = (slice(3, SIZE[0] - 3), slice(3, SIZE[1] - 3))  # where ramps stay ramps
    x, y = image[inner][..., 0] / 4 + 0.5, image[inner][..., 1] / 4 + 0.5
    # x = start + step * column, from the pixels alone; likewise y.
    step, start = np.polyfit(np.arange(3, SIZE[1] - 3) + 0.5, x.mean(axis=0), 1)
    down, top = np.polyfit(np.arange(3, SIZE[0] - 3) + 0.5, y.mean(axis=1), 1)
    assert down > 0

    sure = np.ones(x.shape, bool)
    for place, length in ((x, step), (y, down)):
        to_edge = np.abs((place + BLOCK / 2) % BLOCK - BLOCK / 2)
        sure &= to_edge > 0.5 + 0.1 * abs(length)
    assert sure.mean() > 0.5
    expected = y // BLOCK * 8 + x // BLOCK
    np.testing.assert_array_equal(segmentation[inner][sure], expected[sure])

    number = image[0, 0, 2] // 20
    corners = _boxes(number).reshape(-1, 2, 2)
    columns = np.sort((corners[..., 0] - start) / step, axis=-1).clip(0, SIZE[1])
    rows = ((corners[..., 1] - top) / down).clip(0, SIZE[0])
    found = np.stack([columns[:, 0], rows[:, 0], columns[:, 1], rows[:, 1]], axis=1)
    larger = (found[:, 2] - found[:, 0] > 0.5) & (found[:, 3] - found[:, 1] > 0.5)
    for box in found[larger]:
        assert np.abs(boxes - box).max(axis=1).min() < 0.3, (boxes, box)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert larger.sum() <= (area > 0).sum() <= len(found)

    for axis, (cells, first, length) in enumerate(
        [(CELLS[1], start, step), (CELLS[0], top, down)]
    ):
        side = SIZE[1 - axis] / cells
        expected = first + length * (np.arange(cells) + 0.5) * side
        if axis == 1:
            expected = expected[:, None]
        np.testing.assert_allclose(
            weights[axis], np.broadcast_to(expected, CELLS), atol=0.4
        )
    return step


def test_crop_and_mirror_hit_image_classes_boxes_and_weights_alike(data):
    steps, numbers = [], set()
    for batch in _train(data, num_steps=8):
        assert list(batch) == ["image", "segmentation", "boxes", "weights", "sample"]
        for row in range(8):
            fields = {name: batch[name][row] for name in Structured.fields}
            steps.append(_check(**fields))
            numbers.add(fields["image"][0, 0, 2] // 20)
    assert numbers == set(range(N)) - {BROKEN}  # labels are those of the substitute
    assert 10 < sum(step < 0 for step in steps) < 54  # of 64
    assert min(np.abs(steps)) < 1 < max(np.abs(steps))  # enlarged and reduced


def test_batches_are_equal_for_workers_threads_hosts_and_restarts(data):
    whole = _train(data)
    for workers in (1, 2):
        data.workers = workers
        _assert_equal(_train(data), whole)
    data.workers = 0
    restarted = _train(data, num_steps=2) + _train(data, start_step=2, num_steps=4)
    _assert_equal(restarted, whole)
    parts = [_train(data, process_index=k, process_count=2) for k in range(2)]
    joined = [
        {name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts)
    ]
    _assert_equal(joined, whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_draws_nothing_and_pads_with_what_the_fields_say(data, workers):
    data.workers = workers
    source = sources.make_source(data, "train")
    with pipeline.eval_batches(source, data, batch_size=8) as batches:
        first, last = batches
    for row in range(8):
        assert _check(**{name: first[name][row] for name in Structured.fields}) > 0
    assert last["valid"].tolist() == [True] * 4 + [False] * 4
    assert (last["segmentation"][4:] == 255).all()
    for name in ("image", "boxes", "weights", "sample"):
        assert not last[name][4:].any()


def test_blank_batches_have_the_forms_of_real_ones(data):
    blank = pipeline.blank_batch(data, batch_size=8)
    real = _train(data, num_steps=1)[0]
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {
        k: (v.shape, v.dtype) for k, v in real.items()
    }
    assert (blank["segmentation"] == 255).all()


# What is refused.


def test_labels_that_the_source_lacks_are_missed_when_it_is_opened(data, tmp_path):
    data.source = "folder"
    message = (
        r"data.transform='structured' needs boxes, segmentation, weights beside each "
        r"image; FolderSource\(.*\) has nothing else"
    )
    with pytest.raises(errors.SetupError, match=message):
        sources.make_source(data, "train")
    images = sources.FolderSource(data.dir)
    with pytest.raises(errors.SetupError, match=message):
        pipeline.train_batches(images, data, seed=0, start_step=0, num_steps=1)
    with pytest.raises(errors.SetupError, match=message):
        pipeline.eval_batches(images, data, batch_size=8)


def test_an_unknown_transform_lists_the_known(data):
    data.transform = "classify"
    with pytest.raises(errors.SetupError, match="'classify'. Known: classification, s"):
        sources.make_source(data, "train")


@dataclasses.dataclass(frozen=True)
class Mistaken:
    """Promises one thing and makes another."""

    fields: dict[str, Field]
    made: dict[str, np.ndarray]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, record, rng):
        return self.made


@pytest.mark.parametrize("made, message", [
    (np.zeros(1, np.int32), r"Mistaken made 'label' of .* int32 and shape \(1,\);"),
    (np.array(1.5, np.float32), r"of the type float32 .* promises int32 \(\)\."),
])
def test_arrays_that_are_not_as_promised_are_refused(data, monkeypatch, made, message):
    mistaken = Mistaken({"label": Field((), "int32", -1)}, {"label": made})
    monkeypatch.setitem(transforms.TRANSFORMS, "structured", lambda data: mistaken)
    with pytest.raises(TypeError, match=message):
        _train(data)


@pytest.mark.parametrize("name", ["sample", "valid"])
def test_names_that_every_batch_has_are_taken(data, monkeypatch, name):
    mistaken = Mistaken({name: Field((), "int32", -1)}, {name: np.int32(0)})
    monkeypatch.setitem(transforms.TRANSFORMS, "structured", lambda data: mistaken)
    message = f"Mistaken has a field '{name}', .*; give it another name"
    with pytest.raises(ValueError, match=message):
        _train(data)
    with pytest.raises(ValueError, match=message):
        pipeline.blank_batch(data, batch_size=2)
