"""Writes the weights that the notebooks come with, in half precision.

    python notebooks/ship_weights.py runs/photographs_cross runs/photographs_mae

makes notebooks/models/photographs_cross.safetensors and photographs_mae.safetensors of
runs of these configurations. Halved, the files are small enough for a repository; what
the models predict changes in the third digit.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from crossmae_jax.convert import exporting, opening

MODELS = Path(__file__).parent / "models"


def main(runs: list[str]) -> None:
    """Writes a file for each run, named as its directory is."""
    MODELS.mkdir(exist_ok=True)
    for run in map(Path, runs):
        weights = opening.open_weights(run)
        halved = {
            name: tensor.then(lambda values: values.astype(np.float16))
            for name, tensor in weights.tensors.items()
        }
        path = MODELS / f"{run.name}.safetensors"
        card = dataclasses.replace(weights.card, origin=f"configs/{run.name}.py")
        exporting.write_safetensors(
            dataclasses.replace(weights, tensors=halved, card=card), path
        )
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
