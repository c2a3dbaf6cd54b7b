"""Takes weights in and out: PyTorch, timm, Hugging Face; tells what a file holds.

    python -m crossmae_jax convert inspect FILE
    python -m crossmae_jax convert import FILE --to=DIR
    python -m crossmae_jax convert export RUN_OR_DIR --format=timm --to=PATH

FILE is a file, a folder or a run, of any format: it is recognised, and by what is
printed. What a file does not tell is asked for by name: --num_heads=12.

Exit status 2 if the command line is wrong, 1 if the weights could not be converted.
"""

import types
from collections.abc import Mapping, Sequence
from typing import Any

from crossmae_jax import errors
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag

_ACTIONS = {
    "inspect": "print what a file holds",
    "import": "into a folder of ours",
    "export": "into another library's form",
}

# What a file may not tell: `hints.Facts`.
_FACTS = {
    "num_heads": Flag(int, "heads of the encoder, if the file does not tell"),
    "decoder_heads": Flag(int, "likewise of the decoder"),
    "image_size": Flag(flags.numbers(int), "likewise: height,width in pixels"),
    "mean": Flag(flags.numbers(float), "of each channel, for pixels in 0..1"),
    "std": Flag(flags.numbers(float), "of each channel, for pixels in 0..1"),
    "normalize": Flag(bool, "whether the decoder predicts standardised patches"),
    "mask_ratio": Flag(float, "share of patches that was masked"),
    "pred_ratio": Flag(float, "share of patches that was predicted"),
    "fusion_maps": Flag(
        flags.numbers(int), "blocks that CrossMAE's decoder sees; () for all"
    ),
    "fusion_input": Flag(bool, "whether it sees the encoder's input"),
    "pool": Flag(flags.one_of(("cls", "mean")), "what a classifier pools"),
    "classes": Flag(
        lambda text: tuple(flags.words(text)), "names of a classifier's classes"
    ),
    "under": Flag(str, "where in a file, if it holds several: teacher.backbone"),
}
_STEP = {"step": Flag(int, "of a run; default: the newest")}
_PARTS = {
    "parts": Flag(
        flags.one_of(("all", "encoder")), "all or encoder; default: all", default="all"
    ),
}

# Of a model that a command looks into: arguments of `crossmae_jax.load`.
MODEL = {
    "checkpoint": Flag(str, "a run or weights", required=True),
    **_STEP,
    **_PARTS,
    **{
        name: flag for name, flag in _FACTS.items()
        if name not in ("mask_ratio", "pred_ratio")
    },
    "image_size": Flag(flags.numbers(int), "height,width to work at"),
}


def _readable(text: str) -> str:
    from crossmae_jax.convert import opening

    return flags.one_of(opening.FORMATS)(text)


def _writable(text: str) -> str:
    from crossmae_jax.convert import exporting

    return flags.one_of(list(exporting.WRITERS))(text)


_WRITTEN = {
    "to": Flag(str, "what to write, which must not exist yet", required=True),
    "no_check": Flag(bool, "do not send images through both sides", default=False),
    **_FACTS,
}
_FLAGS = {
    "inspect": {**_PARTS, **_FACTS},
    "import": {
        "format": Flag(_readable, "default: recognised"), **_PARTS, **_WRITTEN,
    },
    "export": {
        "format": Flag(
            _writable, "timm, huggingface, mae, simmim or safetensors", required=True
        ),
        **_PARTS,
        "fresh_norm": Flag(
            bool, "huggingface: add the norm that CrossMAE's encoders lack",
            default=False,
        ),
        **_STEP,
        **_WRITTEN,
    },
}


def facts(
    given: types.SimpleNamespace, table: Mapping[str, Flag] = MODEL
) -> dict[str, Any]:
    """Returns what was given of the facts that a file may not tell, step and parts.

    Args:
      table: where these are flags of this meaning.
    """
    values = {
        name: getattr(given, name) for name in table
        if name in {**_STEP, **_PARTS, **_FACTS}
    }
    return {name: value for name, value in values.items() if value is not None}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Runs the command; `argv` holds what follows `convert`."""
    action = flags.action("convert", argv, _ACTIONS, doc=__doc__)
    given = flags.parse(
        f"convert {action}", argv[1:], _FLAGS[action], doc=__doc__,
        operands=("RUN_OR_DIR" if action == "export" else "FILE",),
    )
    from crossmae_jax import convert

    (path,) = given.operands
    with errors.using_files():
        options = facts(given, _FLAGS[action])
        if action == "inspect":
            print(convert.inspect(path, **options))
            return
        options |= dict(format=given.format, check=not given.no_check)
        if action == "import":
            done = convert.import_weights(path, given.to, **options)
        else:
            done = convert.export_weights(
                path, given.to, fresh_norm=given.fresh_norm, **options
            )
    print("\n".join(done.lines))
