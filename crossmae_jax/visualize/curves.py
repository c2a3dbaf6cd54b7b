"""Numbers of runs as curves."""

import pathlib
from collections.abc import Mapping

import numpy as np

from crossmae_jax.runs import metrics
from crossmae_jax.visualize import canvas


def loss_curve(
    metrics_jsonl_path: str | pathlib.Path, path: str | pathlib.Path
) -> pathlib.Path:
    """Draws `train/loss` over steps, beside the loss of the trivial predictor.

    Steps that were logged twice, before and after a restart, count as logged last.

    Raises:
      ValueError: if the file holds no `train/loss`, or a line that is not an
        object with a step.
    """
    curves = metrics.curves(pathlib.Path(metrics_jsonl_path))
    if "train/loss" not in curves:
        raise ValueError(
            f"{metrics_jsonl_path} has {len(curves)} metrics but no train/loss; it is "
            "written every log_every_steps, so let the run get that far."
        )
    steps = sorted(curves["train/loss"])
    loss, trivial = (
        np.asarray([curves.get(name, {}).get(step, np.nan) for step in steps], float)
        for name in ("train/loss", "train/loss_trivial")
    )

    drawing, axes = canvas.axes("Loss on hidden patches while training")
    axes.plot(
        steps, trivial, color="#777777", linewidth=2, linestyle="--",
        label="trivial: the mean of each patch",
    )
    axes.plot(steps, loss, color="#1f5fa8", linewidth=2.5, label="model")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.set_xlabel("step", fontsize=13)
    axes.set_ylabel("mean squared error", fontsize=13)
    axes.legend(fontsize=12, frameon=False)
    return canvas.save(drawing, path)


def accuracy_by_blocks(
    curves: Mapping[str, Mapping[float, float]],
    path: str | pathlib.Path,
    *,
    title: str = "Partial fine-tuning",
) -> pathlib.Path:
    """Draws the accuracy of partial fine-tuning over the number of tuned blocks.

    Args:
      curves: by the name of the encoder, the accuracy, 0..1, by the number of blocks.
    """
    drawing, axes = canvas.axes(title)
    ticks = sorted({count for curve in curves.values() for count in curve})
    places = {count: place for place, count in enumerate(ticks)}  # 0 and 0.5 apart
    markers = "osD^vP*X"
    for number, (name, curve) in enumerate(curves.items()):
        counts = sorted(curve)
        axes.plot(
            [places[count] for count in counts],
            [100 * curve[count] for count in counts],
            marker=markers[number % len(markers)], linewidth=2, label=name,
        )
    axes.set_xticks(list(places.values()), [f"{count:g}" for count in ticks])
    axes.set_xlabel("fine-tuned blocks", fontsize=13)
    axes.set_ylabel("top-1 accuracy, %", fontsize=13)
    axes.legend(fontsize=12, frameon=False)
    return canvas.save(drawing, path)
