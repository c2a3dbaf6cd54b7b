"""Linear probe on frozen features: multinomial logistic regression, solved exactly.

    min over W, b of   mean_i  -log softmax(x_i W + b)[y_i]  +  l2 / 2 * |W|^2

Features are standardised with the mean and deviation of the train set. The problem is
convex and is solved with full-batch L-BFGS until the gradient vanishes, so the answer
depends neither on a learning rate nor on a seed. `l2` is chosen on a fifth of the TRAIN
set that is held out; then all of the train set is fitted. In scikit-learn's terms
C = 1 / (l2 * number of images).

This is not the probe of MAE (arXiv 2111.06377, appendix A.1): that one trains 90 epochs
of LARS on augmented crops behind a batch norm, which is a training run of its own. Ours
sees one view per image and takes seconds; its numbers are for comparing features with
each other, not with published tables.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from crossmae_jax import ranges
from crossmae_jax.evals import evaluator, features
from crossmae_jax.evals.evaluator import About, Evaluation, Result, Wanted

# From strong to weak: each fit starts from the one before, the shortest way round.
L2S = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_BLOCK_ELEMENTS = 2**24  # logits that exist at a time: 64 MiB


@dataclasses.dataclass(frozen=True)
class Linear:
    """The evaluator: a probe of the training split, tested on the evaluation split.

    Attributes:
      l2s: regularisations to choose from.
      max_iterations: L-BFGS steps at most, for each fit.
      tolerance: largest absolute entry of the gradient at which a fit has converged.
      max_train_images: fit so many training images, evenly spread; None: all.
    """

    l2s: Sequence[float] = L2S
    max_iterations: int = 1000
    tolerance: float = 1e-6
    max_train_images: int | None = None

    def __post_init__(self):
        for l2 in self.l2s:
            ranges.check("evals.linear.l2s", l2, above=0)
        ranges.check("evals.linear.max_iterations", self.max_iterations, least=1)
        ranges.check("evals.linear.tolerance", self.tolerance, above=0)
        evaluator.check_limit("linear", "max_train_images", self.max_train_images)

    def wanted(self) -> tuple[Wanted, ...]:
        return (
            Wanted("train", self.max_train_images, "features"),
            Wanted("eval", None, "features"),
        )

    def check(self, about: About) -> None:
        evaluator.check_labels("linear", about)

    def run(self, evaluation: Evaluation) -> Result:
        """Returns "top1", and "l2", which was chosen."""
        train = evaluation.labelled("train", self.max_train_images)
        return Result(evaluate(
            train, evaluation.labelled("eval"), l2s=self.l2s,
            max_iterations=self.max_iterations, tolerance=self.tolerance,
            alive=evaluation.alive,
        ))


class Classifier(NamedTuple):
    """The affine map from standardised features to logits."""

    kernel: Float[Array, "d classes"]
    bias: Float[Array, "classes"]


class _Rows(NamedTuple):
    """Examples in blocks of equal size; padding weighs nothing."""

    values: Float[np.ndarray, "blocks rows d"]
    labels: Int[np.ndarray, "blocks rows"]
    weights: Float[np.ndarray, "blocks rows"]


def evaluate(
    train: features.Features,
    test: features.Features,
    *,
    l2s: Sequence[float] = L2S,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns the share of test images classified correctly, and the chosen l2.

    Args:
      l2s: regularisations to choose from.
      max_iterations: L-BFGS steps at most, for each fit.
      tolerance: largest absolute entry of the gradient at which a fit has converged.
      alive: called before each fit.

    Raises:
      ValueError: for unlabelled or mismatched features, or l2s that cannot be used.
    """
    num_classes = features.check_labelled(train, test)
    l2s = sorted(l2s, reverse=True)
    if not l2s or l2s[-1] <= 0:
        raise ValueError(f"l2s={l2s}; give positive regularisations to choose from.")
    standardise = _standardiser(train.values)
    train = train._replace(values=standardise(train.values))
    test = test._replace(values=standardise(test.values))

    def solve(train, **options):
        alive()
        return fit(
            train, num_classes=num_classes, max_iterations=max_iterations,
            tolerance=tolerance, **options,
        )

    chosen = l2s[0]
    if len(l2s) > 1:
        chosen = _choose_l2(train, l2s, solve)
    classifier = solve(train, l2=chosen)
    _, num_correct = _scores(classifier, _blocks(test, num_classes))
    return {"top1": float(num_correct) / len(test.labels), "l2": float(chosen)}


def fit(
    train: features.Features,
    *,
    num_classes: int,
    l2: float,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    weights: Float[np.ndarray, "n"] | None = None,
    start: Classifier | None = None,
) -> Classifier:
    """Solves the regression on features as they are (standardise them first).

    Args:
      weights: how much each example counts; all the same if None.
      start: where to begin; zeros if None. The solution does not depend on it.
    """
    rows = _blocks(train, num_classes, weights)
    if start is None:
        width = train.values.shape[1]
        start = Classifier(jnp.zeros((width, num_classes)), jnp.zeros(num_classes))
    classifier, slope = _minimise(
        start, rows, jnp.float32(l2), jnp.float32(tolerance), max_iterations
    )
    if not slope <= tolerance:
        logging.getLogger(__name__).warning(
            "Linear probe with l2=%g stopped after max_iterations=%d at gradient %.1e, "
            "above tolerance=%.1e; raise max_iterations or leave out weak l2s.",
            l2, max_iterations, slope, tolerance,
        )
    return classifier


def _choose_l2(train, l2s, solve):
    """Returns the l2 most accurate on held-out train examples; ties by their loss."""
    num = len(train.labels)
    if num < 5:
        raise ValueError(
            f"{num} train images cannot be split into four fifths and one; give at "
            "least 5, or a single l2."
        )
    # Shuffled, because data sets come sorted by class or cycle through the classes; a
    # fixed seed, because the choice must not differ between two evaluations. Raw bits,
    # because NumPy does not promise that permutation() stays what it is.
    order = np.argsort(np.random.Philox(0).random_raw(num), kind="stable")
    held_out = np.zeros(num, bool)
    held_out[order[: num // 5]] = True
    # Weights instead of two smaller sets: one shape, compiled once for every fit.
    fitted = np.where(held_out, 0.0, 1.0)
    rows = _blocks(train, int(train.labels.max()) + 1, 1.0 - fitted)
    classifier, scores = None, []
    for l2 in l2s:
        classifier = solve(train, l2=l2, weights=fitted, start=classifier)
        loss, num_correct = _scores(classifier, rows)
        scores.append((-float(num_correct), float(loss), l2))
    return min(scores)[2]


@jax.jit
def _minimise(start, rows, l2, tolerance, max_iterations):
    """Runs L-BFGS until no entry of the gradient is above the tolerance."""

    def objective(classifier):
        loss, _ = _scores(classifier, rows)
        return loss + 0.5 * l2 * jnp.sum(classifier.kernel**2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def slope(grad):
        return jnp.maximum(jnp.abs(grad.kernel).max(), jnp.abs(grad.bias).max())

    def unfinished(carry):
        _, _, grad, iteration = carry
        return (iteration < max_iterations) & (slope(grad) > tolerance)

    def step(carry):
        classifier, state, _, iteration = carry
        value, grad = value_and_grad(classifier, state=state)
        updates, state = optimizer.update(
            grad, state, classifier, value=value, grad=grad, value_fn=objective
        )
        # The line search leaves the gradient of the new point in its state.
        grad = optax.tree.get(state, "grad")
        return optax.apply_updates(classifier, updates), state, grad, iteration + 1

    carry = (start, optimizer.init(start), jax.grad(objective)(start), 0)
    classifier, _, grad, _ = jax.lax.while_loop(unfinished, step, carry)
    return classifier, slope(grad)


@jax.jit
def _scores(classifier, rows):
    """Returns the mean cross-entropy and the weight of the examples it gets right."""

    @jax.checkpoint  # the backward pass, too, holds the logits of one block only
    def add(totals, block):
        logits = (
            jnp.matmul(
                block.values, classifier.kernel, precision=jax.lax.Precision.HIGHEST
            )
            + classifier.bias[None]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, block.labels)
        correct = jnp.argmax(logits, axis=-1) == block.labels
        return (
            totals[0] + jnp.sum(loss * block.weights),
            totals[1] + jnp.sum(correct * block.weights),
        ), None

    zero = jnp.zeros(())
    (loss, correct), _ = jax.lax.scan(add, (zero, zero), rows)
    return loss / jnp.sum(rows.weights), correct


def _blocks(data, num_classes, weights=None):
    """Cuts examples into equal blocks, the last one padded with weightless rows."""
    num, width = data.values.shape
    if weights is None:
        weights = np.ones(num)
    size = min(num, max(1, _BLOCK_ELEMENTS // num_classes))
    padding = -num % size
    # A class the train set lacks has no logit: -1 is never predicted, hence wrong.
    labels = np.where(data.labels < num_classes, data.labels, -1)
    return _Rows(
        np.pad(data.values, ((0, padding), (0, 0))).reshape(-1, size, width),
        np.pad(labels, (0, padding)).reshape(-1, size),
        np.pad(weights, (0, padding)).reshape(-1, size).astype(np.float32),
    )


def _standardiser(values):
    """Returns the function that gives these values mean 0 and deviation 1."""
    mean = values.mean(axis=0, dtype=np.float64).astype(np.float32)
    std = np.sqrt(np.mean((values - mean) ** 2, axis=0, dtype=np.float64))
    # A constant dimension stays as it is: dividing by the rounding error of its
    # deviation would turn it into noise.
    std = np.where(std <= 1e-6 * np.abs(mean), 1.0, std).astype(np.float32)
    return lambda values: (values - mean) / std
