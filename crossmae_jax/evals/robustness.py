"""Robustness of an ImageNet classifier that was trained on clean images only.

ImageNet-A and -R hold 200 of the 1000 classes: only the logits of these 200 compete
(hendrycks/natural-adv-examples and hendrycks/imagenet-r, eval.py; arXiv 1907.07174,
2006.16241). ImageNet-Sketch (arXiv 1905.13549) has all classes and needs no more than
`accuracy`. ImageNet-C (arXiv 1903.12261) is counted as

    CE(c) = sum over severities s of error(c, s) / sum over s of AlexNet's error(c, s)
    mCE   = mean of CE over the 15 corruptions c

The 15 are those of `data.sets.corruptions`; the four extra ones of the archive are not
part of the score. The paper's own script prints another number, the mean error without
AlexNet, over 19 sets.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from crossmae_jax.data.sets import corruptions
from crossmae_jax.evals import accuracy

CORRUPTIONS = corruptions.CORRUPTIONS
SEVERITIES = corruptions.SEVERITIES

# Mean top-1 error over the five severities; the evaluation code of AugMix
# (arXiv 1912.02781) lists them.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
_IMAGENET_CLASSES = 1000


def subset_accuracy(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]
) -> dict[str, float]:
    """Returns the accuracy of an ImageNet-1k head among the classes that occur.

    All images of the set must be given: a class without an image does not compete.

    Args:
      logits: of the 1000 classes.
      labels: from 0 to 999, whichever subset they are of.

    Returns:
      "top1", "top5" and "images" as of `accuracy`, and "classes", how many competed.

    Raises:
      ValueError: if the logits are not of 1000 classes, or a label is none of them.
    """
    count, num_classes = logits.shape
    if num_classes != _IMAGENET_CLASSES:
        raise ValueError(
            f"The head has {num_classes} classes; labels of ImageNet's variants are "
            f"numbers among the {_IMAGENET_CLASSES} of ImageNet-1k. Evaluate a model "
            "that was fine-tuned there."
        )
    accuracy.check_range(labels, num_classes)
    classes, places = np.unique(labels, return_inverse=True)
    among = accuracy.evaluate(logits[:, classes], places)
    return among | {"classes": float(len(classes))}


def mean_errors(errors: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Returns error rates without a comparison, of any data set.

    Args:
      errors: top-1 error (0 to 1) of each of the 75 (corruption, severity).

    Returns:
      "mean_error", over all 75, and "error/NAME" of each corruption, from 0 to 1.

    Raises:
      ValueError: if one is missing, unknown or not from 0 to 1.
    """
    expected = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    missing = [pair for pair in expected if pair not in errors]
    unknown = sorted(set(errors) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"Errors of {len(missing)} of {len(expected)} sets are missing"
            f"{_listed(missing)}, and of {len(unknown)} not part of the score are "
            f"given{_listed(unknown)}. Give exactly the 15 corruptions with severities "
            "1 to 5."
        )
    for (name, severity), error in errors.items():
        if not 0 <= error <= 1:
            raise ValueError(
                f"The error of {name} {severity} is {error}; expected a share of the "
                "images, from 0 to 1."
            )
    means = {
        name: float(np.mean([errors[name, severity] for severity in SEVERITIES]))
        for name in CORRUPTIONS
    }
    return {
        "mean_error": float(np.mean(list(means.values()))),
        **{f"error/{name}": mean for name, mean in means.items()},
    }


def corruption_errors(errors: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Returns the mean corruption error of ImageNet-C, where AlexNet has 100 %.

    AlexNet's errors are those on ImageNet-1k's own classes and stored corruptions: for
    other data `mean_errors` says what can be said.

    Args:
      errors: as for `mean_errors`.

    Returns:
      "mce" and "ce/NAME" of each corruption, in percent of AlexNet's errors; and what
      `mean_errors` returns.

    Raises:
      ValueError: as of `mean_errors`.
    """
    means = mean_errors(errors)
    ratios = {
        name: 100 * means[f"error/{name}"] / alexnet
        for name, alexnet in ALEXNET_ERRORS.items()
    }
    return {
        "mce": float(np.mean(list(ratios.values()))),
        **{f"ce/{name}": ratio for name, ratio in ratios.items()},
        **means,
    }


def _listed(pairs: list[tuple[str, int]]) -> str:
    """Returns some of the pairs in brackets, or nothing for none."""
    if not pairs:
        return ""
    names = [f"{name} {severity}" for name, severity in pairs[:5]]
    return f" ({', '.join(names)}{', ...' if len(pairs) > 5 else ''})"
