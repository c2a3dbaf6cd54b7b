"""The report of an evaluated checkpoint: one JSON and one Markdown file.

It says what was measured, of which checkpoint, with which options, on how many images:
numbers without these cannot be compared. `of_checkpoint` fills it. (The page about a
run, made from what the run itself wrote, is `crossmae_jax.report`.)

A report belongs to one checkpoint and one configuration. Suites that are evaluated
later are added to it; another configuration needs another directory.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from crossmae_jax import paths, tables
from crossmae_jax.distributed import environment
from crossmae_jax.runs import confusions, ownership, records, settings, workdir

JSON, MARKDOWN = "evaluation.json", "evaluation.md"
EVALUATION = ownership.Kind(
    "an evaluation", JSON, frozenset({"checkpoint", "config", "metrics"}),
    early=r"bad_images.*\.jsonl|evaluation\.(md|json\.tmp)|confusions\.csv.*",
    cure="give another --workdir, or remove it",
)


@dataclasses.dataclass
class Report:
    """What was measured of one checkpoint.

    Attributes:
      checkpoint: its path, step (None if it is of no run) and SHA-256.
      config: the whole configuration it was evaluated with, as of JSON.
      options: of each evaluator.
      metrics: by name, "knn/top1"; shares from 0 to 1 unless a note says otherwise.
      images: by evaluator and split, how many images were evaluated, of how many.
      notes: what else a reader must know to compare.
      classes: of a classifier, what its logits stand for, if that is known.
      confusions: the classes most often taken for others, as `confusions.Frequent`; all
        are in a file beside the report.
    """

    checkpoint: dict[str, Any]
    config: dict[str, Any]
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    images: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    classes: list[str] | None = None
    confusions: list[Sequence[Any]] = dataclasses.field(default_factory=list)

    def add(
        self, name: str, metrics: dict[str, float], images: dict[str, tuple[int, int]]
    ) -> None:
        """Adds what an evaluator measured, in place of what it did before."""
        for old in [key for key in self.metrics if key.startswith(f"{name}/")]:
            del self.metrics[old]
        self.metrics |= {f"{name}/{key}": value for key, value in metrics.items()}
        self.images |= {f"{name}/{split}": list(n) for split, n in images.items()}

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def to_markdown(self) -> str:
        """Returns the metrics as a table, under what they are of."""
        path, step = self.checkpoint["path"], self.checkpoint["step"]
        rows = [(name, tables.exact(value)) for name, value in self.metrics.items()]
        lines = [
            f"# Evaluation of {path}" + ("" if step is None else f", step {step}"), "",
            f"* sha256 `{self.checkpoint['sha256']}`",
            *(
                f"* {name}: {tables.counted(*number)} images"
                for name, number in self.images.items()
            ),
            *(
                f"* {name}: " + ", ".join(f"{k}={v}" for k, v in options.items())
                for name, options in self.options.items() if options
            ),
            *(f"* {note}" for note in self.notes),
            "", tables.markdown(tables.Table(("metric", "value"), tuple(rows))),
        ]
        if self.confusions:
            lines += ["", tables.markdown(confusions.table(self.confusions))]
            lines += ["", f"all of them: {confusions.FOLDER}.csv"]
        return "\n".join(lines) + "\n"

    def write(self, directory: Path) -> None:
        """Writes both files, from process 0."""
        if jax.process_index() != 0:
            return
        directory.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(self) | {"environment": environment.describe()}
        paths.write_whole(directory / JSON, json.dumps(content, indent=2) + "\n")
        paths.write_whole(directory / MARKDOWN, self.to_markdown())


def begun(directory: Path, report: Report) -> Report:
    """Returns the report that a directory holds, or else the one that is given.

    Raises:
      ValueError: if the directory holds that of another checkpoint or configuration,
        or is neither that of a report nor of a run, see `ownership.check`.
    """
    ownership.check(directory, [EVALUATION, workdir.RUN])
    path = directory / JSON
    if not path.exists():
        return report
    content = records.read(path, cure=EVALUATION.cure)
    fields = {field.name for field in dataclasses.fields(Report)}
    earlier = Report(**{k: v for k, v in content.items() if k in fields})
    for what, old, new in (
        ("checkpoint", earlier.checkpoint["sha256"], report.checkpoint["sha256"]),
        ("configuration", settings.completed(earlier.config), report.config),
    ):
        if old != new:
            raise ValueError(
                f"{directory} holds the report of another {what}; give another "
                "--workdir, or remove it."
            )
    return earlier
