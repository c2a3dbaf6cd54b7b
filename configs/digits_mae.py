"""MAE, tiny, on 1797 real handwritten digits: two minutes on two CPU cores.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, at the
scale of configs/digits_cross.py, from which it differs in the model alone.

    python -m crossmae_jax.main --config=configs/digits_mae.py --workdir=runs/digits_mae

Published: no paper has this configuration.
Measured by us: nothing yet.
"""

from configs import common, digits_cross


def get_config():
    """Returns the experiment."""
    config = digits_cross.get_config()
    config.model = common.mae(
        "W64-D4-H4/2", decoder_dim=64, decoder_heads=4, decoder_depth=2
    )
    config.model.dtype = "float32"
    config.masking.pred_ratio = config.masking.mask_ratio
    return config
