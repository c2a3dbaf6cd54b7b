"""Features of a whole split: computed once, kept on the host, shared by evaluators.

The last batch of a split is padded so that one shape is compiled; `valid` marks the
real images. Evaluations that drop the remainder, or count the padding, report the
accuracy of another data set. Here every image is counted once or the extraction fails.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from crossmae_jax import augment, errors

Batch = Mapping[str, Any]
Predict = Callable[[Batch], Mapping[str, jax.Array]]


class Features(NamedTuple):
    """A row per image, in the order of the data set, on the host."""

    values: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, "n"]


def to_host(tree: Any) -> Any:
    """Returns a tree of device arrays as whole numpy arrays, on every process.

    Arrays that lie across processes are gathered, so all processes must call this.
    """
    return multihost_utils.process_allgather(tree, tiled=True)


def raw_pixels(*, mean: tuple[float, ...], std: tuple[float, ...]) -> Predict:
    """Returns a `predict` whose features are the normalised pixels: the baseline."""

    @jax.jit
    def predict(batch: Batch) -> Mapping[str, jax.Array]:
        images = augment.normalize(batch["image"], mean=mean, std=std)
        return {"features": images.reshape(images.shape[0], -1)}

    return predict


def extract(
    predict: Predict,
    batches: Iterable[Batch],
    place: Callable[[Batch], Batch],
    *,
    num_images: int,
    outputs: Sequence[str] = ("features",),
) -> dict[str, Features]:
    """Computes the features of every image once, on any number of devices and hosts.

    The arrays of the split are made once and written batch by batch.

    Args:
      predict: jitted; maps a placed batch to {"features": f32[b d]}.
      batches: host batches {"image", "label", "valid", "sample"}, the last one padded;
        each process holds its slice, and every process the same number of batches.
      place: puts a host batch on the devices, all four arrays of it.
      num_images: how many images the split holds.
      outputs: which of the outputs of `predict` are kept, all of one pass.

    Returns:
      The features of each of the outputs; their labels are one array.

    Raises:
      ValueError: if the valid rows are not `num_images` different images, a feature is
        not finite, or `predict` has no such output.
    """
    table = _Table(num_images)
    waiting = None
    for batch in batches:
        batch = place(batch)
        predicted = predict(batch)
        if missing := [name for name in outputs if name not in predicted]:
            raise ValueError(
                f"No output {', '.join(missing)} to evaluate; the model has "
                f"{', '.join(sorted(predicted))}. Evaluate one of these."
            )
        rows = {name: batch[name] for name in ("valid", "label", "sample")}
        rows["values"] = {name: predicted[name] for name in outputs}
        # The devices compute this batch while the one before is copied to the host.
        if waiting is not None:
            table.add(to_host(waiting))
        waiting = rows
    if waiting is None:
        raise ValueError(
            f"No batch to extract features from, expected num_images={num_images}; "
            "check that the split holds images."
        )
    table.add(to_host(waiting))
    return table.finish()


class _Table:
    """The rows of a split in arrays of their final size."""

    def __init__(self, num_images: int):
        self._labels = np.empty(num_images, np.int32)
        self._samples: list[np.ndarray] = []
        self._values: dict[str, np.ndarray] = {}
        self._num_rows = 0  # all that came, also those that are too many
        self._broken: dict[str, list[int]] = {}

    def add(self, rows: Mapping[str, Any]) -> None:
        """Writes the valid rows of a batch behind those that are there."""
        valid, num_images = np.flatnonzero(rows["valid"]), len(self._labels)
        self._samples.append(rows["sample"][valid])
        begin = min(self._num_rows, num_images)
        self._num_rows += len(valid)
        end = min(self._num_rows, num_images)
        valid = valid[: end - begin]
        self._labels[begin:end] = rows["label"][valid]
        for name, values in rows["values"].items():
            if name not in self._values:
                shape = (num_images, *values.shape[1:])
                self._values[name] = np.empty(shape, np.float32)
            written = self._values[name][begin:end]
            written[:] = values[valid]
            finite = np.isfinite(written).all(axis=1)
            broken = self._broken.setdefault(name, [])
            broken.extend(rows["sample"][valid[~finite]].tolist())

    def finish(self) -> dict[str, Features]:
        """Returns the rows in the order of the data set."""
        num_images = len(self._labels)
        sample = np.concatenate(self._samples)
        num_different = len(np.unique(sample))
        if not num_different == self._num_rows == num_images:
            raise ValueError(
                f"Extracted {self._num_rows} images, {num_different} of them "
                f"different, but num_images={num_images}; the batches must hold every "
                "image of the split once, with valid=False on padding only."
            )
        for name, samples in self._broken.items():
            if samples:
                raise ValueError(
                    f"{len(samples)} of {num_images} images have {name} that are not "
                    f"finite, first sample={min(samples)}; the weights have diverged. "
                    "Lower optim.base_lr or go back to an earlier checkpoint."
                )
        # Hosts interleave their slices; the sample number restores the order.
        if np.any(sample[1:] < sample[:-1]):
            order = np.argsort(sample)
            self._labels = self._labels[order]
            for values in self._values.values():
                _reorder(values, order)
        return {
            name: Features(values, self._labels)
            for name, values in self._values.items()
        }


def _reorder(values: np.ndarray, order: np.ndarray) -> None:
    """Sorts rows in place, a few columns at a time: never all of them twice."""
    width = values.shape[1]
    step = -(-width // 16)
    for first in range(0, width, step):
        columns = slice(first, first + step)
        values[:, columns] = values[order, columns]


def check_labelled(train: Features, test: Features) -> int:
    """Returns the number of classes, or says why the two sets cannot be compared.

    Raises:
      SetupError: if a set is empty or has unlabelled images.
      ValueError: if widths differ.
    """
    for name, features in (("train", train), ("test", test)):
        if len(features.values) == 0:
            raise errors.SetupError(
                f"The {name} set holds no images; give it at least one."
            )
        missing = int(np.sum(features.labels < 0))
        if missing:
            raise errors.SetupError(
                f"{missing} of {len(features.labels)} {name} images have no label, the "
                f"first is number {int(np.argmax(features.labels < 0))}; k-NN and the "
                "linear probe need labels. Use a labelled data set or split, or drop "
                "these evaluators from config.evals."
            )
    if train.values.shape[1] != test.values.shape[1]:
        raise ValueError(
            f"Train features have {train.values.shape[1]} dimensions, test features "
            f"{test.values.shape[1]}; extract both with the same predict."
        )
    return int(train.labels.max()) + 1
