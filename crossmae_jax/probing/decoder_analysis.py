"""The papers' questions to a decoder, asked of a whole data set.

Where do masked patches look (CrossMAE, arXiv 2401.14391, figure 1), and what happens if
they cannot? Images are streamed: a batch is computed, added up and forgotten, so that
memory does not grow with the data set.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm

from crossmae_jax import errors, tables
from crossmae_jax.convert import structure
from crossmae_jax.data import bad_images, crops, decoding, pipeline, sources
from crossmae_jax.evals import reconstruction
from crossmae_jax.probing import attention_weights
from crossmae_jax.probing.pretrained import Pretrained


class Score(NamedTuple):
    """How well masked patches are predicted, a mean over images.

    Attributes:
      mse: mean squared error in the space of the targets.
      psnr: peak signal-to-noise ratio in dB, see `evals.reconstruction.psnr`; of
        images that were not predicted to the last level. None of what is no image.
      num_images: how many.
    """

    mse: float
    psnr: float | None
    num_images: int


def attention(
    model: Pretrained, source: sources.Source, *, num_images: int | None = None,
    batch_size: int = 32, mask_ratio: float | None = None, seed: int = 0,
    workers: int = 0, max_pixels: int = decoding.MAX_PIXELS, progress: bool = True,
) -> attention_weights.Magnitudes:
    """Measures how much masked patches attend to visible and to masked ones.

    Image number i of the source has the i-th mask of the seed, whatever the batch size.

    Args:
      source: images, such as `data.sources.FolderSource(directory)`.
      num_images: only so many, spread evenly over the source.
      workers: processes that decode images; 0 for threads of this one.
      max_pixels: height times width of the largest image that may be decoded.
      progress: draws a bar.

    Raises:
      ConversionError: if the model has no decoder.
      SetupError: if the source holds no images.
    """
    total, seen = None, 0
    magnitudes = None
    for images, numbers in _stream(
        model, source, num_images, batch_size, workers, max_pixels, progress,
        "attention",
    ):
        magnitudes = model.attention_magnitudes(
            images, mask_ratio=mask_ratio, seed=seed, numbers=numbers
        )
        # Sums in float64: a million images would lose digits in float32.
        sums = np.stack([magnitudes.visible, magnitudes.masked])
        sums = sums.astype(np.float64).sum(1)
        total = sums if total is None else total + sums
        seen += len(images)
    return magnitudes._replace(visible=total[0] / seen, masked=total[1] / seen)


def ablations(
    model: Pretrained, source: sources.Source, *, num_images: int | None = None,
    batch_size: int = 32, mask_ratio: float | None = None, seed: int = 0,
    workers: int = 0, max_pixels: int = decoding.MAX_PIXELS, progress: bool = True,
) -> dict[str, Score]:
    """Scores an MAE as it is and without either attention of its masked patches.

    Args: as of `attention`.

    Returns:
      Scores of "full", "without masked" and "without visible", on the same masks.

    Raises:
      ConversionError, ValueError: as `Pretrained.reconstruct` does.
    """
    kinds = {"full": None}
    kinds |= {f"without {kind}": kind for kind in attention_weights.WITHOUT}
    sums = {name: np.zeros(3) for name in kinds}  # of errors, of ratios; finite ones
    seen, of_images = 0, True
    for images, numbers in _stream(
        model, source, num_images, batch_size, workers, max_pixels, progress,
        "ablations",
    ):
        for name, kind in kinds.items():
            pictures = model.reconstruct(
                images, mask_ratio=mask_ratio, seed=seed, without=kind,
                numbers=numbers,
            )
            ratios = reconstruction.psnr(pictures)
            of_images = ratios is not None
            finite = ratios[np.isfinite(ratios)] if of_images else np.zeros(0)
            mse = pictures.error.sum(1) / pictures.mask.sum(1)
            sums[name] += mse.sum(), finite.sum(), len(finite)
        seen += len(images)
    scores = {}
    for name, (error, ratio, count) in sums.items():
        mean = ratio / count if count else np.inf
        scores[name] = Score(error / seen, mean if of_images else None, seen)
    return scores


def _stream(
    model: Pretrained, source: Any, num_images: int | None, batch_size: int,
    workers: int, max_pixels: int, progress: bool, title: str,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the images of a source, and their numbers in it."""
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise errors.SetupError(f"{name}={value} must be 1 or more.")
    data = structure.config_of(model.card).data
    data.update(
        eval_crop_ratio=crops.EVAL_CROP_RATIO, workers=workers, max_bad_share=0.0,
        max_pixels=max_pixels,
        # Of training, which does not take place.
        transform="classification", crop="ten_tries", crop_scale=(1.0, 1.0), flip=False,
        randaug_ops=0,
    )
    with errors.setting_up():
        batches = pipeline.eval_batches(
            source, data, batch_size=batch_size, num_images=num_images
        )
    count = len(source) if num_images is None else min(num_images, len(source))
    bar = tqdm.tqdm(total=count, desc=title, unit=" images", disable=not progress)
    with batches, bar:
        try:
            for batch in batches:
                valid = batch["valid"]
                yield batch["image"][valid], batch["sample"][valid]
                bar.update(int(valid.sum()))
        except bad_images.TooManyBadImages as error:
            raise errors.SetupError(
                f"An image cannot be decoded: {error.reason}. Repair or remove it; "
                "here none is replaced by another."
            ) from error


def table(scores: dict[str, Score]) -> str:
    """Returns the scores in Markdown."""
    titles, rows = ("attention", "MSE", "PSNR, dB"), []
    for name, score in scores.items():
        row = name, f"{score.mse:.4f}"
        rows.append(row if score.psnr is None else (*row, f"{score.psnr:.2f}"))
    titles = titles[:max(map(len, rows))]
    return tables.markdown(tables.Table(titles, tuple(rows)))
