"""Accuracy of a classifier: every image of a split, counted once.

Ties are not broken in the classifier's favour: a class counts as ranked before the true
one if its logit is larger, or equal and of a lower number. Which classes are taken for
which is written as a table, `runs.confusions`.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int

from crossmae_jax import errors
from crossmae_jax.evals import evaluator
from crossmae_jax.evals.evaluator import About, Evaluation, Result, Wanted
from crossmae_jax.runs import confusions

_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The evaluator of a classifier's logits on the evaluation split; no options."""

    def wanted(self) -> tuple[Wanted, ...]:
        return (Wanted("eval", None, "logits"),)

    def check(self, about: About) -> None:
        evaluator.check_labels("accuracy", about)

    def run(self, evaluation: Evaluation) -> Result:
        """Returns "top1", "top5", "images"; writes which class is taken for which."""
        logits, labels = evaluation.labelled("eval", output="logits")
        metrics = evaluate(logits, labels)
        if jax.process_index() == 0 and evaluation.classes:
            taken = logits.argmax(axis=1)  # the first of equals, as in `evaluate`
            confusions.write(
                evaluation.path(confusions.FOLDER, ".csv"),
                confusions.count(labels, taken, evaluation.classes),
            )
        return Result(metrics)


def evaluate(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]
) -> dict[str, float]:
    """Returns the shares of images whose class is first, and among the first five.

    Returns:
      "top1", "top5" and "images", how many were counted.

    Raises:
      ValueError: if a label is not one of the classes.
    """
    count, num_classes = logits.shape
    check_range(labels, num_classes)
    ranks = []
    for start in range(0, count, _ROWS):
        rows, truth = logits[start : start + _ROWS], labels[start : start + _ROWS, None]
        own = np.take_along_axis(rows, truth, axis=1)
        earlier = np.arange(num_classes) < truth
        ranks.append(np.sum((rows > own) | ((rows == own) & earlier), axis=1))
    rank = np.concatenate(ranks)
    return {
        "top1": float(np.mean(rank < 1)), "top5": float(np.mean(rank < 5)),
        "images": float(count),
    }


def check_range(labels: Int[np.ndarray, "n"], num_classes: int) -> None:
    """Raises SetupError if a label is not one of the classes."""
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        first = int(np.argmax(outside))
        raise errors.SetupError(
            f"{outside.sum()} of {len(labels)} images have labels outside of the "
            f"head's 0 to {num_classes - 1}, first image {first} with {labels[first]}; "
            "evaluate on images of the classes that the head was trained for."
        )
