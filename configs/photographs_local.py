"""LocalMIM, small, on the photographs that come with scikit-image.

Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", arXiv
2303.05251, on images of 64 x 64 pixels: 64 patches of 8, and cells of 4, 8 and 16.

    python -m crossmae_jax data prepare photographs --data_dir=photographs
    python -m crossmae_jax.main --config=configs/photographs_local.py \\
        --config.data.dir=photographs/train --config.data.eval_dir=photographs/test \\
        --workdir=runs/photographs_local

Published: no paper has this configuration.
Measured by us: docs/frameworks.md.
"""

from configs import common, photographs_cross


def get_config():
    """Returns the experiment."""
    config = photographs_cross.get_config()
    config.epochs, config.optim.warmup_epochs = 12.0, 1.0
    config.model = common.local("W64-D4-H4/8")
    config.model.fusion.maps = (0, 1, 3)
    config.model.decoder.update(dim=32, num_heads=4)
    config.model.dtype, config.model.remat = "float32", "none"
    config.masking = common.masking(pred_ratio=0.75)
    config.target = common.hog()
    config.target.cells = (4, 8, 16)
    config.optim.base_lr = 1.6e-2
    config.data.image_size, config.data.batch_size = (64, 64), 32
    config.checkpoint.every_epochs = 12.0
    config.evals.reconstruction.every_epochs = 0.0
    return config
