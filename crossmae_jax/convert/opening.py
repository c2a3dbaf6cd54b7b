"""Opens weights of any format, and says what they were recognised by.

    run             a --workdir: config.json and checkpoints/
    safetensors     ours: a .safetensors file with a card, or the folder of an import
    mae             a .pth file with the names of facebookresearch/mae or CrossMAE
    simmim          a .pth file with the names of microsoft/SimMIM's ViT, or BEiT's, or
                    of its Swin, or Swin's own
    timm            .safetensors or .pth with timm's names, or a folder with config.json
    huggingface     a folder of transformers: ViTMAEForPreTraining, an encoder or a
                    ViTForImageClassification

Nothing is read but descriptions; tensors come when they are asked for.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from crossmae_jax import paths
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.convert import (
    cards,
    contents,
    foreign,
    hints,
    names,
    of_swin,
    opened,
    structure,
)
from crossmae_jax.convert.contents import WEIGHTS
from crossmae_jax.convert.files.tensor import Tensor
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.convert.opened import CARD, Weights
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import workdir

FORMATS = ("run", "safetensors", "mae", "simmim", "timm", "huggingface")

# What SimMIM's ViT has and MAE's has not.
_OF_SIMMIM = re.compile(
    r"^(encoder\.)?(blocks\.0\.attn\.(q_bias|relative_position_bias_table)"
    r"|rel_pos_bias\.relative_position_bias_table)$|^encoder\.blocks\.0\."
)


def open_weights(
    path: str | AnyPath, *, format: str | None = None, step: int | None = None,
    under: str | None = None, parts: str = "all", fallback: Facts | None = None,
    **facts: Any,
) -> Weights:
    """Opens weights of any format.

    Args:
      format: one of `FORMATS`; recognised by what lies there if not given.
      step: of a run; the newest intact one if not given.
      under: where in the file the tensors are, if it has those of several models: see
        `contents`.
      parts: "all", or "encoder" to leave out what comes after it, known or not.
      fallback: used where neither file nor `facts` nor published sizes tell, or the
        file tells a mean and a std that cannot be.
      facts: what the file does not tell, as in `hints.Facts`.

    Raises:
      ConversionError: if nothing of a known format lies there, something is missing in
        it, or facts are needed or contradicted.
    """
    try:
        path = paths.path(path)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if not path.exists():
        raise ConversionError(
            f"No weights at {path}; give a file, a folder or the --workdir of a run."
        )
    if parts not in ("all", "encoder"):
        raise ConversionError(f"Unknown parts {parts!r}. Known: all, encoder.")
    if format is None:
        format, reason = recognise(path, under=under)
    else:
        reason = "as was said"
    if format not in FORMATS:
        raise ConversionError(
            f"Unknown format {format!r}. Known: {', '.join(sorted(FORMATS))}."
        )
    _check_facts(path, format, facts | {"under": under})
    evidence = [f"format {format}: {reason}"]
    fallback = fallback or Facts()
    if format == "run":
        weights = _open_run(path, step, fallback, evidence)
    elif step is not None:
        raise ConversionError(f"{path} is no run and has no steps; leave out step.")
    elif format == "safetensors":
        weights = _open_ours(path, fallback, evidence)
    else:
        given = hints.usable(Facts(**facts))
        source = foreign.find(path, format, under=under, evidence=evidence)
        weights = foreign.open_source(source, parts, given, fallback, evidence)
    if parts == "encoder" and weights.card.kind != "encoder":
        return opened.encoder_of(weights)
    return opened.with_usable_names(weights)


def _check_facts(path: AnyPath, format: str, facts: dict[str, Any]) -> None:
    """Raises ConversionError for facts that are unknown, or that a format tells."""
    known = {field.name for field in dataclasses.fields(Facts)} | {"under"}
    if unknown := sorted(facts.keys() - known):
        raise ConversionError(
            f"Unknown: {', '.join(unknown)}. What can be said of weights: "
            f"{', '.join(sorted(known))}."
        )
    if paths.is_remote(path) and format != "run":
        raise ConversionError(_only_runs(path))
    given = [name for name, value in facts.items() if value is not None]
    if format in ("run", "safetensors") and given:
        raise ConversionError(
            f"{path} is taken as of the format {format!r}, which tells all of "
            f"itself; leave out {', '.join(given)}, or name another format."
        )


def _only_runs(path: AnyPath) -> str:
    return (
        f"{path} lies in a bucket and is no run: only runs are read from there. Copy "
        f"it first: gcloud storage cp -r {path} ."
    )


def recognise(path: AnyPath, *, under: str | None = None) -> tuple[str, str]:
    """Returns the format of what lies at `path`, and the reason.

    Args:
      under: see `open_weights`.

    Raises:
      ConversionError: if it is none of ours.
    """
    if paths.is_remote(path):
        if workdir.is_run(path):
            return "run", "config.json and checkpoints/ in it"
        raise ConversionError(_only_runs(path))
    if path.is_dir():
        return _recognise_folder(path, under)
    tensors, rest, *_ = contents.read(path, under=under)
    if CARD in rest:
        return "safetensors", "a card of ours in its metadata"
    if any(".patch_embeddings." in name for name in tensors):
        return "huggingface", "names like embeddings.patch_embeddings"
    if of_a_swin := of_swin.format_of(tensors):
        return of_a_swin
    if any(_OF_SIMMIM.search(name) for name in tensors):
        return "simmim", "names like blocks.0.attn.q_bias, of SimMIM's and BEiT's ViT"
    if "patch_embed.proj.weight" in tensors:
        if "mask_token" in tensors:
            return "mae", "a mask_token and names like decoder_blocks.0"
        if rest.get("under") == "model":
            return "mae", "names of a ViT under the key 'model', as MAE's scripts write"
        return "timm", "names like blocks.0.attn.qkv without a decoder"
    shown = ", ".join(list(tensors)[:3])
    raise ConversionError(
        f"{path} holds {len(tensors)} tensors ({shown}, ...) of no format known here; "
        f"known are {', '.join(FORMATS)}. Give its tensors the names of timm's "
        "VisionTransformer, and save them again."
    )


def _recognise_folder(path: Path, under: str | None) -> tuple[str, str]:
    if (path / "checkpoints").is_dir() and (path / "config.json").is_file():
        return "run", "config.json and checkpoints/ in it"
    if (path / "config.json").is_file():
        config = hints.read_json(path / "config.json")
        if "model_type" in config:
            return "huggingface", f"config.json has model_type {config['model_type']!r}"
        if "architecture" in config:
            return "timm", f"config.json has architecture {config['architecture']!r}"
    elif (path / WEIGHTS).is_file():
        format, reason = recognise(path / WEIGHTS, under=under)
        return format, f"{reason}, in {WEIGHTS}"
    entries = sorted(entry.name for entry in path.iterdir())[:5]
    hint = ""
    if path.name == "checkpoints" or (path.parent.name == "checkpoints"):
        hint = " Give the --workdir of the run instead."
    raise ConversionError(
        f"{path} is no run, no import and no folder of timm or transformers; it holds "
        f"{', '.join(entries) or 'nothing'}.{hint}"
    )


def _open_run(
    path: AnyPath, step: int | None, fallback: Facts, evidence: list[str]
) -> Weights:
    directory = path / "checkpoints"
    if not any(entry.name.isdecimal() for entry in directory.iterdir()):
        raise ConversionError(f"The run {path} has saved no checkpoint yet.")
    if step is None:
        step = checkpointer.newest_step(directory)
    card = cards.of_run(
        workdir.read_config(path), step=step, origin=str(path),
        classes=workdir.read_classes(path),
    )
    card = hints.usable(card, fallback, where=str(path))
    evidence.append(f"step {step} of the run")

    @functools.cache
    def restored() -> dict[str, Any]:
        variables = checkpointer.restore_variables(directory, step=step)
        variables = structure.kept(card, variables)
        opened.check(names.tensors_of(variables), card, path)
        return names.without_collections(variables)

    expected = names.without_collections(structure.abstract_variables(card))
    tensors = {
        name: Tensor(
            leaf.shape, np.dtype(leaf.dtype),
            lambda name=name: np.asarray(restored()[name]),
        )
        for name, leaf in expected.items()
    }
    return Weights(card, tensors, "run", tuple(evidence))


def _open_ours(path: Path, fallback: Facts, evidence: list[str]) -> Weights:
    if path.is_dir():
        path = path / WEIGHTS
    tensors, metadata, *_ = contents.read(path)
    if CARD not in metadata:
        raise ConversionError(
            f"{path} has no card of ours in its metadata; it is of another format: "
            "name that, such as format='timm'."
        )
    card = cards.from_json(metadata[CARD])
    card = hints.usable(card, fallback, where=f"The card in {path}")
    opened.check(tensors, card, path)
    return Weights(card, tensors, "safetensors", tuple(evidence))
