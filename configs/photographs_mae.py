"""MAE, small, on the photographs that come with scikit-image: what its decoder attends
to is looked at in the notebooks. 13 minutes on two CPU cores.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, at a
width of 96; 14 x 14 patches as in the paper.

    python -m crossmae_jax data prepare photographs --data_dir=photographs
    python -m crossmae_jax.main --config=configs/photographs_mae.py \\
        --config.data.dir=photographs/train --config.data.eval_dir=photographs/test \\
        --workdir=runs/photographs_mae

Published: no paper has this configuration.
Measured by us: docs/probing.md.
"""

from configs import common, photographs_cross


def get_config():
    """Returns the experiment."""
    config = photographs_cross.get_config()
    config.model = common.mae(
        "W96-D6-H3/8", decoder_dim=64, decoder_heads=4, decoder_depth=4
    )
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.masking = common.masking(pred_ratio=0.75)
    config.epochs, config.optim.warmup_epochs = 20.0, 1.0
    return config
