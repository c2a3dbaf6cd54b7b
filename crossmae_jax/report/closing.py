"""How a run tells what came of it, when it ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from crossmae_jax import visualize
from crossmae_jax.report import run_page
from crossmae_jax.runs import logged, mirror, results


def report(
    home: mirror.Home, metrics: Mapping[str, float], *, pictures: Sequence[Path] = ()
) -> None:
    """Prints the closing table of a run, and where everything lies.

    Writes the metrics, the curve and the page about the run.

    Args:
      metrics: everything that was measured, by name.
      pictures: that evaluations drew, the newest last.
    """
    directory = home.local
    results.write(directory, metrics)
    if text := results.table(metrics):
        print(f"\n{text}\n")
    if "train/loss_trivial" in metrics:  # not of a finished run, started again
        print(
            f"loss {metrics['train/loss']:.4f}; predicting the mean of each patch: "
            f"{metrics['train/loss_trivial']:.4f}"
        )
    if "best/step" in metrics:
        print(best(metrics))
    curve = visualize.loss_curve(directory / logged.FILE, directory / "curve.png")
    print(f"metrics      {home.name(directory / logged.FILE)}")
    print(f"curve        {home.name(curve)}")
    if pictures:
        print(f"pictures     {home.name(pictures[-1])}")
    print(f"checkpoints  {home.path / 'checkpoints'}", flush=True)
    page = run_page.write(directory, name=str(home.path))
    print(f"report       {home.name(page)}", flush=True)


def best(metrics: Mapping[str, float]) -> str:
    """Says what the best state of a run reached, and the last, on how many images."""
    (name, value), = (
        (name.removeprefix("best/"), value) for name, value in metrics.items()
        if name.startswith("best/eval/")
    )
    line = f"best {name} {value:.4f} at step {metrics['best/step']:.0f}"
    if name in metrics:
        line += f", at the end {metrics[name]:.4f}"
    if (images := metrics.get("eval/accuracy/images")) is not None:
        line += f" ({results.counted(int(images), int(images))} images)"
    return line
