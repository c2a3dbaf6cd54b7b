"""Draws what a model makes of masked images, from a run or weights of any format.

    python -m crossmae_jax reconstruct --checkpoint=RUN a.jpg b.jpg --to=panel.png
    python -m crossmae_jax reconstruct --checkpoint=mae.pth a.jpg --to=panel.png \\
        --mask_ratios=0.5,0.75,0.9 --seeds=0,1 --mean=0.485,0.456,0.406 \\
        --std=0.229,0.224,0.225 --normalize=true

A row per image, mask ratio and seed: original, masked, prediction, prediction with the
visible patches. Images are resized and cropped at the centre. The weights must include
the decoder. What a file does not tell is asked for by name.

Exit status 2 if the command line is wrong, 1 if weights or images cannot be read.
"""

import argparse
import itertools
import sys
from pathlib import Path

from crossmae_jax.commands import convert


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crossmae_jax reconstruct", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("images", metavar="IMG", nargs="+", help="image files")
    parser.add_argument("--to", required=True, help="the PNG to write")
    parser.add_argument(
        "--mask_ratios", type=convert.numbers(float), default=(None,),
        help="shares of patches to mask; default: that of training",
    )
    parser.add_argument(
        "--seeds", type=convert.numbers(int), default=(0,), help="of masks; default: 0"
    )
    convert.add_model(parser)
    return parser


def main(argv: list[str]) -> int:
    """Writes the panel that `argv` describes; `argv` follows `reconstruct`."""
    parser = _parser()
    options = vars(parser.parse_args(argv))
    for name in ("mask_ratios", "seeds"):
        if not options[name]:
            parser.error(f"--{name} is empty; give one or several, such as 0,1.")
    images, to = options.pop("images"), Path(options.pop("to"))
    ratios, seeds = options.pop("mask_ratios"), options.pop("seeds")
    checkpoint_path = options.pop("checkpoint")
    options = {name: value for name, value in options.items() if value is not None}

    import numpy as np

    import crossmae_jax
    from crossmae_jax import visualize
    from crossmae_jax.checkpoints import checkpointer
    from crossmae_jax.evals import reconstruction

    try:
        if to.suffix.lower() != ".png":
            raise ValueError(f"--to={to} must end in .png.")
        model = crossmae_jax.load(checkpoint_path, **options)
        drawn = {
            (ratio, seed): model.reconstruct(images, mask_ratio=ratio, seed=seed)
            for ratio, seed in itertools.product(ratios, seeds)
        }
        rows, names = [], []
        for number, path in enumerate(images):
            for (_, seed), pictures in drawn.items():
                one = type(pictures)(*(array[[number]] for array in pictures))
                masked = f"{100 * one.mask.mean():.0f} % masked, seed {seed}"
                rows.append(one)
                names.append(f"{Path(path).name}\n{masked}")
                print(f"{path}: {masked}: PSNR {reconstruction.psnr(one)[0]:.2f} dB")
        caption = visualize.caption(normalize=model.card.normalize)
        written = visualize.reconstruction_panel(
            type(one)(*(np.concatenate(arrays) for arrays in zip(*rows))), to,
            caption=caption, names=names,
        )
    except (ValueError, checkpointer.RestoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{written}\n{caption}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
