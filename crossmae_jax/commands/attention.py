"""Measures where a decoder's masked patches look, over a set of images.

    python -m crossmae_jax attention --checkpoint=RUN --dir=DIR --to=analysis
    python -m crossmae_jax attention --checkpoint=mae_visualize_vit_base.pth \\
        --tfds=imagenet2012 --data_dir=DATA --split=validation --num_images=5000 \\
        --to=analysis --normalize=true --mean=0.485,0.456,0.406 --std=0.229,0.224,0.225

Prints attention per block from masked patches to visible and to masked ones, per key as
in figure 1 of CrossMAE and by mass, and draws it in DIR/attention.png. Of an MAE also
what becomes of its predictions without either: mean squared error and PSNR on masked
patches. Everything that is printed is in DIR/attention.md.

Exit status 2 if the command line is wrong, 1 if weights or images cannot be read.
"""

import argparse
import sys
from pathlib import Path

from crossmae_jax.commands import convert


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crossmae_jax attention", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--to", required=True, help="the folder to write to")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--dir", help="a folder of images")
    images.add_argument("--tfds", help="a TFDS data set in ArrayRecord form")
    parser.add_argument("--data_dir", help="where TFDS sets lie")
    parser.add_argument("--split", help="of the TFDS set; default: validation")
    parser.add_argument("--num_images", type=int, help="default: all")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="to decode images")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument(
        "--mask_ratio", type=float, help="of patches to mask; default: of training"
    )
    convert.add_model(parser)
    return parser


def main(argv: list[str]) -> int:
    """Measures what `argv` describes; `argv` follows `attention`."""
    parser = _parser()
    options = vars(parser.parse_args(argv))
    if options["dir"] is not None and (options["data_dir"] or options["split"]):
        parser.error("--data_dir and --split are of --tfds, and not of --dir.")
    path, to = options.pop("checkpoint"), Path(options.pop("to"))
    directory, name = options.pop("dir"), options.pop("tfds")
    data_dir, split = options.pop("data_dir"), options.pop("split")
    how = {
        name: options.pop(name)
        for name in ("num_images", "batch_size", "workers", "seed", "mask_ratio")
    }
    options = {name: value for name, value in options.items() if value is not None}

    import crossmae_jax
    from crossmae_jax import visualize
    from crossmae_jax.checkpoints import checkpointer
    from crossmae_jax.data import sources
    from crossmae_jax.probing import decoder_analysis

    try:
        model = crossmae_jax.load(path, **options)
        if directory is not None:
            source = sources.FolderSource(directory)
        else:
            source = sources.TfdsSource(
                name, data_dir=data_dir, split=split or "validation"
            )
        to.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        found = decoder_analysis.attention(model, source, **how)
        parts = [found.table()]
        # One self-attention over visible and masked patches, as MAE has it.
        if model.model.decoder.gives_visible and model.model.aggregator is None:
            scores = decoder_analysis.ablations(model, source, **how)
            parts.append(decoder_analysis.table(scores))
        count = min(how["num_images"] or len(source), len(source))
        title = f"{path}: {count} images, {found.num_masked or 'no'} masked keys"
        text = "\n\n".join([f"# Attention of {title}", *parts]) + "\n"
        picture = visualize.attention_magnitudes(
            found, to / "attention.png", title=title
        )
        (to / "attention.md").write_text(text)
    except (ValueError, checkpointer.RestoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{text}\npicture  {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
