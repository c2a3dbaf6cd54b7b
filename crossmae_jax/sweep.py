"""Partial fine-tuning with several numbers of blocks: accuracy against blocks.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section
4.3: linear probing asks whether classes can be told apart by a plane, full fine-tuning
hides where pre-training left off; what lies between shows how much of a representation
must change.

Every number of blocks is a run of its own, in `blocks_N` of the sweep's directory. A
sweep that was interrupted goes on where it stopped: runs that are finished are not
trained again.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from crossmae_jax import train, visualize

RESULT = "sweep.json"
PICTURE = "accuracy_by_blocks.png"


def run(
    config: ConfigDict, directory: Path, *, blocks: Sequence[float]
) -> dict[float, float]:
    """Fine-tunes once for each number of blocks; returns the best accuracies.

    Writes `sweep.json` with what is known so far after each of them.

    Args:
      config: of fine-tuning; its `tune_blocks` is not read.
      blocks: 0 trains the head alone, 0.5 also the MLP of the last block, n the last n
        blocks: see `layerwise.is_tuned`.

    Raises:
      SetupError: if the configuration does not classify, or names no checkpoint to
        keep as the best.
    """
    if config.objective != "classify" or not config.checkpoint.best:
        raise train.SetupError(
            "A sweep fine-tunes and compares the best epochs: give a config with "
            "objective='classify' and checkpoint.best='eval/accuracy/top1', such as "
            f"configs/partialft_vitb.py; this has objective={config.objective!r}, "
            f"checkpoint.best={config.checkpoint.best!r}."
        )
    if not blocks or len(set(blocks)) < len(blocks):
        raise train.SetupError(
            f"blocks={list(blocks)}; give numbers of blocks, each once."
        )
    found = {}
    for count in sorted(blocks):
        one = config.copy_and_resolve_references()
        one.tune_blocks = float(count)
        print(f"tune_blocks={count:g}", flush=True)
        metrics = train.run(one, directory / f"blocks_{count:g}")
        found[count] = metrics[f"best/{config.checkpoint.best}"]
        if jax.process_index() == 0:
            _write(directory / RESULT, config, found)
    return found


def read(directory: Path) -> tuple[str, dict[float, float]]:
    """Returns what a sweep started from, and the accuracy of each number of blocks.

    Raises:
      SetupError: if the directory is not that of a sweep.
    """
    path = Path(directory) / RESULT
    if not path.is_file():
        raise train.SetupError(
            f"{path} does not exist; give the --workdir of a sweep that has finished a "
            "run."
        )
    content = json.loads(path.read_text())
    return content["init_from"], {
        float(count): value for count, value in content["accuracy"].items()
    }


def draw(directories: Sequence[Path], *, names: Sequence[str], path: Path) -> Path:
    """Draws a curve for each sweep; returns the path of the picture."""
    curves = {
        name: read(directory)[1]
        for name, directory in zip(names, directories, strict=True)
    }
    return visualize.accuracy_by_blocks(curves, path)


def table(found: dict[float, float]) -> str:
    """Returns the accuracies in Markdown."""
    lines = ["| tuned blocks | best top-1, % |", "| --- | --- |"]
    lines += [f"| {count:g} | {100 * value:.2f} |" for count, value in found.items()]
    return "\n".join(lines)


def _write(path: Path, config: ConfigDict, found: dict[float, float]) -> None:
    content = {
        "init_from": config.init_from,
        "metric": config.checkpoint.best,
        "accuracy": {f"{count:g}": value for count, value in found.items()},
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
