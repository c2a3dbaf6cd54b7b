"""What the model makes of the hidden patches: a picture, and its error in numbers.

The same images and the same masks at every evaluation, so that pictures of two steps
can be laid side by side.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jaxtyping import Float

from crossmae_jax import visualize
from crossmae_jax.evals import evaluator, features
from crossmae_jax.evals.evaluator import About, Evaluation, Result, Wanted

_OUTPUT = "reconstruction"
_SHOWN = 8  # rows of a panel


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The evaluator: draws a panel and measures errors, on held-out images if it can.

    Attributes:
      num_images: so many images, evenly spread, are measured.
    """

    num_images: int

    def __post_init__(self):
        evaluator.check_limit("reconstruction", "num_images", self.num_images)

    def wanted(self) -> tuple[Wanted, ...]:
        return (Wanted("eval", self.num_images, _OUTPUT),)

    def check(self, about: About) -> None:
        """Any images do."""

    def run(self, evaluation: Evaluation) -> Result:
        """Returns what `evaluate` does, and the panel."""
        split = evaluator.held_out(evaluation.num_images)
        panel = evaluation.path("panels", ".png")
        metrics = evaluate(
            evaluation.output(_OUTPUT), evaluation.batches(split, self.num_images),
            evaluation.place, panel, caption=evaluation.captions[_OUTPUT],
        )
        return Result(metrics, (panel,))


def psnr(pictures: visualize.Reconstruction) -> Float[np.ndarray, "b"] | None:
    """Returns the peak signal-to-noise ratio of hidden patches, in dB, of each image.

    None where it is no image that was predicted.

    20 log10(255 / rmse), of pixels rounded to 0..255, over all values of the hidden
    patches, as CrossMAE counts (arXiv 2401.14391, table 13; whether it averages ratios
    or errors over images it does not say, here ratios are). With standardised targets
    predictions take mean and deviation from the true patch, which flatters them all.
    A perfect prediction is infinite: that of an image of one flat colour, for example,
    whose patches have no deviation.
    """
    if pictures.target is not None:
        return None
    original, predicted = (
        np.rint(255 * np.clip(np.asarray(image, np.float64), 0, 1))
        for image in (pictures.image, pictures.pasted)
    )
    squared = (original - predicted) ** 2  # 0 where the patch is visible
    share = np.asarray(pictures.mask, np.float64).mean(1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 * share / squared.mean((1, 2, 3)))


def mean_psnr(ratios: Float[np.ndarray, "n"]) -> dict[str, float]:
    """Returns the mean over images that were not predicted to the last level.

    Under "psnr"; without one there is none. "psnr_left_out" counts the others.
    """
    finite = ratios[np.isfinite(ratios)]
    metrics = {"psnr": float(finite.mean())} if len(finite) else {}
    if len(finite) < len(ratios):
        metrics["psnr_left_out"] = float(len(ratios) - len(finite))
    return metrics


def evaluate(
    reconstruct: Callable[[features.Batch], visualize.Reconstruction],
    batches: Iterable[features.Batch],
    place: Callable[[features.Batch], features.Batch],
    path: str | pathlib.Path,
    *,
    caption: str,
) -> dict[str, float]:
    """Writes a panel of the first images to `path`; returns the errors of all.

    "mse" is the mean squared error of ALL hidden patches of the valid images, in the
    space of the targets (of several, of the one that is shown); where some were thrown,
    "mse_retained" and "mse_thrown" tell them apart. "psnr" is that of `mean_psnr`, and
    is left out where no image was predicted. The first process writes the picture; all
    must call this.
    """
    pictures, errors, ratios, num_shown = [], [], [], 0
    for batch in batches:
        batch = place(batch)
        valid, picture = features.to_host((batch["valid"], reconstruct(batch)))
        picture = jax.tree.map(lambda array: array[valid], picture)
        errors.append((picture.error, picture.mask, picture.thrown))
        if (ratio := psnr(picture)) is not None:
            ratios.append(ratio)
        if num_shown < _SHOWN:  # pictures of a whole split would fill the memory
            pictures.append(picture)
            num_shown += len(picture.image)
    error, mask, thrown = (np.concatenate(arrays) for arrays in zip(*errors))
    if jax.process_index() == 0:
        shown = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:_SHOWN], *pictures)
        visualize.reconstruction_panel(shown, path, caption=caption)
    groups = {"mse": mask}
    if thrown.any():
        groups |= {"mse_retained": mask & ~thrown, "mse_thrown": thrown}
    error = error.astype(np.float64)
    means = {name: float(error[group].mean()) for name, group in groups.items()}
    return means | (mean_psnr(np.concatenate(ratios)) if ratios else {})
