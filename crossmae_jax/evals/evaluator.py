"""Evaluations during and after training, on functions that the caller hands over.

An evaluator knows neither models nor the train loop. It is given an `Evaluation`, what
there is to evaluate, and its own options from `config.evals`; it returns flat metrics
and the files that it wrote. Adding one is a function and a row in `EVALUATORS`.
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from crossmae_jax import visualize
from crossmae_jax.evals import (
    accuracy,
    features,
    knn,
    linear,
    reconstruction,
    representation,
)

Batch = features.Batch


# What images are compared by in k-NN -> which output of `predict` that is.
_POOLS = {"mean": "features", "cls": "class_token"}


class Wanted(NamedTuple):
    """An output of `predict` that an evaluator takes from a split, or part of it."""

    split: str
    num_images: int | None
    output: str


class Result(NamedTuple):
    """What an evaluator returns: flat metrics, and the files that it wrote."""

    metrics: dict[str, float]
    files: tuple[pathlib.Path, ...] = ()


@dataclasses.dataclass
class Evaluation:
    """One state of one model, with the data to evaluate it on.

    Make a new one for every step: it remembers the features that it has extracted, so
    that evaluators share them. What lies in `wanted` is extracted in the same pass.

    Attributes:
      batches: (split, num_images) -> host batches as of `pipeline.eval_batches`; split
        is "train" or "eval", and num_images=None means all.
      num_images: how many images each split holds; a split that is missing here does
        not exist.
      place: puts a host batch on the devices.
      predict: jitted; placed batch -> {"features": f32[b d]}, of an encoder
        "class_token" f32[b d], too, and of a classifier "logits" f32[b classes].
      reconstruct: jitted; placed batch -> pictures, masks and errors. The masks should
        be the same at every call.
      panel: where the reconstruction panel is written.
      caption: the line under the panel.
      wanted: what the evaluators will ask for, see `wanted`; of splits that do not
        exist nothing is extracted.
      num_replaced: by split, how many images could not be decoded and were replaced by
        their neighbours; filled by whoever made `batches`.
    """

    batches: Callable[[str, int | None], Iterable[Batch]]
    num_images: Mapping[str, int]
    place: Callable[[Batch], Batch]
    predict: features.Predict
    reconstruct: Callable[[Batch], visualize.Reconstruction] | None = None
    panel: pathlib.Path | None = None
    caption: str = ""
    wanted: Sequence[Wanted] = ()
    num_replaced: dict[str, int] = dataclasses.field(default_factory=dict, init=False)
    _extracted: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def features_of(
        self, split: str, num_images: int | None = None, *, output: str = "features"
    ) -> features.Features:
        """Returns the features of a split, or of so many of its images.

        They are extracted the first time they are asked for, and with them whatever
        else is wanted of the same images.

        Args:
          output: which of the outputs of `predict`.
        """
        asked = self._exactly(Wanted(split, num_images, output))
        if asked not in self._extracted:
            there = [each for each in self.wanted if each.split in self.num_images]
            together = dict.fromkeys([asked, *map(self._exactly, there)])
            outputs = [each.output for each in together if each[:2] == asked[:2]]
            every = asked.num_images == self.num_images[split]
            found = features.extract(
                self.predict,
                self.batches(split, None if every else asked.num_images),
                self.place, num_images=asked.num_images, outputs=outputs,
            )
            for name, extracted in found.items():
                self._extracted[asked._replace(output=name)] = extracted
        return self._extracted[asked]

    def _exactly(self, wanted: Wanted) -> Wanted:
        """Returns it with the number of images that there are."""
        available, number = self.num_images[wanted.split], wanted.num_images
        return wanted._replace(
            num_images=available if number is None else min(number, available)
        )


def _classifier(evaluate: Callable[..., dict[str, float]]) -> Callable[..., Result]:
    """Turns a function of train and test features into an evaluator.

    Its options are those of the function, and `max_train_images`.
    """

    def evaluator(
        evaluation: Evaluation, *, max_train_images: int | None = None, **options: Any
    ) -> Result:
        train = evaluation.features_of("train", max_train_images)
        return Result(evaluate(train, evaluation.features_of("eval"), **options))

    first, *_ = inspect.signature(evaluator).parameters.values()
    evaluator.__signature__ = inspect.Signature(
        [first, *_options(evaluator).values(), *_options(evaluate).values()]
    )
    return evaluator


def _knn(
    evaluation: Evaluation,
    *,
    k: int | Sequence[int],
    temperature: float,
    pools: Sequence[str] = ("mean",),
    max_train_images: int | None = None,
) -> Result:
    """Several k or pools are told one by one, "mean/k20/top1"; the first also plain."""
    ks, metrics = knn.numbers(k), {}
    for pool in pools:
        train, test = (
            evaluation.features_of(split, limit, output=_POOLS[pool])
            for split, limit in (("train", max_train_images), ("eval", None))
        )
        found = knn.evaluate(train, test, k=ks, temperature=temperature)
        metrics |= {f"{pool}/{name}": value for name, value in found.items()}
    first = f"{pools[0]}/k{ks[0]}/"
    plain = {
        name.removeprefix(first): value for name, value in metrics.items()
        if name.startswith(first)
    }
    return Result(plain if len(ks) == len(pools) == 1 else plain | metrics)


def _options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the options of a function: what it takes by name only."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _reconstruction(evaluation: Evaluation, *, num_images: int) -> Result:
    split = _held_out(evaluation.num_images)
    metrics = reconstruction.evaluate(
        evaluation.reconstruct, evaluation.batches(split, num_images),
        evaluation.place, evaluation.panel, caption=evaluation.caption,
    )
    return Result(metrics, (evaluation.panel,))


def _rank(evaluation: Evaluation, *, max_images: int | None = None) -> Result:
    """Of the mean of the patch tokens, on images to evaluate on where there are any."""
    found = evaluation.features_of(_held_out(evaluation.num_images), max_images)
    return Result({"effective": representation.effective_rank(found.values)})


def _held_out(splits: Iterable[str]) -> str:
    return "eval" if "eval" in splits else "train"


def _accuracy(evaluation: Evaluation) -> Result:
    found = evaluation.features_of("eval", output="logits")
    return Result(accuracy.evaluate(found.values, found.labels))


EVALUATORS = {
    "accuracy": _accuracy,
    "knn": _knn,
    "linear": _classifier(linear.evaluate),
    "rank": _rank,
    "reconstruction": _reconstruction,
}
_NEED_LABELS = ("accuracy", "knn", "linear")


def run(name: str, evaluation: Evaluation, options: Mapping[str, Any]) -> Result:
    """Runs one evaluator with its options from `config.evals`.

    `every_epochs`, which says when, is for the train loop and is left out.
    """
    options = {key: value for key, value in options.items() if key != "every_epochs"}
    return EVALUATORS[name](evaluation, **options)


def wanted(evals: Mapping[str, Mapping[str, Any]]) -> tuple[Wanted, ...]:
    """Returns what these evaluators with these options will ask an `Evaluation` for."""
    found = []
    for name, options in evals.items():
        if name == "accuracy":
            found.append(Wanted("eval", None, "logits"))
        if name == "rank":
            found.append(Wanted("eval", options.get("max_images"), "features"))
        if name in ("knn", "linear"):
            for pool in options.get("pools", ("mean",)):
                limit = options.get("max_train_images")
                found.append(Wanted("train", limit, _POOLS[pool]))
                found.append(Wanted("eval", None, _POOLS[pool]))
    return tuple(found)


def check(
    evals: Mapping[str, Mapping[str, Any]],
    *,
    num_images: Mapping[str, int],
    num_classes: int,
) -> None:
    """Finds out before the training what could not be evaluated after it.

    Args:
      evals: `config.evals`, the options of each evaluator by its name.
      num_images: how many images each split holds, "train" and, if it exists, "eval".
      num_classes: of the data set; 0 if it has no labels.

    Raises:
      ValueError: for an evaluator or an option that does not exist, an option that is
        missing, more neighbours than images, an unknown pool, or a lack of labels or
        of a split.
    """
    for name, options in evals.items():
        if name not in EVALUATORS:
            raise ValueError(
                f"Unknown evaluator {name!r} in config.evals. "
                f"Known: {', '.join(sorted(EVALUATORS))}."
            )
        _check_options(name, options)
        if name == "rank":
            _check_rank(num_images[_held_out(num_images)], options)
        if name not in _NEED_LABELS:
            continue
        if num_classes == 0:
            raise ValueError(
                f"config.evals.{name} needs labels, but the data set has none. Sort "
                "the images into one folder per class, use a labelled data set, or "
                f"take {name} out of config.evals."
            )
        if "eval" not in num_images:
            raise ValueError(
                f"config.evals.{name} needs images to test on, but the data has no "
                "evaluation split. Set data.eval_split (tfds) or data.eval_dir "
                f"(folder), or take {name} out of config.evals."
            )
        if name == "knn":
            _check_neighbours(num_images["train"], options)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    known = _options(EVALUATORS[name])
    for option in options:
        if option not in known and option != "every_epochs":
            raise ValueError(
                f"Unknown option {option!r} in config.evals.{name}. Known: "
                f"{', '.join(sorted([*known, 'every_epochs']))}; correct it or take it "
                "out."
            )
    for option, parameter in known.items():
        if option not in options and parameter.default is parameter.empty:
            raise ValueError(
                f"config.evals.{name} lacks the option {option!r}, which has no "
                "default; add it to the configuration."
            )


def _check_rank(available: int, options: Mapping[str, Any]) -> None:
    limit = options.get("max_images")
    images = available if limit is None else min(limit, available)
    if images < 2:
        raise ValueError(
            f"config.evals.rank of {images} images, with max_images={limit} of "
            f"{available}; it says how images differ and needs 2 or more."
        )


def _check_neighbours(num_train: int, options: Mapping[str, Any]) -> None:
    limit, pools = options.get("max_train_images"), options.get("pools", ("mean",))
    bank = num_train if limit is None else min(limit, num_train)
    for k in knn.numbers(options["k"]):
        if not 1 <= k <= bank:
            more = f", or raise max_train_images={limit}" if bank < num_train else ""
            raise ValueError(
                f"config.evals.knn.k={k} neighbours of {bank} training images; choose "
                f"1 <= k <= {bank}{more}."
            )
    if not pools or len(set(pools)) < len(pools) or not set(pools) <= set(_POOLS):
        raise ValueError(
            f"config.evals.knn.pools={pools!r}; give one or several different ones of "
            f"{', '.join(_POOLS)}."
        )
