"""Weights in and out: PyTorch, timm, Hugging Face and our own files.

    import_weights("mae_pretrain_vit_base.pth", "weights/mae_vitb")
    export_weights("runs/mine", "weights/mine_timm", format="timm")
    print(inspect("weights/mae_vitb"))

`spellings` and `names` rename and re-lay tensors one at a time; `torch_file` and
`safetensors_file` read and write them, `contents` finds those of a ViT in a file;
`cards` and `structure` know what model they are of; `opening` opens any format, with
`foreign` for those of others, `exporting` writes any; `checks` sends images through
both sides.
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from crossmae_jax import paths
from crossmae_jax.convert import checks, contents, exporting
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.convert.opened import Weights
from crossmae_jax.convert.opening import open_weights

__all__ = [
    "Card", "Conversion", "ConversionError", "Weights", "export_weights",
    "import_weights", "inspect", "open_weights",
]


class Conversion(NamedTuple):
    """What was written where, and what is to be said about it, a line each."""

    path: Path
    card: Card
    lines: list[str]


def import_weights(
    path: str | Path, to: str | Path, *, format: str | None = None, check: bool = True,
    **facts: Any,
) -> Conversion:
    """Turns weights of any format into a folder of ours.

    The tensors are read, changed and written one at a time. Then the same images go
    through both sides, where the other one is installed; only if they agree does the
    folder get its name.

    Args:
      to: a folder that does not exist yet.
      format: see `opening.FORMATS`; recognised if not given.
      check: False leaves the images out.
      facts: what the file does not tell, as in `hints.Facts`; `under`, `parts`.

    Raises:
      ConversionError: see `opening.open_weights`; or if the two sides disagree.
      FileExistsError: if there is something at `to`.
    """
    weights = open_weights(path, format=format, **facts)
    lines = list(weights.evidence)

    def write(temporary: Path) -> list[str]:
        temporary.mkdir()
        exporting.write_safetensors(weights, temporary / contents.WEIGHTS)
        if not check:
            return ["not checked, as was asked"]
        written = open_weights(temporary, format="safetensors")
        other = "safetensors" if weights.format == "run" else weights.format
        source = temporary if weights.format == "run" else Path(path)
        return checks.compare(written, source, other, place=weights.place)

    return _commit(weights, Path(to), lines, write)


def export_weights(
    path: str | Path, to: str | Path, *, format: str, parts: str = "all",
    step: int | None = None, fresh_norm: bool = False, check: bool = True,
    **facts: Any,
) -> Conversion:
    """Writes weights, of a run or of any format, in another format.

    Args:
      to: a folder for "timm" and "huggingface", else a file; must not exist yet.
      format: "timm", "huggingface", "mae", "simmim" or "safetensors".
      parts: "all", or "encoder" for the encoder by itself.
      step: of a run; the newest intact one if not given.
      fresh_norm: see `exporting.write_huggingface`.
      check: False leaves out sending images through both sides.
      facts: what the file does not tell, as in `hints.Facts`.

    Raises:
      ConversionError: if the format has no place for the model, or the two sides
        disagree.
      FileExistsError: if there is something at `to`.
    """
    if format not in exporting.WRITERS:
        raise ConversionError(
            f"Unknown format {format!r}. Known: {', '.join(exporting.WRITERS)}."
        )
    if fresh_norm and format != "huggingface":
        raise ConversionError("fresh_norm is for format 'huggingface'; leave it out.")
    to, (writer, suffix) = Path(to), exporting.WRITERS[format]
    if suffix and to.suffix != suffix:
        raise ConversionError(f"Format {format!r} is a file; let {to} end in {suffix}.")
    if not suffix and to.suffix in (".pth", ".safetensors"):
        raise ConversionError(
            f"Format {format!r} is a folder; let {to} have no suffix of a file."
        )
    source = open_weights(path, step=step, parts=parts, **facts)
    weights, left_out = exporting.select(source, format, parts)
    lines = [*source.evidence, *left_out, *exporting.warnings(weights.card)]
    if fresh_norm:
        lines.append("added: a norm of scale 1 and bias 0 after the last block")
    options = {"fresh_norm": fresh_norm} if format == "huggingface" else {}

    def write(temporary: Path) -> list[str]:
        writer(weights, temporary, **options)
        if not check:
            return ["not checked, as was asked"]
        return checks.compare(weights, temporary, format)

    return _commit(weights, to, lines, write)


def _commit(weights: Weights, to: Path, lines: list[str], write: Any) -> Conversion:
    """Writes under a temporary name, and gives the right one to what is complete."""
    if paths.is_remote(to):
        raise ConversionError(f"{to} lies in a bucket; write to a disk and copy that.")
    if os.path.lexists(to):
        raise FileExistsError(
            f"{to} exists and is not overwritten; remove it or give another name."
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.stem}.unfinished{to.suffix}")
    _remove(temporary)
    try:
        remarks = write(temporary)
        temporary.rename(to)
    finally:
        _remove(temporary)
    count = sum(value.size for value in weights.tensors.values())
    lines += [f"{len(weights.tensors)} tensors, {count:,} numbers, in {to}", *remarks]
    return Conversion(to, weights.card, lines)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def inspect(path: str | Path, **facts: Any) -> str:
    """Describes what a file, a folder or a run holds, without reading its tensors.

    Of a file whose model cannot be told from it, the tensors are listed and what is
    missing is said.

    Args:
      facts: what the file does not tell, as in `open_weights`.
    """
    path = Path(path)
    try:
        weights = open_weights(path, **facts)
    except ConversionError as error:
        if not path.is_file():
            raise
        tensors, rest, *_ = contents.read(path, under=facts.get("under"))
        return "\n".join([
            f"{path}: {error}", *_listing(tensors), f"beside them: {_beside(rest)}",
        ])
    return "\n".join([
        *weights.evidence, *weights.card.lines(), *_listing(weights.tensors),
    ])


def _beside(rest: dict[str, Any]) -> str:
    return ", ".join(str(name) for name in rest if name != "under") or "nothing"


def _listing(tensors: Any) -> list[str]:
    width = max(map(len, tensors), default=0)
    count = sum(value.size for value in tensors.values())
    return [
        f"{len(tensors)} tensors, {count:,} numbers:",
        *(
            f"    {name:{width}}  {value.dtype}  "
            f"{' x '.join(map(str, value.shape)) or 'scalar'}"
            for name, value in tensors.items()
        ),
    ]
