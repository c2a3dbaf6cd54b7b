"""What the files of a run say, read together: `Run`.

Of a run that goes on, was interrupted or is old, some files are not there yet.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from crossmae_jax import paths
from crossmae_jax.checkpoints import steps
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import metrics, records, results, walltime, workdir

Series = metrics.Curves


class Run(NamedTuple):
    """What the files of a run say; what is missing is empty.

    Attributes:
      name: of the workdir, as the user writes it.
      config: by whole names, `optim.base_lr`.
      series: by metric, its values by step.
      numbers: `results.json` of a finished run, else the newest values of `series`.
      time: `time.json`; likewise `environment`, `dataset`, `best`.
      saved: the steps of checkpoints.
      reached, total: steps made, and steps of the whole run, None if not known.
      panel: the newest reconstruction.
    """

    name: str
    config: dict[str, Any]
    series: Series
    numbers: dict[str, int | float]
    time: dict[str, Any]
    environment: dict[str, Any]
    dataset: dict[str, Any]
    best: dict[str, Any]
    saved: list[int]
    reached: int
    total: int | None
    panel: AnyPath | None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        reached = self.total is not None and self.reached >= self.total
        return reached and self.time.get("finished", True)


def read(directory: str | AnyPath, *, name: str | None = None) -> Run:
    """Reads the files of a workdir.

    Args:
      directory: on a disk or in a bucket.
      name: of the workdir where `directory` holds copies of its small files; there lie
        the checkpoints.

    Raises:
      FileNotFoundError: if the directory is not that of a run.
      ValueError: if a line of `metrics.jsonl` is damaged.
    """
    directory = paths.path(directory)
    name = str(directory) if name is None else name
    config = workdir.read_config(directory)
    series = _series(directory / metrics.FILE)
    dataset = _json(directory / "dataset.json")
    time = _json(directory / walltime.FILE)
    saved = steps.committed(paths.path(name) / "checkpoints")
    newest = {metric: values[max(values)] for metric, values in series.items()}
    if time.get("finished"):
        newest |= results.read(directory)
    panels = directory / "panels"
    drawn = [path for path in panels.iterdir()] if panels.is_dir() else []
    return Run(
        name=name, config=workdir.flatten(config.to_dict()), series=series,
        numbers=newest, time=time,
        environment=_json(directory / "environment.json"), dataset=dataset,
        best=_json(directory / "best" / "best.json"), saved=saved,
        reached=max([0, *saved, *(max(values) for values in series.values())]),
        total=_total(config, dataset),
        panel=max(drawn, key=lambda path: path.name, default=None),
    )


def _json(path: AnyPath) -> dict[str, Any]:
    return records.recalled(path, then="it is left out") or {}


def _series(path: AnyPath) -> Series:
    """Returns the values of each metric that are finite."""
    curves = metrics.curves(path) if path.exists() else {}
    return {
        name: {step: value for step, value in values.items() if math.isfinite(value)}
        for name, values in curves.items()
        if any(map(math.isfinite, values.values()))
    }


def _total(config: ConfigDict, dataset: Mapping[str, Any]) -> int | None:
    if "num_images" not in dataset:
        return None
    return int(config.epochs * dataset["num_images"] // config.data.batch_size)
