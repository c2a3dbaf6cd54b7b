"""configs/folder_cross.py for images in class folders, watched with a k-NN classifier.

Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391.
Labels are used to evaluate, never to train.

    python -m crossmae_jax.main --config=configs/folder_cross_knn.py \\
        --workdir=runs/mine --config.data.dir=TRAIN --config.data.eval_dir=TEST

Published: no paper has this configuration.
Measured by us: nothing yet.
"""

from configs import common, folder_cross


def get_config():
    """Returns the experiment."""
    config = folder_cross.get_config()
    config.evals.update(common.knn(every_epochs=20.0))
    return config
