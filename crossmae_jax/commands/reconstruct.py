"""Draws what a model makes of masked images, from a run or weights of any format.

    python -m crossmae_jax reconstruct --checkpoint=RUN a.jpg b.jpg --to=panel.png
    python -m crossmae_jax reconstruct --checkpoint=mae.pth a.jpg --to=panel.png \\
        --mask_ratios=0.5,0.75,0.9 --seeds=0,1 --mean=0.485,0.456,0.406 \\
        --std=0.229,0.224,0.225 --normalize=true

A row per image, mask ratio and seed: original, masked, prediction, prediction with the
visible patches; of a model that predicts no pixels also what it was to predict. Images
are resized and cropped at the centre. The weights must include the decoder. What a file
does not tell is asked for by name.

Exit status 2 if the command line is wrong, 1 if weights or images cannot be read.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from crossmae_jax import errors
from crossmae_jax.commands import convert, flags, session
from crossmae_jax.commands.flags import Flag

_FLAGS = {
    "to": Flag(Path, "the PNG to write", required=True),
    "mask_ratios": Flag(
        flags.numbers(float), "shares of patches to mask; default: that of training",
        default=(None,),
    ),
    "seeds": Flag(flags.numbers(int), "of masks; default: 0", default=(0,)),
    **convert.MODEL,
}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Writes the panel that `argv` describes; `argv` follows `reconstruct`."""
    given = flags.parse(
        "reconstruct", argv, _FLAGS, doc=__doc__, operands=("IMG...",)
    )
    for name in ("mask_ratios", "seeds"):
        if not getattr(given, name):
            flags.stop(f"--{name} is empty; give one or several, such as 0,1.")

    import jax
    import numpy as np

    import crossmae_jax
    from crossmae_jax import visualize
    from crossmae_jax.evals import reconstruction

    with errors.setting_up():
        if given.to.suffix.lower() != ".png":
            raise ValueError(f"--to={given.to} must end in .png.")
        model = crossmae_jax.load(given.checkpoint, **convert.facts(given))
        images = model.prepare(given.operands)
    drawn = {
        (ratio, seed): model.reconstruct(images, mask_ratio=ratio, seed=seed)
        for ratio, seed in itertools.product(given.mask_ratios, given.seeds)
    }
    rows, names = [], []
    for number, path in enumerate(given.operands):
        for (_, seed), pictures in drawn.items():
            row = jax.tree.map(lambda array: array[[number]], pictures)
            masked = f"{100 * row.mask.mean():.0f} % masked, seed {seed}"
            rows.append(row)
            names.append(f"{Path(path).name}\n{masked}")
            ratio = reconstruction.psnr(row)
            score = f"mean squared error {row.error[row.mask].mean():.4f}"
            if ratio is not None:
                score = f"PSNR {ratio[0]:.2f} dB"
            print(f"{path}: {masked}: {score}")
    with errors.using_files():
        written = visualize.reconstruction_panel(
            jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows), given.to,
            caption=model.caption, names=names,
        )
    print(f"{written}\n{model.caption}")
