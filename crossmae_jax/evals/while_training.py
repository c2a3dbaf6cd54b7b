"""Evaluation inside a run: when, on which data, and compared with what.

The evaluators themselves know no model and no run (`evaluator`); the train loop knows
no evaluator. Two baselines put the final numbers in proportion: the same network at
random initialisation, and the raw pixels, evaluated in the same way on the same split.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax import visualize
from crossmae_jax.data import pipeline, sources
from crossmae_jax.distributed import parallel, preemption
from crossmae_jax.evals import evaluator, features
from crossmae_jax.runs import results

# Evaluators of what only one objective can do.
_OF_OBJECTIVE = {"accuracy": "classify", "reconstruction": "pretrain"}


class Evaluations:
    """The evaluations that `config.evals` asks for.

    Attributes:
      files: pictures written so far, the newest last.

    Raises:
      ValueError: if the data cannot be evaluated so.
    """

    def __init__(
        self,
        config: ConfigDict,
        objective: Any,
        opened: dict[str, sources.Source],
        *,
        mesh: jax.sharding.Mesh,
        directory: Path,
        panel_key: jax.Array,
    ):
        for name, options in config.evals.items():
            if "every_epochs" not in options:
                raise ValueError(
                    f"config.evals.{name} lacks every_epochs: how often it runs, in "
                    "epochs; 0.0 for the end of training only."
                )
        for name, kind in _OF_OBJECTIVE.items():
            if name in config.evals and config.get("objective", kind) != kind:
                raise ValueError(
                    f"config.evals.{name} is for objective={kind!r}, not "
                    f"{config.objective!r}; take it out of config.evals."
                )
        self._config, self._sources, self._mesh = config, opened, mesh
        self._directory, self._panel_key = directory, panel_key
        evaluator.check(
            config.evals.to_dict(), num_classes=opened["train"].num_classes,
            num_images={split: len(source) for split, source in opened.items()},
        )
        check_pools(config.evals.to_dict(), config.model)
        self._predict = jax.jit(parallel.within(mesh, objective.predict))
        if "reconstruction" in config.evals:
            self._reconstruct = jax.jit(parallel.within(mesh, objective.reconstruct))
        self.files: list[Path] = []

    def due(self, step: int, steps_per_epoch: float) -> list[str]:
        """Returns which evaluators run after this step, the last one apart."""
        return [
            name for name, options in self._config.evals.items()
            if options.every_epochs
            and step % max(1, round(options.every_epochs * steps_per_epoch)) == 0
        ]

    def trace(self, variables: Any) -> None:
        """Traces what the evaluators will compute, without computing it."""
        data = self._config.data

        def batch(num_images: int | None = None) -> Any:
            blank = pipeline.blank_batch(
                data, batch_size=_batch_size(data, self._mesh, num_images), valid=True
            )
            return parallel.with_sharding(blank, parallel.batch_sharding(self._mesh))

        evals = self._config.evals
        if any(name != "reconstruction" for name in evals):
            jax.eval_shape(self._predict, variables, batch())
        if "reconstruction" in evals:
            size = evals.reconstruction.num_images
            jax.eval_shape(self._reconstruct, variables, batch(size), self._panel_key)

    def run(
        self,
        names: list[str],
        variables: Any,
        step: int,
        *,
        stop: preemption.Stop,
    ) -> dict[str, float]:
        """Runs evaluators on one state; returns their metrics, `eval/NAME/METRIC`.

        Raises:
          interruption.Interrupted: if `stop` is set meanwhile.
        """
        pictures = {}
        if "reconstruction" in names:
            pictures = dict(
                reconstruct=lambda batch: self._reconstruct(
                    variables, batch, self._panel_key
                ),
                panel=self._directory / "panels" / f"step_{step:08d}.png",
                caption=visualize.caption(normalize=self._config.target.normalize),
            )
        evals = {name: self._config.evals[name].to_dict() for name in names}
        evaluation = self._evaluation(
            evals, lambda batch: self._predict(variables, batch), stop, **pictures
        )
        found = {}
        for name, options in evals.items():
            result = evaluator.run(name, evaluation, options)
            self.files.extend(result.files)
            found |= {f"eval/{name}/{key}": v for key, v in result.metrics.items()}
        return found

    def baselines(
        self, initial_variables: Any, *, stop: preemption.Stop
    ) -> dict[str, float]:
        """Evaluates random initialisation and raw pixels like the trained features."""
        data = self._config.data
        predicts = {
            "random_init": lambda batch: self._predict(initial_variables, batch),
            "pixels": features.raw_pixels(mean=tuple(data.mean), std=tuple(data.std)),
        }
        evals = self._config.evals.to_dict()
        evals = {name: evals[name] for name in results.COMPARED if name in evals}
        found = {}
        for baseline, predict in predicts.items():
            if baseline == "pixels":  # one vector, no class token
                evals.get("knn", {}).pop("pools", None)
            evaluation = self._evaluation(evals, predict, stop)
            for name, options in evals.items():
                result = evaluator.run(name, evaluation, options)
                found |= {
                    f"{baseline}/{name}/{key}": value
                    for key, value in result.metrics.items()
                }
        return found

    def _evaluation(
        self, evals, predict, stop, **pictures: Any
    ) -> evaluator.Evaluation:
        return of_sources(
            self._sources, self._config.data, predict, mesh=self._mesh,
            workdir=self._directory, evals=evals, stop=stop, **pictures,
        )


def check_pools(evals: Mapping[str, Mapping[str, Any]], model: ConfigDict) -> None:
    """Raises ValueError for k-NN of a pooling that the model does not have."""
    pools = evals.get("knn", {}).get("pools", ("mean",))
    if "knn" in evals and model.get("pool") == "cls" and "mean" in pools:
        raise ValueError(
            f"k-NN with pools={pools} of a classifier with model.pool='cls': what it "
            "pools is the class token alone; set evals.knn.pools=('cls',)."
        )


def of_sources(
    opened: dict[str, sources.Source],
    data: ConfigDict,
    predict: features.Predict,
    *,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    evals: Mapping[str, Mapping[str, Any]],
    stop: preemption.Stop | None = None,
    **pictures: Any,
) -> evaluator.Evaluation:
    """Returns the evaluation of a model on splits, "train" and "eval".

    Args:
      data: `config.data`, which says how images are prepared.
      predict: as in `evaluator.Evaluation`; likewise `pictures`.
      workdir: where images that cannot be decoded are listed.
      evals: the evaluators that will run, with their options.
      stop: ends the evaluation with `preemption.Interrupted` once it is set.
    """
    def batches(split: str, num_images: int | None) -> Iterator[evaluator.Batch]:
        with pipeline.eval_batches(
            opened[split], data, batch_size=_batch_size(data, mesh, num_images),
            num_images=num_images, process_index=jax.process_index(),
            process_count=jax.process_count(), workdir=str(workdir),
        ) as made:
            for batch in made:
                if stop is not None and stop.is_set():
                    raise preemption.Interrupted
                yield batch
            found.num_replaced[split] = made.num_bad

    found = evaluator.Evaluation(
        batches=batches, predict=predict,
        num_images={split: len(source) for split, source in opened.items()},
        place=lambda batch: parallel.place_batch(mesh, batch),
        wanted=evaluator.wanted(evals), **pictures,
    )
    return found


def _batch_size(
    data: ConfigDict, mesh: jax.sharding.Mesh, num_images: int | None
) -> int:
    """Returns the size of batches for so many images, None for all."""
    if num_images is None:
        return data.batch_size
    per_device = -(-num_images // mesh.size)  # no more padding than needed
    return min(data.batch_size, per_device * mesh.size)
