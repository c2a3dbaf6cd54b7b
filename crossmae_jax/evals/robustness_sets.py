"""Robustness of a classifier: ImageNet-A, -R, -Sketch and -C, or images of one's own.

Without one of the sets the evaluation split is corrupted on the fly, in 15 ways with 5
severities each. docs/robustness.md says what is counted of what.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from crossmae_jax.data import sources
from crossmae_jax.data.sets import corruptions, imagenet_variants
from crossmae_jax.evals import accuracy, features, robustness

LogitsOf = Callable[[sources.Source, ConfigDict], features.Features]
Measure = Callable[[LogitsOf], tuple[dict[str, float], int]]
# What a reader of the numbers must know.
NOTES = {
    "imagenet_c": "imagenet_c: mce and ce in percent of AlexNet's errors, the rest "
                  "shares from 0 to 1",
    "corrupted": "corrupted: made on the fly, not comparable with ImageNet-C "
                 "(docs/robustness.md)",
}
_OPEN = {
    "a": imagenet_variants.imagenet_a,
    "r": imagenet_variants.imagenet_r,
    "sketch": imagenet_variants.imagenet_sketch,
}


def prepare(
    data: ConfigDict, source: sources.Source | None, *, imagenet: Mapping[str, str],
    classes: tuple[str, ...] | None = None,
) -> dict[str, Measure]:
    """Opens what robustness is measured on, before anything is computed.

    Args:
      data: `config.data`.
      source: the images to corrupt; not used where sets are given.
      imagenet: directories of "a", "r", "sketch" and "c", as many as there are.
      classes: of the head, if they are known.

    Returns:
      By name, "imagenet_a" or "corrupted", what measures it: (source, data) -> the
      logits and labels of all images of a source, to metrics and a number of images.

    Raises:
      ValueError: if a set is not whole, the head is not one of its classes, or images
        cannot be corrupted here.
    """
    if imagenet and data.num_classes != len(imagenet_variants.wordnet_ids()):
        raise ValueError(
            f"The head has {data.num_classes} classes; ImageNet-A, -R, -Sketch and -C "
            "need one of ImageNet-1k's 1000. Leave out their directories to measure "
            "robustness on the evaluation split."
        )
    if imagenet and classes not in (None, imagenet_variants.wordnet_ids()):
        raise ValueError(
            "The head's classes are no WordNet ids in their order, but "
            f"{', '.join(classes[:3])}, ...: the labels of ImageNet-A, -R, -Sketch and "
            "-C would stand for others. Leave out their directories, or give weights "
            "that were trained on folders or a TFDS set named by WordNet id."
        )
    sets: dict[str, Measure] = {}
    for name, directory in imagenet.items():
        if name == "c":
            _check_folders(Path(directory).expanduser())
            open_one = functools.partial(imagenet_variants.imagenet_c, directory)
            sets["imagenet_c"] = functools.partial(
                _of_corruptions, data=data, open_one=open_one,
                summary=robustness.corruption_errors,
            )
        else:
            sets[f"imagenet_{name}"] = functools.partial(
                _of_set, data=data, source=_OPEN[name](directory)
            )
    if sets:
        return sets
    open_one = functools.partial(corruptions.Corrupted, source, data)
    try:
        open_one(corruption="fog", severity=1)
    except ImportError as error:
        raise ValueError(str(error)) from error
    return {"corrupted": functools.partial(
        _of_corruptions, data=data, open_one=open_one, summary=robustness.mean_errors
    )}


def _check_folders(directory: Path) -> None:
    """Looks for all 75 folders now: the last is opened hours after the first."""
    missing = [
        f"{name}/{severity}" for name in robustness.CORRUPTIONS
        for severity in robustness.SEVERITIES
        if not (directory / name / str(severity)).is_dir()
    ]
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} of the 75 folders of ImageNet-C, first "
            f"{missing[0]}; unpack noise.tar, blur.tar, weather.tar and digital.tar "
            "side by side."
        )


def _of_set(logits_of: LogitsOf, *, data, source):
    return robustness.subset_accuracy(*logits_of(source, data)), len(source)


def _of_corruptions(logits_of: LogitsOf, *, data, open_one, summary):
    as_stored = data.copy_and_resolve_references()
    as_stored.eval_crop_ratio = 1.0  # these images are cropped already
    errors, num_images = {}, 0
    for name in robustness.CORRUPTIONS:
        for severity in robustness.SEVERITIES:
            logits = logits_of(open_one(corruption=name, severity=severity), as_stored)
            errors[name, severity] = 1 - accuracy.evaluate(*logits)["top1"]
            num_images += len(logits.labels)
    return summary(errors), num_images
