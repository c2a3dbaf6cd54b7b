"""Objectives: what a batch is trained on. The train loop knows these functions only:

    init(key) -> variables
    loss(variables, batch, key) -> (scalar, dict of scalars to log)
    predict(variables, batch) -> dict with "features" [b d]
    reconstruct(variables, batch, key) -> pictures, masks and errors
"""

from crossmae_jax.objectives.pretrain import Pretrain

OBJECTIVES = {"pretrain": Pretrain}
