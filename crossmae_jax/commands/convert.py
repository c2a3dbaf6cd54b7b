"""Takes weights in and out: PyTorch, timm, Hugging Face; tells what a file holds.

    python -m crossmae_jax convert inspect FILE
    python -m crossmae_jax convert import FILE --to=DIR
    python -m crossmae_jax convert export RUN_OR_DIR --format=timm --to=PATH

FILE is a file, a folder or a run, of any format: it is recognised, and by what is
printed. What a file does not tell is asked for by name: --num_heads=12.

Exit status 2 if the command line is wrong, 1 if the weights could not be converted.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from crossmae_jax import convert
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.convert import exporting, opening


def numbers(kind: type) -> Any:
    """Returns the type of a flag that is a list, such as 224,224."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.strip("()").split(",") if part.strip())

    parse.__name__ = f"list of {kind.__name__}"  # argparse prints it
    return parse


def _yes(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_yes.__name__ = "true or false"

# What a file may not tell: `hints.Facts`.
FACTS = {
    "num_heads": (int, "heads of the encoder"),
    "decoder_heads": (int, "heads of the decoder"),
    "image_size": (numbers(int), "height,width in pixels"),
    "mean": (numbers(float), "of each channel, for pixels in 0..1"),
    "std": (numbers(float), "of each channel, for pixels in 0..1"),
    "normalize": (_yes, "whether the decoder predicts standardised patches"),
    "mask_ratio": (float, "share of patches that was masked"),
    "pred_ratio": (float, "share of patches that was predicted"),
    "fusion_maps": (numbers(int), "blocks that CrossMAE's decoder sees; () for all"),
    "fusion_input": (_yes, "whether it sees the encoder's input"),
}


def _add_facts(
    parser: argparse.ArgumentParser, *, without: Sequence[str] = ()
) -> None:
    group = parser.add_argument_group("what the file may not tell")
    for name, (kind, text) in FACTS.items():
        if name not in without:
            group.add_argument(f"--{name}", type=kind, help=text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a model that a command looks into: `crossmae_jax.load`'s."""
    parser.add_argument("--checkpoint", required=True, help="a run or weights")
    parser.add_argument("--step", type=int, help="of a run; default: the newest")
    parser.add_argument(
        "--image_size", type=numbers(int), help="height,width to work at"
    )
    _add_facts(parser, without=("image_size", "mask_ratio", "pred_ratio"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crossmae_jax convert", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    inspect = actions.add_parser("inspect", help="print what a file holds")
    inspect.add_argument("path", metavar="FILE")
    taken = actions.add_parser("import", help="into a folder of ours")
    given = actions.add_parser("export", help="into another library's form")
    taken.add_argument("path", metavar="FILE")
    taken.add_argument("--format", choices=opening.FORMATS, help="default: recognised")
    given.add_argument("path", metavar="RUN_OR_DIR")
    given.add_argument("--format", choices=list(exporting.WRITERS), required=True)
    given.add_argument("--parts", choices=("all", "encoder"), default="all")
    given.add_argument("--step", type=int, help="of a run; default: the newest")
    given.add_argument(
        "--fresh_norm", action="store_true",
        help="huggingface: add the norm that CrossMAE's encoders lack",
    )
    for action in (taken, given):
        action.add_argument("--to", required=True, help="must not exist yet")
        action.add_argument(
            "--no_check", dest="check", action="store_false",
            help="do not send images through both sides",
        )
        _add_facts(action)
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; `argv` holds what follows `convert`."""
    options = vars(_parser().parse_args(argv))
    action, path = options.pop("action"), options.pop("path")
    try:
        if action == "inspect":
            print(convert.inspect(path))
            return 0
        work = {"import": convert.import_weights, "export": convert.export_weights}
        options = {name: value for name, value in options.items() if value is not None}
        done = work[action](path, options.pop("to"), **options)
    except (convert.ConversionError, checkpointer.RestoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(done.lines))
    return 0
