"""Opens weights of any format, and says what they were recognised by.

    run             a --workdir: config.json and checkpoints/
    safetensors     ours: a .safetensors file with a card, or the folder of an import
    mae             a .pth file with the names of facebookresearch/mae or CrossMAE
    timm            .safetensors or .pth with timm's names, or a folder with config.json
    huggingface     a folder of transformers: ViTMAEForPreTraining or an encoder

Nothing is read but descriptions; tensors come when they are asked for.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from crossmae_jax import paths
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.convert import cards, hints, names, structure
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.files import safetensors_file, torch_file
from crossmae_jax.convert.files.tensor import Tensor, Tensors
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.paths import AnyPath
from crossmae_jax.runs import workdir

FORMATS = ("run", "safetensors", "mae", "timm", "huggingface")
CARD = "crossmae_jax"  # the card's name in the metadata of our files
EMBEDDED = "crossmae_jax_card"  # and in files of other formats that we wrote
WEIGHTS = "model.safetensors"  # in folders

_POOLER = ("pooler.dense.weight", "pooler.dense.bias")  # behind a ViTModel's encoder
# transformers 5 writes the blocks of ViTMAE's decoder under this name; it reads both.
_SPELLINGS = {"decoder.decoder_encoder.layer.": "decoder.decoder_layers."}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights under our names and in our layouts, whatever they come from.

    Attributes:
      format: one of `FORMATS`.
      evidence: what format and card were concluded from, a line each.
    """

    card: Card
    tensors: Tensors
    format: str
    evidence: tuple[str, ...]


def open_weights(
    path: str | AnyPath, *, format: str | None = None, step: int | None = None,
    fallback: Facts | None = None, **facts: Any,
) -> Weights:
    """Opens weights of any format.

    Args:
      format: one of `FORMATS`; recognised by what lies there if not given.
      step: of a run; the newest intact one if not given.
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
    if format is None:
        format, reason = recognise(path)
    else:
        reason = "as was said"
    if format not in FORMATS:
        raise ConversionError(
            f"Unknown format {format!r}. Known: {', '.join(sorted(FORMATS))}."
        )
    known = {field.name for field in dataclasses.fields(Facts)}
    if unknown := sorted(facts.keys() - known):
        raise ConversionError(
            f"Unknown: {', '.join(unknown)}. What can be said of weights: "
            f"{', '.join(sorted(known))}."
        )
    if paths.is_remote(path) and format != "run":
        raise ConversionError(_only_runs(path))
    evidence = [f"format {format}: {reason}"]
    if format in ("run", "safetensors"):
        if facts := {k: v for k, v in facts.items() if v is not None}:
            raise ConversionError(
                f"{path} is taken as of the format {format!r}, which tells all of "
                f"itself; leave out {', '.join(facts)}, or name another format."
            )
        if format == "run":
            return _open_run(path, step, fallback or Facts(), evidence)
    if step is not None:
        raise ConversionError(f"{path} is no run and has no steps; leave out step.")
    if format == "safetensors":
        return _open_ours(path, fallback or Facts(), evidence)
    given = hints.usable(Facts(**facts))
    return _open_foreign(path, format, given, fallback or Facts(), evidence)


def _only_runs(path: AnyPath) -> str:
    return (
        f"{path} lies in a bucket and is no run: only runs are read from there. Copy "
        f"it first: gcloud storage cp -r {path} ."
    )


def recognise(path: AnyPath) -> tuple[str, str]:
    """Returns the format of what lies at `path`, and the reason.

    Raises:
      ConversionError: if it is none of ours.
    """
    if paths.is_remote(path):
        if workdir.is_run(path):
            return "run", "config.json and checkpoints/ in it"
        raise ConversionError(_only_runs(path))
    if path.is_dir():
        return _recognise_folder(path)
    tensors, rest = read_file(path)
    if CARD in rest:
        return "safetensors", "a card of ours in its metadata"
    if any(".patch_embeddings." in name for name in tensors):
        return "huggingface", "names like embeddings.patch_embeddings"
    if "patch_embed.proj.weight" in tensors:
        if "mask_token" in tensors:
            return "mae", "a mask_token and names like decoder_blocks.0"
        if rest.get("under") == "model":
            return "mae", "names of a ViT under the key 'model', as MAE's scripts write"
        return "timm", "names like blocks.0.attn.qkv without a decoder"
    shown = ", ".join(list(tensors)[:3])
    begins = {name.partition(".")[0] for name in tensors}
    hint = ""
    if len(begins) == 1 and any("cls_token" in name for name in tensors):
        hint = f" Their names begin with {begins.pop()!r}; save them without."
    raise ConversionError(
        f"{path} holds {len(tensors)} tensors ({shown}, ...) of no format known here; "
        f"known are {', '.join(FORMATS)}.{hint}"
    )


def _recognise_folder(path: Path) -> tuple[str, str]:
    if (path / "checkpoints").is_dir() and (path / "config.json").is_file():
        return "run", "config.json and checkpoints/ in it"
    if (path / "config.json").is_file():
        config = hints.read_json(path / "config.json")
        if "model_type" in config:
            return "huggingface", f"config.json has model_type {config['model_type']!r}"
        if "architecture" in config:
            return "timm", f"config.json has architecture {config['architecture']!r}"
    elif (path / WEIGHTS).is_file():
        format, reason = recognise(path / WEIGHTS)
        return format, f"{reason}, in {WEIGHTS}"
    entries = sorted(entry.name for entry in path.iterdir())[:5]
    hint = ""
    if path.name == "checkpoints" or (path.parent.name == "checkpoints"):
        hint = " Give the --workdir of the run instead."
    raise ConversionError(
        f"{path} is no run, no import and no folder of timm or transformers; it holds "
        f"{', '.join(entries) or 'nothing'}.{hint}"
    )


def read_file(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Returns the tensors of a file under its own names, and what else it holds.

    In a PyTorch file the tensors may lie one level down; "under" names that level.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors_file.read(path)
        content = torch_file.read(path)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, not a dictionary of tensors."
        )
    for key in ("model", "state_dict"):
        inner = content.get(key)
        if isinstance(inner, dict) and _all_tensors(inner):
            rest = {name: value for name, value in content.items() if name != key}
            return inner, {**rest, "under": key}
    if not _all_tensors(content):
        raise ConversionError(
            f"{path} has no dictionary of tensors, neither by itself nor under 'model' "
            f"or 'state_dict'; it holds {', '.join(map(str, list(content)[:8]))}."
        )
    return content, {}


def _all_tensors(content: dict[Any, Any]) -> bool:
    return bool(content) and all(
        isinstance(name, str) and isinstance(value, Tensor)
        for name, value in content.items()
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
        _check(names.tensors_of(variables), card, path)
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
    tensors, metadata = read_file(path)
    if CARD not in metadata:
        raise ConversionError(
            f"{path} has no card of ours in its metadata; it is of another format: "
            "name that, such as format='timm'."
        )
    card = cards.from_json(metadata[CARD])
    card = hints.usable(card, fallback, where=f"The card in {path}")
    _check(tensors, card, path)
    return Weights(card, tensors, "safetensors", tuple(evidence))


def _open_foreign(
    path: Path, format: str, given: Facts, fallback: Facts, evidence: list[str]
) -> Weights:
    tensors, rest, facts = _foreign(path, format, evidence)
    if beside := sorted(map(str, rest.keys() - {"under", EMBEDDED})):
        evidence.append(f"beside the tensors, not used as weights: {', '.join(beside)}")
    tables = {"mae": (names.MAE,), "timm": (names.TIMM,), "huggingface": (
        names.HUGGINGFACE_MAE, names.HUGGINGFACE_VIT
    )}[format]
    # ViTMAEForPreTraining has a prefix that an encoder by itself lacks.
    table = min(tables, key=lambda table: len(names.to_ours(table, tensors)[1]))
    ours, left_over = names.to_ours(table, tensors)
    patch_name = names.their_names(table, "encoder/patch_embed/proj/kernel")[0]
    if patch_name not in tensors or len(tensors[patch_name].shape) != 4:
        raise ConversionError(
            f"{path} is not of the format {format}: it has no {patch_name} of 4 axes."
        )
    if isinstance(rest.get(EMBEDDED), str):  # we wrote it
        if extras := [k for k, v in dataclasses.asdict(given).items() if v is not None]:
            raise ConversionError(f"{path} has a card; leave out {', '.join(extras)}.")
        card = cards.from_json(rest[EMBEDDED])
        card = hints.usable(card, fallback, where=f"The card in {path}")
        evidence.append("model: from the card in the file")
        normed = card.kind == "classifier" or card.fusion.final_norm
        if not normed and "encoder/norm/scale" in ours:
            del ours["encoder/norm/scale"], ours["encoder/norm/bias"]
            evidence.append("left out: the norm that the export added (fresh_norm)")
    else:
        facts = hints.usable(facts, given, fallback, where=str(path)).with_given(given)
        if format == "mae" and facts.mean is None and facts.std is None and (
            tensors[patch_name].shape[1] == 3
        ):
            mean, std = hints.IMAGENET
            facts = dataclasses.replace(facts, mean=mean, std=std)
            evidence.append("mean and std: ImageNet's, as in the reference's code")
        card = structure.infer(
            ours, tensors[patch_name].shape, facts, fallback=fallback,
            origin=f"{path.name} ({format})", recipe=hints.recipe(rest),
            evidence=evidence,
        )
        if names.attends_across(ours):
            positions = "encoder/pos_embed"
            ours[positions] = names.zero_class_row(ours[positions])
    _check(ours, card, path, table=table, left_over=left_over)
    return Weights(card, ours, format, tuple(evidence))


def _check(
    tensors: Tensors, card: Card, path: AnyPath, *, table: names.Table = (),
    left_over: list[str] | None = None,
) -> None:
    expected = names.without_collections(structure.abstract_variables(card))
    try:
        names.check_match(
            tensors, {name: leaf.shape for name, leaf in expected.items()},
            table=table, left_over=left_over or (),
            reason=f"{path} is cut, or holds more than a {card.encoder.title}",
        )
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error


def _foreign(
    path: Path, format: str, evidence: list[str]
) -> tuple[Tensors, dict[str, Any], Facts]:
    """Returns tensors under their names, what lies beside them, and what that tells."""
    config: dict[str, Any] = {}
    if path.is_dir():
        if (path / "config.json").is_file():
            config = hints.read_json(path / "config.json")
        tensors, rest = _folder_tensors(path)
    else:
        tensors, rest = read_file(path)
    if format == "huggingface":
        facts = hints.of_huggingface(path, config, evidence)
        return _respelt(tensors, evidence), rest, facts
    if format == "timm":
        return tensors, rest, hints.of_timm(config, evidence)
    return tensors, rest, hints.of_mae(rest, evidence)


def _folder_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    index = path / f"{WEIGHTS}.index.json"
    if index.is_file():
        places = hints.read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ConversionError(f"{index} has no weight_map.")
        files = sorted(set(map(str, places.values())))
        merged: dict[str, Tensor] = {}
        for name in files:
            merged |= read_file(path / name)[0]
        return merged, {}
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (path / name).is_file():
            return read_file(path / name)
    raise ConversionError(f"{path} has neither {WEIGHTS} nor pytorch_model.bin.")


def _respelt(tensors: Tensors, evidence: list[str]) -> dict[str, Tensor]:
    """Returns tensors of transformers under the usual names, without the pooler."""
    respelt = {}
    for name, value in tensors.items():
        if name in _POOLER:
            evidence.append(f"left out: {name}, which comes after the encoder")
            continue
        for spelling, usual in _SPELLINGS.items():
            name = name.replace(spelling, usual)
        respelt[name] = value
    return respelt
