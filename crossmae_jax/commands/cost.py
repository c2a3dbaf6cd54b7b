"""Counts multiply-adds, parameters and tokens of a config, also beside another.

    python -m crossmae_jax cost --config=FILE [--config.KEY=VALUE ...] [--against=FILE]

Settings are those of training: --config.masking.throw_ratio=0.5. They do not touch the
file that --against names. Nothing is trained and no device is used.

Exit status 2 if the command line is wrong, 1 if a configuration contradicts itself.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from crossmae_jax import main as train_main
from crossmae_jax.cost import counting
from crossmae_jax.objectives import pretrain


def _count(config: ConfigDict, path: str) -> counting.Cost:
    """Counts a configuration, if it is one that can be trained."""
    try:
        counted = counting.count(config)
        pretrain.Pretrain(config)
        return counted
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parts(counted: counting.Cost) -> dict[str, tuple[int, int]]:
    """Returns the multiply-adds and parameters of each part, and of the whole."""
    return {
        "encoder": (counted.encoder_macs, counted.encoder_params),
        "decoder": (counted.decoder_macs, counted.decoder_params),
        "aggregator": (counted.aggregator_macs, counted.aggregator_params),
        "position tables, not trained": (0, counted.table_params),
        "total": (counted.macs, counted.params),
    }


def _share(part: int, other: int) -> str:
    return f"{part / other:.1%}" if other else "-"


def _table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(counted: counting.Cost, against: counting.Cost | None = None) -> str:
    """Returns what was counted in Markdown: a table of the parts, one of the tokens.

    Args:
      against: a cost of which to give the shares, part by part.
    """
    head = ["part", "forward GMACs", "parameters, M"]
    rows = [
        [part, f"{macs / 1e9:.4f}", f"{params / 1e6:.3f}"]
        for part, (macs, params) in _parts(counted).items()
    ]
    both = {"config": counted}
    if against is not None:
        both["against"] = against
        head += ["GMACs / against", "parameters / against"]
        pairs = zip(_parts(counted).values(), _parts(against).values(), strict=True)
        for row, (ours, theirs) in zip(rows, pairs, strict=True):
            row += map(_share, ours, theirs)
    tokens = [
        [name, c.num_patches, c.num_keep, c.num_pred, c.num_thrown, c.decoder_tokens]
        for name, c in both.items()
    ]
    return "\n\n".join([
        "Counted are the multiply-adds (MACs) of one image's forward pass in training, "
        "matrix\nproducts and convolutions only. A training step is 3 passes x 2 "
        f"operations:\n{counted.train_flops / 1e9:.3f} GFLOPs an image.",
        _table(head, rows),
        _table(
            ["tokens", "patches", "visible", "decoded", "thrown", "in decoder blocks"],
            tokens,
        ),
    ])


def main(argv: list[str]) -> int:
    """Prints the cost of the configuration that `argv` describes."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    values = flags.FlagValues()
    flags.DEFINE_string("against", None, "File to compare with.", flag_values=values)
    path, title = train_main.parse_command(
        "cost", argv, values, usage="[--against=FILE]"
    )
    against = None
    try:
        counted = _count(values.config, str(path))
        if values.against is not None:
            title += f"\nagainst `{values.against}`"
            other = train_main.load_config(Path(values.against))
            against = _count(other, values.against)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{title}\n\n{report(counted, against)}")
    return 0
