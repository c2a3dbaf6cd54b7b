"""Evaluation inside a run: when, on which data, and compared with what.

The evaluators themselves know no model and no run (`evaluator`); the train loop knows
no evaluator. Two baselines put the final numbers in proportion: the same network at
random initialisation, and the raw pixels, evaluated in the same way on the same split.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax import evals, ranges
from crossmae_jax.data import pipeline, sources, spot_check
from crossmae_jax.data.batches import StoppedWaiting
from crossmae_jax.distributed import parallel, preemption
from crossmae_jax.evals import evaluator, features, outputs
from crossmae_jax.runs import results


class Evaluations:
    """The evaluations that `config.evals` asks for.

    Attributes:
      pictures: drawn so far, the newest last.

    Args:
      key: of whatever the outputs draw, such as the masks of panels.

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
        key: jax.Array,
    ):
        for name, options in config.evals.items():
            if "every_epochs" not in options:
                raise ValueError(
                    f"config.evals.{name} lacks every_epochs: how often it runs, in "
                    "epochs; 0.0 for the end of training only."
                )
            ranges.check(f"evals.{name}.every_epochs", options.every_epochs, least=0)
        self._config, self._sources, self._mesh = config, opened, mesh
        self._directory = directory
        self._evaluators = evals.make(config.evals.to_dict())
        evaluator.check(self._evaluators, about(config, objective, opened))
        self._outputs = outputs.Compiled(objective, mesh, key=key)
        self.pictures: list[Path] = []
        self._said: set[str] = set()

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

        for _, size, output in evaluator.wanted(self._evaluators.values()):
            size = None if output in self._outputs.rows else size
            self._outputs.trace(output, variables, batch(size))

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
          preemption.Interrupted: if `stop` is set meanwhile.
        """
        evaluators = {name: self._evaluators[name] for name in names}
        evaluation = self._evaluation(
            evaluators, stop, name=f"step_{step:08d}", **self._outputs.of(variables)
        )
        measured = {}
        for name, each in evaluators.items():
            result = each.run(evaluation)
            self.pictures.extend(result.pictures)
            measured |= {f"eval/{name}/{key}": v for key, v in result.metrics.items()}
        for line in left_out(evaluation):
            if line not in self._said:  # once: the images are always the same
                self._said.add(line)
                parallel.say(line)
        return measured

    def baselines(
        self, initial_variables: Any, *, stop: preemption.Stop
    ) -> dict[str, float]:
        """Evaluates random initialisation and raw pixels like the trained features."""
        data = self._config.data
        pixels = features.raw_pixels(mean=tuple(data.mean), std=tuple(data.std))
        models = {
            "random_init": self._outputs.of(initial_variables),
            "pixels": dict(predict=pixels),
        }
        options = self._config.evals.to_dict()
        options = {name: options[name] for name in results.COMPARED if name in options}
        measured = {}
        for baseline, model in models.items():
            if baseline == "pixels":  # one vector: nothing that could be pooled
                for given in options.values():
                    given.pop("pools", None)
            evaluators = evals.make(options)
            evaluation = self._evaluation(evaluators, stop, name=baseline, **model)
            for name, each in evaluators.items():
                measured |= {
                    f"{baseline}/{name}/{key}": value
                    for key, value in each.run(evaluation).metrics.items()
                }
        return measured

    def _evaluation(self, evaluators, stop, **given: Any) -> evaluator.Evaluation:
        return of_sources(
            self._sources, self._config.data, mesh=self._mesh, workdir=self._directory,
            wanted=evaluator.wanted(evaluators.values()), stop=stop, **given,
        )


def left_out(evaluation: evaluator.Evaluation) -> list[str]:
    """Says of each split how many images were left out, for want of a label."""
    return [
        f"{number} of {evaluation.num_images[split]} images of {split} have no label "
        "and are left out where labels are needed"
        for split, number in evaluation.num_unlabelled.items() if number
    ]


def about(
    config: ConfigDict, objective: Any, opened: Mapping[str, sources.Source]
) -> evaluator.About:
    """Returns what evaluators are checked against; looks at a few images.

    Args:
      opened: the splits that there are, "train", "eval" or both.

    Raises:
      SetupError: if there is a split whose images cannot be decoded.
    """
    seen = [
        spot_check.unlabelled(
            source, config.data,  # what is learnt from needs a label for each image
            all_needed=split == "train" and bool(config.data.get("num_classes")),
        )
        for split, source in opened.items()
    ]
    return evaluator.About(
        num_images={split: len(source) for split, source in opened.items()},
        # A split without labels is enough to fail.
        num_classes=min((len(source.classes) for source in opened.values()), default=0),
        outputs=frozenset(objective.outputs),
        pool=config.model.get("pool", "mean"),
        unlabelled=next(filter(None, seen), None),
        without_labels=next((
            repr(source) for source in opened.values() if not source.classes
        ), ""),
    )


def of_sources(
    opened: dict[str, sources.Source],
    data: ConfigDict,
    *,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    wanted: Sequence[evaluator.Wanted],
    stop: preemption.Stop | None = None,
    **given: Any,
) -> evaluator.Evaluation:
    """Returns the evaluation of a model on splits, "train" and "eval".

    Args:
      data: `config.data`, which says how images are prepared.
      workdir: where images that cannot be decoded are listed, and files written.
      wanted: what the evaluators will ask for.
      stop: ends the evaluation with `preemption.Interrupted` once it is set.
      given: of the model, as `evaluator.Evaluation` has it: `predict` at least.
    """
    def look() -> None:
        if stop is not None and stop.is_set():
            raise preemption.Interrupted

    def batches(split: str, num_images: int | None) -> Iterator[evaluator.Batch]:
        with pipeline.eval_batches(
            opened[split], data, batch_size=_batch_size(data, mesh, num_images),
            num_images=num_images, process_index=jax.process_index(),
            process_count=jax.process_count(), workdir=str(workdir),
            stop=stop and stop.asked_here,
        ) as made:
            try:
                for batch in made:
                    look()
                    yield batch
            except StoppedWaiting:
                raise preemption.Interrupted from None
            evaluation.num_replaced[split] = made.num_bad

    evaluation = evaluator.Evaluation(
        batches=batches, directory=workdir,
        num_images={split: len(source) for split, source in opened.items()},
        place=lambda batch: parallel.place_batch(mesh, batch),
        wanted=wanted, alive=look, **given,
        classes=next((source.classes for source in opened.values()), ()),
    )
    return evaluation


def _batch_size(
    data: ConfigDict, mesh: jax.sharding.Mesh, num_images: int | None
) -> int:
    """Returns the size of batches for so many images, None for all."""
    if num_images is None:
        return data.batch_size
    per_device = -(-num_images // mesh.size)  # no more padding than needed
    return min(data.batch_size, per_device * mesh.size)
