"""Arrays to pictures: PNG files, made with matplotlib, which nothing else imports.

Every function takes arrays and a path, and returns the path.
"""

from crossmae_jax.visualize.curves import accuracy_by_blocks, loss_curve
from crossmae_jax.visualize.inside import (
    attention_magnitudes,
    attention_of_patch,
    inter_block_weights,
    likeness,
    picture_grid,
    spread_of,
    values_over,
)
from crossmae_jax.visualize.panels import (
    Reconstruction,
    TokenIds,
    oriented_gradients,
    reconstruction_panel,
    sampling_panel,
)

__all__ = [
    "Reconstruction",
    "TokenIds",
    "accuracy_by_blocks",
    "attention_magnitudes",
    "attention_of_patch",
    "inter_block_weights",
    "likeness",
    "loss_curve",
    "oriented_gradients",
    "values_over",
    "picture_grid",
    "reconstruction_panel",
    "sampling_panel",
    "spread_of",
]
