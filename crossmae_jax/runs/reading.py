"""What the files of a run say, read together: `Run`.

Of a run that goes on, was interrupted or is old, some files are not there yet.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from crossmae_jax import paths
from crossmae_jax.checkpoints import steps
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import (
    best,
    confusions,
    metrics,
    records,
    results,
    walltime,
    workdir,
)

Series = metrics.Curves
_YEAR_9999 = 253_370_000_000  # in seconds; no date comes after it


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
      confusions: the classes most often taken for others, as of the last evaluation.
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
    confusions: list[confusions.Frequent]

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
    dataset = _json(directory / "dataset.json", _is_dataset)
    time = _json(directory / walltime.FILE, _are_sums)
    saved = steps.committed(paths.path(name) / "checkpoints")
    newest = {metric: values[max(values)] for metric, values in series.items()}
    if time.get("finished"):
        newest |= results.read(directory)
    panels = directory / "panels"
    drawn = [path for path in panels.iterdir()] if panels.is_dir() else []
    return Run(
        name=name, config=workdir.flatten(config.to_dict()), series=series,
        numbers=newest, time=time,
        environment=_json(directory / "environment.json", _is_environment),
        dataset=dataset, best=_json(directory / "best" / best.FILE, best.is_measured),
        saved=saved,
        reached=max([0, *saved, *(max(values) for values in series.values())]),
        total=_total(config, dataset),
        panel=max(drawn, key=lambda path: path.name, default=None),
        confusions=confusions.recalled(confusions.newest(directory)),
    )


def _json(
    path: AnyPath, usable: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    return records.recalled(path, then="it is left out", usable=usable) or {}


def _is_dataset(values: dict[str, Any]) -> bool:
    number = values.get("num_images", 0)
    return type(number) is int and 0 <= number < 2**63


def _are_sums(values: dict[str, Any]) -> bool:
    """Says whether these are sums whose last moment is one of a calendar."""
    return walltime.are_sums(values) and 0 <= values["until"] < _YEAR_9999


def _is_environment(values: dict[str, Any]) -> bool:
    def words(name: str) -> bool:
        listed = values.get(name) or []
        return isinstance(listed, list) and all(isinstance(x, str) for x in listed)

    versions = isinstance(values.get("versions", {}), dict)
    return versions and words("devices") and words("command")


def _series(path: AnyPath) -> Series:
    """Returns the values of each metric that are finite."""
    curves = metrics.curves(path) if path.exists() else {}
    return {
        name: {step: value for step, value in values.items() if math.isfinite(value)}
        for name, values in curves.items()
        if any(map(math.isfinite, values.values()))
    }


def _total(config: ConfigDict, dataset: Mapping[str, Any]) -> int | None:
    usable = records.is_number(config.epochs) and config.data.batch_size > 0
    if "num_images" not in dataset or not usable:
        return None
    total = config.epochs * dataset["num_images"] // config.data.batch_size
    return int(total) if math.isfinite(total) else None
