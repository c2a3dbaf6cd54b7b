"""What an evaluator is, and what it is given: neither models nor the train loop.

An evaluator is a frozen dataclass in a file of its own. Its fields are its options in
`config.evals.NAME`, with their types and defaults; a field without a default must be
given. It says beforehand what it will take (`wanted`) and whether that is there
(`check`), and measures one state of one model (`run`). The table `EVALUATORS` of the
package has a row for each.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from crossmae_jax import errors, ranges
from crossmae_jax.evals import features

Batch = features.Batch


class Wanted(NamedTuple):
    """Some images, and which of the objective's outputs for them.

    Attributes:
      split: "train" or "eval".
      num_images: so many, evenly spread; None: all of the split.
      output: "features", "class_token", "logits", "reconstruction", ...
    """

    split: str
    num_images: int | None
    output: str


class Result(NamedTuple):
    """What an evaluator returns: flat metrics, and the pictures that it drew."""

    metrics: dict[str, float]
    pictures: tuple[pathlib.Path, ...] = ()


class About(NamedTuple):
    """What is known of data and model before anything is computed.

    Attributes:
      num_images: how many images each split holds, "train" and, if it exists, "eval".
      num_classes: of the data; 0 if a split has no labels.
      unlabelled: of a split with labels, which images have none, if too many.
      without_labels: what is known of a split that has no labels, if there is one.
      outputs: what the objective can give, see `Wanted.output`.
      pool: what "features" are: "mean" of the patch tokens, or "cls", the class token.
    """

    num_images: Mapping[str, int]
    num_classes: int
    outputs: frozenset[str]
    pool: str = "mean"
    unlabelled: str | None = None
    without_labels: str = ""


@dataclasses.dataclass
class Evaluation:
    """One state of one model, with the data to evaluate it on.

    Make a new one for every step: it remembers the features that it has extracted, so
    that evaluators share them. What is in `wanted` is extracted in the same pass.

    Attributes:
      batches: (split, num_images) -> host batches as of `pipeline.eval_batches`; split
        is "train" or "eval", and num_images=None means all.
      num_images: how many images each split holds; a split that is missing here does
        not exist.
      place: puts a host batch on the devices.
      predict: jitted; placed batch -> the outputs `rows`, in one pass.
      rows: the outputs that have a row per image, f32[b d].
      give: jitted; an output's name and a placed batch -> that output. What is drawn
        should be the same at every call.
      captions: of outputs, what a viewer of them must know.
      classes: what labels stand for; of a classifier its logits, too.
      directory: where files are written, see `path`.
      name: of the state, in the names of files, such as "step_00000042"; "" where the
        directory is of one state.
      wanted: what the evaluators will ask for, see `wanted`; of splits that do not
        exist nothing is extracted.
      alive: called between the parts of what takes long beside the batches; raises
        where the evaluation is to stop.
      num_replaced: by split, how many images could not be decoded and were replaced by
        their neighbours; filled by whoever made `batches`.
      num_unlabelled: by split, how many images were left out by `labelled`.
    """

    batches: Callable[[str, int | None], Iterable[Batch]]
    num_images: Mapping[str, int]
    place: Callable[[Batch], Batch]
    predict: features.Predict
    rows: frozenset[str] = frozenset({"features"})
    give: Callable[[str, Batch], Any] | None = None
    captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    classes: Sequence[str] = ()
    directory: pathlib.Path | None = None
    name: str = ""
    wanted: Sequence[Wanted] = ()
    alive: Callable[[], None] = lambda: None
    num_replaced: dict[str, int] = dataclasses.field(default_factory=dict, init=False)
    num_unlabelled: dict[str, int] = dataclasses.field(default_factory=dict, init=False)
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
            together = dict.fromkeys([asked, *(
                self._exactly(request) for request in self.wanted
                if request.split in self.num_images and request.output in self.rows
            )])
            outputs = [
                request.output for request in together if request[:2] == asked[:2]
            ]
            every = asked.num_images == self.num_images[split]
            extracted = features.extract(
                self.predict,
                self.batches(split, None if every else asked.num_images),
                self.place, num_images=asked.num_images, outputs=outputs,
            )
            for name, rows in extracted.items():
                self._extracted[asked._replace(output=name)] = rows
        return self._extracted[asked]

    def labelled(
        self, split: str, num_images: int | None = None, *, output: str = "features"
    ) -> features.Features:
        """Returns what `features_of` does, of the images that have a label.

        The others, which have -1, are left out and counted.

        Raises:
          SetupError: if there is no other.
        """
        found = self.features_of(split, num_images, output=output)
        known = found.labels >= 0
        self.num_unlabelled[split] = int(np.sum(~known))
        if known.all():
            return found
        if not known.any():
            raise errors.SetupError(
                f"None of {len(known)} images of the {split} split has a label; choose "
                "another split, or evaluate what needs no labels."
            )
        return features.Features(found.values[known], found.labels[known])

    def output(self, name: str) -> Callable[[Batch], Any]:
        """Returns what computes an output of the objective: jitted, of a placed batch.

        For those that `features_of` has not, such as pictures. Nothing is remembered.
        """
        return functools.partial(self.give, name)

    def path(self, folder: str, suffix: str) -> pathlib.Path:
        """Returns where an evaluator may write a file about this state."""
        name = f"{folder}/{self.name}" if self.name else folder
        return self.directory / f"{name}{suffix}"

    def _exactly(self, wanted: Wanted) -> Wanted:
        """Returns it with the number of images that there are."""
        available, number = self.num_images[wanted.split], wanted.num_images
        return wanted._replace(
            num_images=available if number is None else min(number, available)
        )


@runtime_checkable
class Evaluator(Protocol):
    """Measures something of a model; a frozen dataclass whose fields are its options.

    It refuses options that can never be used when it is made, with a ValueError.
    """

    def wanted(self) -> tuple[Wanted, ...]:
        """Says what it will ask an `Evaluation` for, so that others can share it."""
        ...

    def check(self, about: About) -> None:
        """Refuses data or a model that it cannot measure.

        That the model has the outputs that are wanted is known already.

        Raises:
          ValueError: says what is missing, and what to change.
        """
        ...

    def run(self, evaluation: Evaluation) -> Result:
        """Measures one state; all processes must call it."""
        ...


def wanted(evaluators: Iterable[Evaluator]) -> tuple[Wanted, ...]:
    """Returns what these evaluators will ask an `Evaluation` for."""
    return tuple(request for evaluator in evaluators for request in evaluator.wanted())


def check(evaluators: Mapping[str, Evaluator], about: About) -> None:
    """Finds out before the training what could not be evaluated after it.

    Args:
      evaluators: by their names in `config.evals`.

    Raises:
      ValueError: for an output that the objective does not have, and whatever an
        evaluator refuses: a lack of labels or of a split, too many neighbours, ...
    """
    for name, evaluator in evaluators.items():
        lacking = {request.output for request in evaluator.wanted()} - about.outputs
        if lacking:
            raise ValueError(
                f"config.evals.{name} needs the output {', '.join(sorted(lacking))}, "
                f"but config.objective gives {', '.join(sorted(about.outputs))}; take "
                f"{name} out of config.evals."
            )
        evaluator.check(about)


def check_limit(name: str, option: str, limit: int | None) -> None:
    """Raises ValueError for a number of images below 1; None stands for all."""
    if limit is not None:
        ranges.check(f"evals.{name}.{option}", limit, least=1)


def check_labels(name: str, about: About) -> None:
    """Refuses data on which nothing that learns from labels can be tested.

    Raises:
      ValueError: if there are no labels, or no images to test on.
    """
    if about.num_classes == 0:
        raise ValueError(
            f"config.evals.{name} needs labels, but a split has none "
            f"({about.without_labels}). Sort the images into one folder per class, "
            f"use a labelled data set, or take {name} out of config.evals."
        )
    if about.unlabelled:
        raise ValueError(
            f"config.evals.{name} needs images that have a label, but "
            f"{about.unlabelled}: test splits are often published without labels. "
            f"Choose another split, or take {name} out of config.evals."
        )
    if "eval" not in about.num_images:
        raise ValueError(
            f"config.evals.{name} needs images to test on, but the data has no "
            "evaluation split. Set data.eval_split (tfds) or data.eval_dir "
            f"(folder), or take {name} out of config.evals."
        )


def held_out(splits: Iterable[str]) -> str:
    """Returns the split of images not trained on; "train" where there is none."""
    return "eval" if "eval" in splits else "train"
