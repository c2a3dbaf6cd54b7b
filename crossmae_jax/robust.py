"""Robustness of a classifier: ImageNet-A, -R, -Sketch and -C, or images of one's own.

Without one of the sets the evaluation split is corrupted on the fly, in 15 ways with 5
severities each. docs/robustness.md says what is counted of what.
"""

import functools
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from crossmae_jax.data import corruptions, imagenet_variants, sources
from crossmae_jax.evaluators import accuracy, features, robustness

LogitsOf = Callable[[sources.Source, ConfigDict], features.Features]
NOTE = "corrupted on the fly: not comparable with ImageNet-C (docs/robustness.md)"
_OPEN = {
    "a": imagenet_variants.imagenet_a,
    "r": imagenet_variants.imagenet_r,
    "sketch": imagenet_variants.imagenet_sketch,
}


def evaluate(
    logits_of: LogitsOf,
    data: ConfigDict,
    source: sources.Source | None,
    *,
    imagenet: Mapping[str, str],
) -> dict[str, float]:
    """Returns metrics by set, "imagenet_a/top1", or "corrupted/mean_error".

    Args:
      logits_of: (source, data) -> the logits and labels of all its images, prepared as
        `data` says.
      data: `config.data`.
      source: the images to corrupt; not used where sets are given.
      imagenet: directories of "a", "r", "sketch" and "c", as many as there are.

    Raises:
      ValueError: if a set is not whole, the head is not one of its classes, or there
        is nothing to evaluate on.
    """
    found = {}
    for name, directory in imagenet.items():
        if name == "c":
            open_one = functools.partial(imagenet_variants.imagenet_c, directory)
            metrics = robustness.corruption_errors(_errors(logits_of, data, open_one))
        else:
            one = _OPEN[name](directory)
            metrics = robustness.subset_accuracy(*logits_of(one, data))
        found |= {f"imagenet_{name}/{key}": value for key, value in metrics.items()}
    if imagenet:
        return found
    if source is None:
        raise ValueError(
            "Robustness needs images: an evaluation split (data.eval_split or "
            "data.eval_dir) to corrupt, or directories of ImageNet-A, -R, -Sketch or "
            "-C."
        )
    open_one = functools.partial(corruptions.Corrupted, source, data)
    metrics = robustness.mean_errors(_errors(logits_of, data, open_one))
    return {f"corrupted/{key}": value for key, value in metrics.items()}


def _errors(
    logits_of: LogitsOf, data: ConfigDict, open_one: Callable[..., sources.Source]
) -> dict[tuple[str, int], float]:
    """Returns the top-1 error of each corruption and severity."""
    as_stored = data.copy_and_resolve_references()
    as_stored.eval_crop_ratio = 1.0  # these images are cropped already
    found = {}
    for name in robustness.CORRUPTIONS:
        for severity in robustness.SEVERITIES:
            one = open_one(corruption=name, severity=severity)
            accurate = accuracy.evaluate(*logits_of(one, as_stored))
            found[name, severity] = 1 - accurate["top1"]
    return found
