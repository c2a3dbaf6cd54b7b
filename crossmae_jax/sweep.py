"""Partial fine-tuning with several numbers of blocks: accuracy against blocks.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section
4.3: linear probing asks whether classes can be told apart by a plane, full fine-tuning
hides where pre-training left off; what lies between shows how much of a representation
must change.

Every number of blocks is a run of its own, in `blocks_N` of the sweep's directory. A
sweep that was interrupted goes on where it stopped, and a later one with other numbers
of blocks adds to the curve: runs that are finished are not trained again.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from crossmae_jax import errors, paths, tables, train, visualize
from crossmae_jax.models import encoders
from crossmae_jax.optim import layerwise
from crossmae_jax.runs import ownership, records

RESULT = "sweep.json"
PICTURE = "accuracy_by_blocks.png"
SWEEP = ownership.Kind(
    "a sweep", RESULT, frozenset({"init_from", "accuracy"}),
    early=r"blocks_.*|sweep\.json\.tmp|accuracy_by_blocks\.png",
    cure="remove it and give the command again: what is finished is not trained again",
)
_METRIC = "eval/accuracy/top1"
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")  # of blocks, as it is written

Curve = dict[float, float]


def run(config: ConfigDict, directory: Path, *, blocks: Sequence[float]) -> Curve:
    """Fine-tunes once for each number of blocks; returns the best accuracies.

    Writes `sweep.json` with what is known so far after each of them.

    Args:
      config: of fine-tuning; its `tune_blocks` is not read.
      blocks: 0 trains the head alone, 0.5 also the MLP of the last block, n the last n
        blocks: see `layerwise.is_tuned`.

    Returns:
      The accuracies in this directory by number of blocks, those of former calls, too.

    Raises:
      SetupError: if the configuration is not one of fine-tuning, the encoder does not
        have so many blocks, or the directory holds another sweep.
    """
    with errors.setting_up():
        _check(config, blocks)
        curve = _begun(directory, config)
    for count in sorted(blocks):
        changed = config.copy_and_resolve_references()
        changed.tune_blocks = float(count)
        if jax.process_index() == 0:
            print(f"tune_blocks={count:g}", flush=True)
        metrics = train.run(changed, directory / f"blocks_{count:g}")
        curve[count] = metrics[f"best/{_METRIC}"]
        curve = dict(sorted(curve.items()))
        if jax.process_index() == 0:
            _write(directory / RESULT, config, curve)
    return curve


def _check(config: ConfigDict, blocks: Sequence[float]) -> None:
    if config.objective != "classify" or config.checkpoint.best != _METRIC:
        raise ValueError(
            "A sweep fine-tunes and compares the best epochs: give a config with "
            f"objective='classify' and checkpoint.best={_METRIC!r}, such as "
            f"configs/partialft_vitb.py; this has objective={config.objective!r}, "
            f"checkpoint.best={config.checkpoint.best!r}."
        )
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(f"blocks={list(blocks)}; give numbers of blocks, each once.")
    depth = encoders.build_encoder(config).depth
    for count in blocks:
        layerwise.check_blocks(count, depth)


def _begun(directory: Path, config: ConfigDict) -> Curve:
    """Returns what a directory holds already of the sweep."""
    if jax.process_index() == 0:
        ownership.check(directory, [SWEEP])
    path = directory / RESULT
    if not path.exists():
        return {}
    content = _read(path)
    if content["init_from"] != config.init_from:
        raise ValueError(
            f"{directory} holds a sweep from init_from={content['init_from']!r}, not "
            f"{config.init_from!r}; give another --workdir."
        )
    return read(directory)


def read(directory: Path) -> Curve:
    """Returns the accuracy of each number of blocks of a sweep.

    Raises:
      SetupError: if the directory is not that of a sweep.
    """
    path = Path(directory) / RESULT
    if not path.is_file():
        raise errors.SetupError(
            f"{path} does not exist; give the --workdir of a sweep that has finished a "
            "run."
        )
    accuracy = _read(path)["accuracy"]
    return {float(count): float(value) for count, value in accuracy.items()}


def _read(path: Path) -> dict[str, Any]:
    """Returns what a sweep's file says, which its runs can say again."""
    content = records.read(path, cure=SWEEP.cure)
    accuracy = content.get("accuracy")
    if not isinstance(accuracy, dict) or "init_from" not in content or not all(
        _NUMBER.fullmatch(count) and records.is_number(value)
        for count, value in accuracy.items()
    ):
        raise records.DamagedRecord(f"{path} is that of no sweep; {SWEEP.cure}.")
    return content


def draw(directories: Sequence[Path], path: Path) -> Path:
    """Draws a curve for each sweep; returns the path of the picture."""
    return visualize.accuracy_by_blocks(
        dict(zip(names(directories), map(read, directories), strict=True)), path
    )


def names(directories: Sequence[Path]) -> list[str]:
    """Returns names for curves: the directories without what they have in common.

    Raises:
      SetupError: if a directory is given twice.
    """
    whole = [os.path.abspath(directory) for directory in directories]
    if len(set(whole)) < len(whole):
        raise errors.SetupError(
            f"A sweep is compared with itself: {', '.join(map(str, directories))}; "
            "give other directories."
        )
    if len(whole) == 1:
        return [os.path.basename(whole[0])]
    above = os.path.commonpath(whole)
    return [os.path.relpath(path, above) for path in whole]


def table(curve: Curve) -> str:
    """Returns the accuracies in Markdown."""
    rows = ((f"{count:g}", f"{100 * value:.2f}") for count, value in curve.items())
    return tables.markdown(tables.Table(("tuned blocks", "best top-1, %"), tuple(rows)))


def _write(path: Path, config: ConfigDict, curve: Curve) -> None:
    content = {
        "init_from": config.init_from,
        "metric": _METRIC,
        "accuracy": {f"{count:g}": value for count, value in curve.items()},
    }
    paths.write_whole(path, json.dumps(content, indent=2) + "\n")
