"""Objectives: what a batch is trained on. The train loop knows these functions only:

    init(key) -> variables
    loss(variables, batch, key) -> (scalar, dict of scalars to log)
                                     under "batch_stats" what replaces that collection
    predict(variables, batch) -> dict with "features" and "class_token" [b d], and
        "logits" of a classifier
    reconstruct(variables, batch, key) -> pictures, masks and errors; if it can
"""

from crossmae_jax.objectives.classify import Classify
from crossmae_jax.objectives.pretrain import Pretrain

OBJECTIVES = {"classify": Classify, "pretrain": Pretrain}
