"""Evaluates a checkpoint in several ways, in one report.

    accuracy     of a classifier, on the evaluation split
    knn          k nearest neighbours, of the mean of the patches and the class token
    linear       logistic regression on frozen features
    robustness   of a classifier, on other sets or corrupted images

Every image of a split is counted once. The report says of how many, of which
checkpoint, and how: results without these cannot be compared.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax import (
    checkpoint,
    digests,
    environment,
    evaluation,
    evaluators,
    parallel,
    robust,
    train,
)
from crossmae_jax.convert import starting
from crossmae_jax.data import pipeline, sources
from crossmae_jax.evaluators import features
from crossmae_jax.ops import attention, attention_check

SUITES = ("accuracy", "knn", "linear", "robustness")
KS = (10, 20, 100, 200)  # DINO's, arXiv 2104.14294; 20 is the usual one
_DEFAULTS = {
    "accuracy": {},
    "knn": dict(k=KS, temperature=0.07, pools=("mean", "cls")),
    "linear": {},
}
# Parts that no evaluation here looks at.
_UNUSED = ("fusion", "decoder", "aggregator")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights with the configuration that they are evaluated with.

    Attributes:
      path: a run, or a file or folder of another format.
      step: of a run.
      digest: SHA-256 of what was read.
    """

    path: str
    step: int | None
    digest: str
    config: ConfigDict
    objective: Any
    variables: Any


@dataclasses.dataclass
class Report:
    """What was found.

    Attributes:
      metrics: by name, "knn/top1".
      images: how many images of each split were evaluated, and how many it has.
      notes: what a reader must know to compare.
    """

    checkpoint: Checkpoint
    metrics: dict[str, float]
    images: dict[str, tuple[int, int]]
    notes: list[str]

    def to_json(self) -> str:
        """Returns everything, the configuration included."""
        made = self.checkpoint
        return json.dumps({
            "checkpoint": {
                "path": made.path, "step": made.step, "sha256": made.digest
            },
            "metrics": self.metrics,
            "images": self.images,
            "notes": self.notes,
            "config": json.loads(made.config.to_json()),
            "environment": environment.describe(),
        }, indent=2) + "\n"

    def to_markdown(self) -> str:
        """Returns a table of the metrics under what they are of."""
        made = self.checkpoint
        step = "" if made.step is None else f", step {made.step}"
        lines = [
            f"# Evaluation of {made.path}{step}", "", f"* sha256 `{made.digest}`",
            *(
                f"* {split}: {evaluation.counted(*seen)} images"
                for split, seen in self.images.items()
            ),
            *(f"* {note}" for note in self.notes),
            "", "| metric | value |", "| --- | --- |",
            *(f"| {name} | {value:.4f} |" for name, value in self.metrics.items()),
        ]
        return "\n".join(lines) + "\n"


def open_checkpoint(
    path: str | Path, config: ConfigDict, *, step: int | None = None
) -> Checkpoint:
    """Opens weights to evaluate, on all devices.

    Args:
      path: a run, or weights of another format, as `config.init_from` takes them.
      config: of the model and the data; for a run its own, in which `data` may say
        where the images lie here.
      step: of a run; the newest intact one if None.

    Raises:
      RestoreError: if the run has no intact checkpoint.
      ValueError: if the weights do not fit the config, or lack what is evaluated.
    """
    path, mesh = Path(path), parallel.make_mesh()
    if not config.data.get("num_classes", 1):
        opened = sources.make_source(config.data, "train")
        config = train.with_classes(config, opened.num_classes)
    objective = train.make_objective(config)
    key = jax.random.key(0, impl="threefry2x32")
    abstract = parallel.with_sharding(
        jax.eval_shape(objective.init, key), parallel.replicated(mesh)
    )
    if is_run(path):
        place = path / "checkpoints"
        step = checkpoint.newest_step(place) if step is None else step
        variables = checkpoint.restore_variables(place, abstract, step)
        digest = digests.of(place / str(step) / digests.LIST)
        return Checkpoint(str(path), step, digest, config, objective, variables)
    if step is not None:
        raise ValueError(f"{path} is no run and has no steps; leave out step={step}.")
    found = starting.plan(str(path), abstract, config)
    if missing := sorted(found.new - set(_UNUSED)):
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, which would be random numbers; give "
            "weights that have all of it, or a config of another model or "
            "objective.\n" + "\n".join(found.report)
        )
    init = jax.jit(objective.init, out_shardings=parallel.replicated(mesh))
    return Checkpoint(
        str(path), None, digests.of(path), config, objective, found.apply(init(key))
    )


def is_run(path: Path) -> bool:
    """Says whether a path is the workdir of a run."""
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def run(
    made: Checkpoint,
    suites: Sequence[str],
    directory: Path,
    *,
    imagenet: Mapping[str, str] | None = None,
) -> Report:
    """Evaluates a checkpoint and writes `evaluation.json` and `evaluation.md`.

    The options of an evaluator are those of `config.evals`, where it is named there.

    Args:
      suites: some of `SUITES`.
      directory: where the report is written.
      imagenet: directories of the sets of robustness, "a", "r", "sketch" and "c"; with
        none of them it is measured on the evaluation split, corrupted on the fly.

    Raises:
      ValueError: for an unknown suite, or one that the checkpoint or the data cannot
        give.
      KernelError: if a kernel does not compute what it should on these devices.
    """
    _check_suites(made, suites)
    config, mesh = made.config, parallel.make_mesh()
    predict = _predict(made, mesh)
    report = Report(made, {}, {}, [])

    def evaluation_of(
        opened: dict[str, sources.Source], data: ConfigDict, evals: dict[str, Any]
    ) -> evaluators.Evaluation:
        return evaluation.of_sources(
            opened, data, predict, mesh=mesh, workdir=directory, evals=evals
        )

    sets = imagenet or {}
    needed = ["train"] * bool({"knn", "linear"} & set(suites))
    needed += ["eval"] * (not sets or set(suites) != {"robustness"})
    opened = {
        split: source for split in needed
        if (source := sources.make_source(config.data, split)) is not None
    }
    evals = _options(config, suites, opened, report.notes)
    num_images = {split: len(source) for split, source in opened.items()}
    evaluators.check(
        evals, num_images={"train": 0} | num_images,
        num_classes=max((source.num_classes for source in opened.values()), default=0),
    )
    evaluation.check_pools(evals, config.model)
    whole = evaluation_of(opened, config.data, evals)
    for name, options in evals.items():
        found = evaluators.run(name, whole, options).metrics
        report.metrics |= {f"{name}/{key}": value for key, value in found.items()}
    report.images |= {
        split: (whole.num_extracted(split), count)
        for split, count in num_images.items() if whole.num_extracted(split)
    }
    if "robustness" in suites:
        def logits_of(
            source: sources.Source, data: ConfigDict
        ) -> features.Features:
            one = evaluation_of({"eval": source}, data, {"accuracy": {}})
            return one.features_of("eval", output="logits")

        if not sets:
            report.notes.append(robust.NOTE)
        report.metrics |= robust.evaluate(
            logits_of, config.data, opened.get("eval"), imagenet=sets
        )
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("evaluation.json", report.to_json()),
            ("evaluation.md", report.to_markdown()),
        ):
            temporary = directory / f"{name}.tmp"
            temporary.write_text(text)
            temporary.replace(directory / name)
    return report


def _check_suites(made: Checkpoint, suites: Sequence[str]) -> None:
    if unknown := [name for name in suites if name not in SUITES]:
        raise ValueError(
            f"Unknown suite {unknown[0]!r}. Known: {', '.join(SUITES)}."
        )
    of_logits = [name for name in ("accuracy", "robustness") if name in suites]
    if of_logits and made.config.objective != "classify":
        raise ValueError(
            f"{' and '.join(of_logits)} need a classifier, but {made.path} was trained "
            f"with objective={made.config.objective!r}: fine-tune it "
            "(docs/finetuning.md), or evaluate its features: knn, linear."
        )


def _options(
    config: ConfigDict,
    suites: Sequence[str],
    opened: Mapping[str, sources.Source],
    notes: list[str],
) -> dict[str, dict[str, Any]]:
    """Returns the options of each evaluator; notes which defaults do not apply."""
    evals = {}
    for name in (name for name in suites if name in _DEFAULTS):
        if name in config.evals:
            evals[name] = config.evals[name].to_dict()
            continue
        evals[name] = dict(_DEFAULTS[name])
        if name == "knn":
            bank = len(opened["train"])
            ks = tuple(k for k in KS if k <= bank)
            if ks != KS:
                left = ", ".join(str(k) for k in KS if k not in ks)
                notes.append(f"k-NN without k = {left}: {bank} training images")
            evals[name]["k"] = ks or (bank,)
            if config.model.get("pool") == "cls":
                evals[name]["pools"] = ("cls",)
    return evals


def _predict(made: Checkpoint, mesh: jax.sharding.Mesh) -> features.Predict:
    """Returns the jitted `predict` of a checkpoint, its kernels having been checked."""
    data = made.config.data
    jitted = jax.jit(parallel.within(mesh, made.objective.predict))
    batch = parallel.with_sharding(
        pipeline.blank_batch(data, batch_size=data.batch_size, valid=True),
        parallel.batch_sharding(mesh),
    )
    with attention.recording() as choices:
        jax.eval_shape(jitted, made.variables, batch)
    attention_check.check(choices, mesh=mesh)
    return lambda batch: jitted(made.variables, batch)
