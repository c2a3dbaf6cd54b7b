"""How a run tells what came of it, when it ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from crossmae_jax import tables, visualize
from crossmae_jax.report import run_page
from crossmae_jax.runs import confusions, metrics, mirror, results


def report(
    home: mirror.Home, measured: Mapping[str, float], *, pictures: Sequence[Path] = ()
) -> None:
    """Prints the closing table of a run, and where everything lies.

    Writes the numbers, the curve and the page about the run.

    Args:
      measured: everything that was measured, by name.
      pictures: that evaluations drew, the newest last.
    """
    directory = home.local
    results.write(directory, measured)
    if table := results.compared(measured):
        print(f"\n{tables.markdown(table)}\n")
    if "train/loss_trivial" in measured:  # which classifiers have not
        print(
            f"loss {measured['train/loss']:.4f}; predicting the mean of each patch: "
            f"{measured['train/loss_trivial']:.4f}"
        )
    if "best/step" in measured:
        print(best(measured))
    if counted := confusions.newest(directory):
        if frequent := confusions.recalled(counted):
            print(f"\n{tables.markdown(confusions.table(frequent))}\n")
        print(f"confusions   {home.name(counted)}")
    print(f"metrics      {home.name(directory / metrics.FILE)}")
    # Somebody may have removed the lines of a run that was finished already.
    if "train/loss" in metrics.curves(directory / metrics.FILE):
        curve = visualize.loss_curve(directory / metrics.FILE, directory / "curve.png")
        print(f"curve        {home.name(curve)}")
    if pictures:
        print(f"pictures     {home.name(pictures[-1])}")
    print(f"checkpoints  {home.path / 'checkpoints'}", flush=True)
    page = run_page.write(directory, name=str(home.path))
    print(f"report       {home.name(page)}", flush=True)


def best(measured: Mapping[str, float]) -> str:
    """Says what the best state of a run reached, and the last, on how many images."""
    (name, value), = (
        (name.removeprefix("best/"), value) for name, value in measured.items()
        if name.startswith("best/eval/")
    )
    line = f"best {name} {value:.4f} at step {measured['best/step']:.0f}"
    if name in measured:
        line += f", at the end {measured[name]:.4f}"
    if (images := measured.get("eval/accuracy/images")) is not None:
        line += f" ({tables.counted(int(images), int(images))} images)"
    return line
