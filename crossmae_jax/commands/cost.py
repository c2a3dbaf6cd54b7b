"""Counts multiply-adds, parameters and tokens of a config, also beside another.

    python -m crossmae_jax cost --config=FILE [--config.KEY=VALUE ...] [--against=FILE]

Settings are those of training: --config.masking.throw_ratio=0.5. They do not touch the
file that --against names. Nothing is trained and no device is used.

Exit status 2 if the command line is wrong, 1 if a configuration contradicts itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from crossmae_jax import errors, tables
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag
from crossmae_jax.distributed import hardware

if TYPE_CHECKING:  # JAX is imported when it is told to leave devices alone
    from crossmae_jax.cost.counting import Cost

_COLLECTIONS = {
    "constants": "position tables", "batch_stats": "running statistics",
    "teacher": "weights of the teacher",
}

_FLAGS = {"against": Flag(Path, "a file to compare with")}

def _count(config: ConfigDict, path: Path) -> "Cost":
    """Counts a configuration, if it is one that can be trained."""
    from crossmae_jax.cost import counting

    with errors.naming(path), errors.setting_up():
        return counting.count(config)


def _rows(counted: "Cost") -> dict[str, tuple[int, int]]:
    """Returns the multiply-adds and parameters of each part, and of the whole."""
    untrained = {
        f"{_COLLECTIONS.get(name, name)}, not trained": (0, number)
        for name, number in counted.others.items()
    }
    total = (counted.macs, counted.params)
    return {**counted.parts, **untrained, "total": total}


def _training(counted: "Cost") -> str:
    """Says what a training step is taken as."""
    if counted.differentiated == counted.macs:
        return "A training step is 3 passes x 2 operations"
    return (
        "Frozen parameters need no gradient: a training\nstep is 1 pass, and 2 more of "
        f"{counted.differentiated / 1e9:.4f} GMACs, x 2 operations"
    )


def _refreshing(counted: "Cost") -> str:
    """Says what attention maps take besides."""
    macs, passes, epochs = counted.refresh
    operations = 2 * macs * passes / (epochs * counted.train_flops)
    return (
        f"Attention maps take {passes} passes over all training images in {epochs:g} "
        f"epochs, {passes / epochs:.3g}\nan epoch, of {macs / 1e9:.4f} GMACs an image: "
        f"{operations:.1%} of the operations above more. Before the\nfirst maps masks "
        "are plain, and steps are other than counted here."
    )


def _share(part: int, other: int) -> str:
    return f"{part / other:.1%}" if other else "-"


def _table(head: list[str], rows: list[list[object]]) -> str:
    cells = (tuple(map(str, row)) for row in rows)
    return tables.markdown(tables.Table(tuple(head), tuple(cells)))


def report(counted: "Cost", against: "Cost | None" = None) -> str:
    """Returns what was counted in Markdown: a table of the parts, one of the tokens.

    Args:
      against: a cost of which to give the shares, part by part.
    """
    head = ["part", "forward GMACs", "parameters, M"]
    parts, both = _rows(counted), {"config": counted}
    rows = [
        [part, f"{macs / 1e9:.4f}", f"{params / 1e6:.3f}"]
        for part, (macs, params) in parts.items()
    ]
    if against is not None:
        both["against"] = against
        head += ["GMACs / against", "parameters / against"]
        others = _rows(against)
        for row, (part, counts) in zip(rows, parts.items(), strict=True):
            row += map(_share, counts, others.get(part, (0, 0)))
    tokens = [
        [name, c.num_patches, c.num_keep, c.num_pred, c.num_thrown, c.decoder_tokens]
        for name, c in both.items()
    ]
    paragraphs = [
        "Counted are the multiply-adds (MACs) of one image's forward pass in training, "
        f"matrix\nproducts and convolutions only. {_training(counted)}:\n"
        f"{counted.train_flops / 1e9:.3f} GFLOPs an image.",
        _table(head, rows),
        _table(
            ["tokens", "patches", "visible", "decoded", "thrown", "in decoder blocks"],
            tokens,
        ),
    ]
    if counted.refresh:
        paragraphs.append(_refreshing(counted))
    return "\n\n".join(paragraphs)


@session.command()
def main(argv: Sequence[str]) -> None:
    """Prints the cost of the configuration that `argv` describes."""
    given = flags.parse("cost", argv, _FLAGS, doc=__doc__, config=flags.of_file)
    title, other = given.title, None
    if given.against is not None:
        title += f"\nagainst `{given.against}`"
        other = flags.load_config(given.against)
    hardware.without_devices()
    counted = _count(given.config, given.file)
    against = other and _count(other, given.against)
    print(f"{title}\n\n{report(counted, against)}")
