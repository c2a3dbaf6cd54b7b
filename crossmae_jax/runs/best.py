"""The best state of a run, kept beside the newest ones.

Fine-tuning reports the best epoch's accuracy (MAE's script keeps the maximum), so the
weights that reached it are kept, too, in a directory `best` that is itself a run: it
can be loaded, exported and started from.

    best/config.json, dataset.json    of the run
    best/best.json                    step, metric and value
    best/checkpoints                  one checkpoint
"""

import json
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.runs import mirror, workdir


class Best:
    """Keeps the state with the largest value of the metric `config.checkpoint.best`.

    Keeps nothing where that is "". All processes of a run call every method.
    """

    def __init__(self, home: mirror.Home, config: ConfigDict, dataset: dict[str, Any]):
        self._metric, self._home = config.checkpoint.best, home
        self._directory = directory = home.local / "best"
        self._checkpoints = None
        self._value = self._step = None
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
        if kept:
            noted = json.loads((directory / "best.json").read_text())
            self._value, self._step = noted["value"], noted["step"]
        workdir.claim(
            directory, config, resuming=bool(kept), dataset=dataset,
            name=home.path / "best",
        )

    def offer(self, step: int, found: dict[str, float], state: Any) -> None:
        """Saves the state if its value is larger than all before.

        Args:
          found: metrics by name; without ours nothing happens.
        """
        value = found.get(self._metric)
        if value is None or (self._value is not None and value <= self._value):
            return
        # A run that goes on from before its best step comes to that step again.
        if step not in self._checkpoints.steps():
            self._checkpoints.save(step, state, wait=True)
        self._value, self._step = value, step
        if jax.process_index() == 0:
            noted = {"step": step, "metric": self._metric, "value": value}
            workdir.write_whole(
                self._directory / "best.json", json.dumps(noted) + "\n"
            )
        self._home.push()

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
