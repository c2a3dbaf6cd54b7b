"""Evaluates a saved checkpoint, apart from training: the `evaluate` command.

It opens a run's checkpoint or weights of another format, chooses data and options, and
runs suites on them; the evaluators are those that run `while_training`, too:

    accuracy     of a classifier, on the evaluation split
    knn          k nearest neighbours, of the mean of the patches and the class token
    linear       logistic regression on frozen features
    robustness   of a classifier, on other sets or corrupted images

Every image of a split is counted once. What comes of it is in a `report`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax import errors, evals, objectives, paths
from crossmae_jax.checkpoints import checkpointer, digests
from crossmae_jax.convert import starting
from crossmae_jax.data import pipeline, sources
from crossmae_jax.data.classes import listed
from crossmae_jax.distributed import parallel
from crossmae_jax.evals import (
    evaluator,
    features,
    linear,
    outputs,
    report,
    robustness_sets,
    while_training,
)
from crossmae_jax.ops import attention, attention_check
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import confusions, workdir

SUITES = ("accuracy", "knn", "linear", "robustness")
KS = (10, 20, 100, 200)  # DINO's, arXiv 2104.14294; 20 is the usual one
DEFAULTS = {
    "accuracy": {},
    "knn": dict(k=KS, temperature=0.07, pools=("mean", "cls")),
    "linear": dict(l2s=linear.L2S, max_iterations=1000, tolerance=1e-6),
}
_OF_LOGITS = ("accuracy", "robustness")
# Parts that no evaluation here looks at.
_UNUSED = ("fusion", "decoder", "aggregator")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights with the configuration that they are evaluated with.

    Attributes:
      path: a run, or a file or folder of another format.
      step: of a run.
      digest: SHA-256 of what was read.
      notes: what became of the parts of other formats.
      classes: of a classifier, what its logits stand for; None if that is not known.
    """

    path: str
    step: int | None
    digest: str
    config: ConfigDict
    objective: Any
    variables: Any
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


def open_checkpoint(
    path: str | AnyPath, config: ConfigDict, *, step: int | None = None
) -> Checkpoint:
    """Opens weights to evaluate, on all devices.

    Args:
      path: a run, or weights of another format, as `config.init_from` takes them.
      config: of the model and the data; for a run its own, in which `data` may say
        where the images lie here.
      step: of a run; the newest intact one if None.

    Raises:
      SetupError: if the weights do not fit the config, or lack what is evaluated.
      RestoreError: if the run has no intact checkpoint.
    """
    path, mesh = paths.path(path), parallel.make_mesh()
    with errors.setting_up():
        if not config.data.get("num_classes", 1):
            opened = sources.make_source(config.data, "train")
            config = objectives.with_classes(config, opened)
        objective = objectives.make(config)
    key = jax.random.key(0, impl="threefry2x32")
    abstract = parallel.with_sharding(
        jax.eval_shape(objective.init, key), parallel.replicated(mesh)
    )
    if workdir.is_run(path):
        place = path / "checkpoints"
        step = checkpointer.newest_step(place) if step is None else step
        variables = checkpointer.restore_variables(place, abstract, step)
        digest = digests.of(place / str(step) / digests.LIST)
        return Checkpoint(
            str(path), step, digest, config, objective, variables,
            classes=workdir.read_classes(path) if _classifies(objective) else None,
        )
    with errors.setting_up():
        if step is not None:
            raise ValueError(f"{path} is no run and has no steps; leave out {step=}.")
        abstract = objectives.objective.kept(abstract, objective.starts)
        start = starting.plan(str(path), abstract, config)
        if missing := sorted(start.new - set(_UNUSED)):
            raise ValueError(
                f"{path} lacks {', '.join(missing)}, which would be random numbers; "
                "give weights that have all of it, or a config of another model or "
                "objective.\n" + "\n".join(start.report)
            )
    init = jax.jit(objective.init, out_shardings=parallel.replicated(mesh))
    return Checkpoint(
        str(path), None, digests.of(path), config, objective, start.apply(init(key)),
        notes=tuple(line.strip() for line in start.report), classes=start.classes,
    )


def _classifies(objective: Any) -> bool:
    return "logits" in objective.outputs


def run(
    made: Checkpoint,
    suites: Sequence[str],
    directory: Path,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    imagenet: Mapping[str, str] | None = None,
) -> report.Report:
    """Evaluates a checkpoint; writes the report after each suite.

    A directory that holds the report of other suites of the same checkpoint, with the
    same configuration, is added to.

    Args:
      suites: some of `SUITES`.
      options: of evaluators, in place of `DEFAULTS`.
      imagenet: directories of the sets of robustness, "a", "r", "sketch" and "c"; with
        none of them it is measured on the evaluation split, corrupted on the fly.

    Raises:
      SetupError: for an unknown suite, or one that the checkpoint or the data cannot
        give.
      KernelError: if a kernel does not compute what it should on these devices.
    """
    config, mesh, imagenet = made.config, parallel.make_mesh(), imagenet or {}
    with errors.setting_up():
        _check_suites(made, suites)
        opened = _open(made, suites, own_images=not imagenet)
        written = report.begun(directory, _empty(made))
        chosen = _options(made, suites, opened, options or {}, written)
        evaluators = evals.make(chosen)
        evaluator.check(
            evaluators, while_training.about(config, made.objective, opened)
        )
        if unknown := _unnamed(made, suites, opened):
            written.note(unknown)
            parallel.say(unknown)
        sets = {}
        if "robustness" in suites:
            sets = robustness_sets.prepare(
                config.data, opened.get("eval"), imagenet=imagenet,
                classes=made.classes,
            )
    given = _outputs(made, mesh).of(made.variables)

    def evaluation_of(opened, data, wanted):
        return while_training.of_sources(
            opened, data, mesh=mesh, workdir=directory, wanted=wanted, **given
        )

    def logits_of(source: sources.Source, data: ConfigDict) -> features.Features:
        evaluation = evaluation_of({"eval": source}, data, ())
        extracted = evaluation.labelled("eval", output="logits")
        _note_counts(written, evaluation)
        return extracted

    wanted = evaluator.wanted(evaluators.values())
    evaluation = evaluation_of(opened, config.data, wanted)
    for name, each in evaluators.items():
        metrics = each.run(evaluation).metrics
        _note_counts(written, evaluation)
        written.options[name] = dict(chosen[name])
        written.add(name, metrics, _images(each, evaluation))
        if name == "accuracy" and jax.process_index() == 0:  # which alone writes
            pairs = confusions.read(directory / f"{confusions.FOLDER}.csv")
            written.confusions = confusions.most_frequent(pairs)
        written.write(directory)
    for name, measure in sets.items():
        metrics, num_images = measure(logits_of)
        written.add(name, metrics, {"all": (num_images, num_images)})
        if note := robustness_sets.NOTES.get(name):
            written.note(note)
        written.write(directory)
    return written


def _empty(made: Checkpoint) -> report.Report:
    """Returns the report of a checkpoint of which nothing is known yet."""
    return report.Report(
        dict(path=made.path, step=made.step, sha256=made.digest),
        json.loads(made.config.to_json()), notes=list(made.notes),
        classes=None if made.classes is None else list(made.classes),
    )


def _open(
    made: Checkpoint, suites: Sequence[str], *, own_images: bool
) -> dict[str, sources.Source]:
    """Returns the splits that the suites look at, as far as there are any.

    Labels are numbers of a classifier's classes, where these are known, and else of
    those of the training images.
    """
    config, classes = made.config, made.classes
    options = {name: DEFAULTS[name] for name in suites if name in DEFAULTS}
    evaluators = evals.make(options)
    needed = {request.split for request in evaluator.wanted(evaluators.values())}
    if "robustness" in suites and own_images:
        needed.add("eval")
    opened = {}
    for split in sorted(needed, reverse=True):  # "train" first
        source = sources.make_source(config.data, split, classes=classes)
        if source is None:
            raise ValueError(
                f"{', '.join(suites)} need images to test on, but the data has no "
                "evaluation split. Set data.eval_split (tfds) or data.eval_dir "
                "(folder)."
            )
        head = config.data.get("num_classes")
        if head and len(source.classes) not in (0, head):
            raise ValueError(
                f"{source} has {len(source.classes)} classes, the head {head}: their "
                "numbers do not mean the same. Give the data that it was trained for."
            )
        parallel.say(f"{split}: {sources.described(source)}")
        opened[split] = source
        classes = source.classes if classes is None else classes
    return opened


def _unnamed(
    made: Checkpoint, suites: Sequence[str], opened: Mapping[str, sources.Source]
) -> str:
    """Says what the numbers of a head are taken for whose classes have no names."""
    if made.classes is not None or not set(_OF_LOGITS) & set(suites):
        return ""
    taken_for = "ImageNet's WordNet ids, in their order"
    if "eval" in opened:
        taken_for = f"the data's, in their order: {listed(opened['eval'].classes)}"
    return f"the names of the head's classes are not known; taken to be {taken_for}"


def _check_suites(made: Checkpoint, suites: Sequence[str]) -> None:
    if unknown := [name for name in suites if name not in SUITES]:
        raise ValueError(
            f"Unknown suite {unknown[0]!r}. Known: {', '.join(SUITES)}."
        )
    of_logits = [name for name in _OF_LOGITS if name in suites]
    if of_logits and not _classifies(made.objective):
        raise ValueError(
            f"{' and '.join(of_logits)} need a classifier, but {made.path} was trained "
            f"with objective={made.config.objective!r}: fine-tune it "
            "(docs/finetuning.md), or evaluate its features: knn, linear."
        )


def _options(
    made: Checkpoint,
    suites: Sequence[str],
    opened: Mapping[str, sources.Source],
    given: Mapping[str, Mapping[str, Any]],
    written: report.Report,
) -> dict[str, dict[str, Any]]:
    """Returns the options of each evaluator; notes which defaults do not apply."""
    chosen = {}
    for name in (name for name in suites if name in DEFAULTS):
        chosen[name] = DEFAULTS[name] | given.get(name, {})
        if name != "knn":
            continue
        bank = len(opened["train"])
        if "k" not in given.get(name, {}) and bank < KS[-1]:
            chosen[name]["k"] = tuple(k for k in KS if k <= bank) or (bank,)
            left = ", ".join(str(k) for k in KS if k > bank)
            written.note(f"k-NN without k = {left}: {bank} training images")
        if "pools" not in given.get(name, {}):
            chosen[name]["pools"] = _pools(made)
    return chosen


def _pools(made: Checkpoint) -> tuple[str, ...]:
    """Returns by what a model's images are compared: all that it has."""
    if made.config.model.get("pool") == "cls":
        return ("cls",)
    if "class_token" not in made.objective.outputs:
        return ("mean",)
    return DEFAULTS["knn"]["pools"]


def _images(
    measuring: evaluator.Evaluator, evaluation: evaluator.Evaluation
) -> dict[str, tuple[int, int]]:
    """Returns how many images of each split an evaluator took, of how many.

    The extraction of features fails unless it was each of them, once; those without a
    label were left out then.
    """
    counts = {}
    for wanted in measuring.wanted():
        available = evaluation.num_images[wanted.split]
        taken = available if wanted.num_images is None else wanted.num_images
        left_out = evaluation.num_unlabelled.get(wanted.split, 0)
        counts[wanted.split] = (min(taken, available) - left_out, available)
    return counts


def _note_counts(written: report.Report, evaluation: evaluator.Evaluation) -> None:
    """Notes how many images were left out, and how many stood for others."""
    for line in while_training.left_out(evaluation):
        written.note(line)
    for split, number in evaluation.num_replaced.items():
        if number:
            written.note(
                f"{number} images of {split} could not be decoded and count as their "
                "neighbours do; bad_images.jsonl names them"
            )


def _outputs(made: Checkpoint, mesh: jax.sharding.Mesh) -> outputs.Compiled:
    """Returns what a checkpoint gives, the kernels for its rows having been checked."""
    data = made.config.data
    key = jax.random.key(0, impl="threefry2x32")
    compiled = outputs.Compiled(made.objective, mesh, key=key)
    batch = parallel.with_sharding(
        pipeline.blank_batch(data, batch_size=data.batch_size, valid=True),
        parallel.batch_sharding(mesh),
    )
    with attention.recording() as choices:
        compiled.trace_rows(made.variables, batch)
    attention_check.check(choices, mesh=mesh)
    return compiled
