"""Finds out whether a run that is killed ends as if it had not been: `verify`.

Two runs of the same few steps, in processes of their own: one is left alone, the other
gets SIGKILL after a step that is drawn, is started again, and goes on to the end. Then
every array of the last checkpoints, of weights and of the optimiser, and every metric
that is no time are compared, bit for bit.

    DIR/shortened.py, .json     the configuration: what is given, of few steps
    DIR/undisturbed, killed     the workdirs
    DIR/*.log                   what the runs printed

This process leaves all devices to those that it starts.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from crossmae_jax import errors, paths, ranges, tables
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.checkpoints import steps as steps_there
from crossmae_jax.data import sources
from crossmae_jax.distributed import cluster
from crossmae_jax.evals import attention_maps
from crossmae_jax.runs import metrics

# Metrics that tell of the machine and the day, and so differ.
TIMES = frozenset({
    "train/images_per_second", "train/step_seconds", "train/data_wait",
    "train/data_wait_median", "train/slowest_host", "train/goodput",
    attention_maps.SECONDS,
})
_CONFIG = '''"""{title}"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from crossmae_jax.runs import settings


def get_config():
    """Returns the experiment."""
    text = Path(__file__).with_suffix(".json").read_text()
    return ConfigDict(settings.as_written(json.loads(text)))
'''


class Failed(errors.UserError, RuntimeError):
    """A run that is to be compared did not come to its end."""


class Difference(NamedTuple):
    """Something that is not the same in both runs.

    Attributes:
      amount: the largest difference of any value; infinite where there is none to take,
        such as of a shape.
    """

    name: str
    amount: float


class Verdict(NamedTuple):
    """What came of a comparison.

    Attributes:
      drawn: the step to kill after.
      kill_step: the last that the killed run had logged; `resumed_step`, from which it
        went on.
      counts: how many arrays and values of metrics were compared.
      arrays: those that differ, in their order; likewise `values`, by steps.
    """

    drawn: int
    kill_step: int
    resumed_step: int
    counts: tuple[int, int]
    arrays: list[Difference]
    values: list[Difference]

    @property
    def equal(self) -> bool:
        """Whether everything is the same, bit for bit."""
        return not self.arrays and not self.values

    def __str__(self) -> str:
        parts = zip(
            ("arrays of the last checkpoint", "values in metrics.jsonl"),
            self.counts, (self.arrays, self.values), strict=True,
        )
        rows = tuple(
            (
                name, str(count), str(len(found)),
                f"{max(d.amount for d in found):.3g}" if found else "0",
            )
            for name, count, found in parts
        )
        header = ("what", "compared", "different", "largest difference")
        lines = [
            f"SIGKILL after step {self.kill_step} ({self.drawn} was drawn); went on "
            f"from step {self.resumed_step}", "",
            tables.markdown(tables.Table(header, rows)), "",
        ]
        for found in (self.arrays, self.values):
            lines += [f"{name} differs by {amount:.3g}" for name, amount in found[:5]]
        if self.equal:
            return "\n".join([*lines, "equal, bit for bit"])
        return "\n".join([
            *lines,
            "NOT equal. A GPU computes the same bits twice only with --deterministic. "
            "With it, or on a CPU, this is a bug: please report it with these lines "
            "and the files beside shortened.py.",
        ])


def verify(
    config: ConfigDict,
    directory: Path,
    *,
    steps: int,
    seed: int,
    flags: Sequence[str] = (),
    title: str = "an experiment",
    environment: Mapping[str, str] = os.environ,
) -> Verdict:
    """Trains a few steps twice, once with a SIGKILL on the way, and compares.

    Args:
      directory: must not exist yet, or be empty.
      seed: draws the step to kill after.
      flags: of training, such as --deterministic.
      environment: the variables of the runs.

    Raises:
      SetupError: if the configuration cannot be trained, the directory holds something,
        or there are several hosts.
      Failed: if a run ends in an error, or before it can be killed.
    """
    with errors.setting_up():
        _check_alone(environment)
        ranges.check("steps", steps, least=3)
        if directory.exists() and any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty; give a new --workdir.")
        every = max(1, steps // 5)
        short = shortened(config, steps=steps, save_every=every)
        directory.mkdir(parents=True, exist_ok=True)
        write_config(
            directory / "shortened.py", short,
            title=f"{title}, of {steps} steps. Written by verify-resume.",
        )
    drawn = random.Random(seed).randrange(every + 1, steps)
    runs = _Runs(directory, flags, environment)
    runs.finish("undisturbed")
    kill_step = runs.kill("killed", after=drawn)
    resumed_step = runs.finish("killed")
    if resumed_step == steps:
        raise Failed(
            f"The run was to be killed after step {drawn}, but had made and saved all "
            f"{steps} before the signal came; give more --steps."
        )
    compared = compare(directory / "undisturbed", directory / "killed", steps)
    return Verdict(drawn, kill_step, resumed_step, *compared)


def shortened(config: ConfigDict, *, steps: int, save_every: int) -> ConfigDict:
    """Returns a configuration of so many steps that logs each and evaluates nothing.

    Model, data, batches, masks and losses stay; the rate goes through all of its
    schedule, a quarter of it warm-up.
    """
    config = config.copy_and_resolve_references().unlock()
    source = sources.make_source(config.data, "train")
    ranges.check("data.batch_size", config.data.batch_size, least=1)
    epoch = len(source) / config.data.batch_size
    config.epochs = (steps + 0.5) / epoch  # rounded down to steps, whatever the rest
    config.optim.warmup_epochs = min(config.optim.warmup_epochs, config.epochs / 4)
    config.log_every_steps = 1
    config.checkpoint.update(
        every_epochs=save_every / epoch, keep_every_epochs=0.0, best=""
    )
    if config.get("attention_maps", {}).get("every_epochs"):  # made twice, at thirds
        config.attention_maps.every_epochs = config.epochs / 3
    config.evals, config.baselines = ConfigDict(), False
    return config


def write_config(file: Path, config: ConfigDict, *, title: str) -> None:
    """Writes a configuration as a file for --config, and FILE.json that it reads.

    Args:
      file: its name ends in .py.
      title: a sentence, the docstring of the file.
    """
    text = json.dumps(json.loads(config.to_json()), indent=2)
    paths.write_whole(file.with_suffix(".json"), text + "\n")
    paths.write_whole(file, _CONFIG.format(title=title))


def _check_alone(environment: Mapping[str, str]) -> None:
    found = cluster.find(environment, gpus=0, accelerator=None)
    if found is not None:
        raise ValueError(
            f"This is one of {found['num_processes']} processes, and verify-resume "
            "starts and kills those of one host. Start it on one host of the cluster, "
            "alone and without the variables that name the others; all devices of the "
            "host are used."
        )


class _Runs:
    """The processes that train, with their logs."""

    def __init__(
        self, directory: Path, flags: Sequence[str], environment: Mapping[str, str]
    ):
        self._directory, self._flags = directory, flags
        self._environment = dict(environment)

    def finish(self, name: str) -> int:
        """Trains to the end; returns the step that the run went on from."""
        process, begin = self._start(name)
        try:
            status = process.wait()
        finally:
            _end(process)
        said = self._said(name, begin)
        if status:
            raise Failed(
                f"The run {name} ended with status {status}; all that it printed is in "
                f"{self._log(name)}, at last:\n{_last(said)}"
            )
        resumed = re.search(r"^RESUMED at step (\d+) ", said, re.MULTILINE)
        return int(resumed[1]) if resumed else 0

    def kill(self, name: str, *, after: int) -> int:
        """Trains until a step is logged and one is saved; then kills the process.

        Returns the last step that was logged. Without a checkpoint there would be
        nothing to go on from.
        """
        process, begin = self._start(name)
        logged = self._directory / name / metrics.FILE
        saved = self._directory / name / "checkpoints"
        try:
            while _last_step(logged) < after or not steps_there.committed(saved):
                if process.poll() is not None:
                    raise Failed(
                        f"The run {name} ended with status {process.returncode} before "
                        f"step {after} was logged, after which it was to be killed:\n"
                        + _last(self._said(name, begin))
                    )
                time.sleep(0.002)
        finally:
            _end(process)
        return _last_step(logged)

    def _start(self, name: str) -> tuple[subprocess.Popen, int]:
        """Starts a run; returns it, and where its lines begin in the log."""
        with open(self._log(name), "ab") as log:
            begin = log.tell()
            command = [
                sys.executable, "-m", "crossmae_jax.main",
                f"--config={self._directory / 'shortened.py'}",
                f"--workdir={self._directory / name}", *self._flags,
            ]
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment
            ), begin

    def _said(self, name: str, begin: int) -> str:
        return self._log(name).read_bytes()[begin:].decode(errors="replace")

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


def _end(process: subprocess.Popen) -> None:
    process.kill()  # SIGKILL, of which the process learns nothing
    process.wait()


def _last(said: str) -> str:
    return "\n".join(said.rstrip().splitlines()[-5:])


def _last_step(path: Path) -> int:
    if not path.exists():
        return 0
    return max((row["step"] for row in metrics.rows(path)), default=0)


def compare(
    one: Path, other: Path, step: int
) -> tuple[tuple[int, int], list[Difference], list[Difference]]:
    """Returns how many arrays and values there are, and those that differ."""
    runs = (one, other)
    arrays = [checkpointer.restore_arrays(run / "checkpoints", step) for run in runs]
    values = [
        {
            f"step {row['step']}, {name}": value
            for row in metrics.rows(run / metrics.FILE) for name, value in row.items()
            if name != "step" and name not in TIMES
        }
        for run in runs
    ]
    counts = len(arrays[0]), len(values[0])
    return counts, differing(*arrays), differing(*values)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[Difference]:
    """Returns the values that are not the same in every bit, in their order."""
    found = []
    for name in one | other:
        a, b = (np.asarray(values.get(name)) for values in (one, other))
        if (a.dtype, a.shape) != (b.dtype, b.shape) or a.dtype == object:
            if a.dtype != object or a.item() != b.item():
                found.append(Difference(name, float("inf")))
        elif a.tobytes() != b.tobytes():
            amount = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
            found.append(Difference(name, float(amount)))
    return found
