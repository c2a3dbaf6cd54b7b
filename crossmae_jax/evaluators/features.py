"""Features of a whole split: computed once, kept on the host, shared by evaluators.

The last batch of a split is padded so that one shape is compiled; `valid` marks the
real images. Evaluations that drop the remainder, or count the padding, report the
accuracy of another data set. Here every image is counted once or the extraction fails.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from crossmae_jax import augment

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
    output: str = "features",
) -> Features:
    """Computes the features of every image once, on any number of devices and hosts.

    Args:
      predict: jitted; maps a placed batch to {"features": f32[b d]}.
      batches: host batches {"image", "label", "valid", "sample"}, the last one padded;
        each process holds its slice, and every process the same number of batches.
      place: puts a host batch on the devices, all four arrays of it.
      num_images: how many images the split holds.
      output: which of the outputs of `predict`.

    Raises:
      ValueError: if the valid rows are not `num_images` different images, or a feature
        is not finite.
    """
    values, labels, samples = [], [], []

    def collect(rows: Mapping[str, jax.Array]) -> None:
        rows = to_host(rows)
        valid = rows["valid"]
        values.append(rows["values"].astype(np.float32)[valid])
        labels.append(rows["label"].astype(np.int32)[valid])
        samples.append(rows["sample"][valid])

    waiting = None
    for batch in batches:
        batch = place(batch)
        rows = {name: batch[name] for name in ("valid", "label", "sample")}
        rows["values"] = predict(batch)[output]
        # The devices compute this batch while the one before is copied to the host.
        if waiting is not None:
            collect(waiting)
        waiting = rows
    if waiting is None:
        raise ValueError(
            f"No batch to extract features from, expected num_images={num_images}; "
            "check that the split holds images."
        )
    collect(waiting)

    sample = np.concatenate(samples)
    # Hosts interleave their slices; the sample number restores the data set's order.
    _, order = np.unique(sample, return_index=True)
    if len(order) != len(sample) or len(order) != num_images:
        raise ValueError(
            f"Extracted {len(sample)} images, {len(order)} of them different, but "
            f"num_images={num_images}; the batches must hold every image of the split "
            "once, with valid=False on padding only."
        )
    features = np.concatenate(values)[order]
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{np.sum(~finite)} of {num_images} images have {output} that are not "
            f"finite, first sample={np.argmin(finite)}; the weights have diverged. "
            "Lower optim.base_lr or go back to an earlier checkpoint."
        )
    return Features(features, np.concatenate(labels)[order])


def check_labelled(train: Features, test: Features) -> int:
    """Returns the number of classes, or says why the two sets cannot be compared.

    Raises:
      ValueError: if a set is empty or has unlabelled images, or widths differ.
    """
    for name, features in (("train", train), ("test", test)):
        if len(features.values) == 0:
            raise ValueError(f"The {name} set holds no images; give it at least one.")
        missing = int(np.sum(features.labels < 0))
        if missing:
            raise ValueError(
                f"{missing} of {len(features.labels)} {name} images have no label; "
                "k-NN and the linear probe need labels. Use a labelled data set or "
                "split, or drop these evaluators from config.evals."
            )
    if train.values.shape[1] != test.values.shape[1]:
        raise ValueError(
            f"Train features have {train.values.shape[1]} dimensions, test features "
            f"{test.values.shape[1]}; extract both with the same predict."
        )
    return int(train.labels.max()) + 1
