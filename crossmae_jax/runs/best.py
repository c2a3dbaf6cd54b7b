"""The best state of a run, kept beside the newest ones.

Fine-tuning reports the best epoch's accuracy (MAE's script keeps the maximum), so the
weights that reached it are kept, too, in a directory `best` that is itself a run: it
can be loaded, exported and started from.

    best/config.json, dataset.json    of the run
    best/checkpoints                  one checkpoint, its value in its notes
    best/best.json                    step, metric and value, for readers

State and value are committed as one, and the value was measured of this very state.
`best.json` is a copy: a kill before it is written costs nothing.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax import paths
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.distributed import parallel
from crossmae_jax.runs import mirror, records, workdir

FILE = "best.json"


class Best:
    """Keeps the state with the largest value of the metric `config.checkpoint.best`.

    Keeps nothing where that is "". All processes of a run call every method.

    Raises:
      ValueError: if no evaluator of the run can measure the metric.
    """

    def __init__(self, home: mirror.Home, config: ConfigDict, dataset: dict[str, Any]):
        self._metric, self._home = config.checkpoint.best, home
        self._directory = home.local / "best"
        self._checkpoints: checkpointer.Checkpoints | None = None
        self._value: float | None = None
        self._step: int | None = None
        if not self._metric:
            return
        prefix, evaluator, _ = (self._metric + "//").split("/", 2)
        if prefix != "eval" or evaluator not in config.evals:
            raise ValueError(
                f"config.checkpoint.best={self._metric!r} is none of this run's "
                f"metrics; config.evals has {', '.join(config.evals) or 'nothing'}. "
                "Write eval/EVALUATOR/METRIC, such as eval/accuracy/top1, or ''."
            )
        self._checkpoints = checkpointer.Checkpoints(
            home.path / "best" / "checkpoints", keep=1, before_save=home.push
        )
        kept = self._checkpoints.steps()
        workdir.claim(
            self._directory, config, resuming=bool(kept), dataset=dataset,
            name=home.path / "best",
        )
        if kept:
            self._recall(kept[-1])

    def _recall(self, step: int) -> None:
        """Takes up what an earlier launch kept."""
        self._step, measured = step, self._checkpoints.notes(step)
        if measured is None:  # of runs from before there were notes
            measured = records.recalled(
                self._directory / FILE, then="it is written anew", usable=is_measured
            )
            if measured is not None and measured["step"] != step:
                measured = None  # of a state that is no longer there
        if measured is None or measured["metric"] != self._metric:
            parallel.say(
                f"{self._home.path / 'best'} holds step {step}, and nothing says what "
                f"{self._metric} it reached; the next one measured takes its place."
            )
            return
        self._value = measured["value"]
        self._tell()

    def offer(self, step: int, measured: Mapping[str, float], state: Any) -> None:
        """Saves the state if its value is larger than all before.

        Args:
          measured: metrics by name, of this state and no other; without ours nothing
            happens.
        """
        value = measured.get(self._metric)
        if value is None or not math.isfinite(value):
            return
        if self._value is not None and value <= self._value:
            return
        notes = {"step": step, "metric": self._metric, "value": value}
        # Not always newer than the one kept: a run may have gone on from further back,
        # and a step that it makes again on other devices is not the same to the bit.
        self._checkpoints.replace(step, state, notes=notes)
        self._value, self._step = value, step
        self._tell()
        self._home.push()

    def _tell(self) -> None:
        if jax.process_index() == 0:
            measured = {
                "step": self._step, "metric": self._metric, "value": self._value
            }
            paths.write_whole(self._directory / FILE, json.dumps(measured) + "\n")

    def metrics(self) -> dict[str, float]:
        """Returns the largest value and its step, for the report.

        Raises:
          ValueError: if the metric never came up.
        """
        if not self._metric:
            return {}
        if self._value is None:
            raise ValueError(
                f"config.checkpoint.best={self._metric!r} did not come up among this "
                "run's metrics; metrics.jsonl has their names."
            )
        return {f"best/{self._metric}": self._value, "best/step": float(self._step)}

    def close(self) -> None:
        """Waits for what is being written."""
        if self._checkpoints is not None:
            self._checkpoints.close()


def is_measured(copy: dict[str, Any]) -> bool:
    """Says whether a copy of the notes has all of them."""
    return isinstance(copy.get("metric"), str) and all(
        records.is_number(copy.get(name)) for name in ("step", "value")
    )
