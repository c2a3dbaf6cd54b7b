"""LocalMIM, tiny, on 1797 real handwritten digits.

Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", arXiv
2303.05251, at the scale of digits of 32 x 32 pixels: 64 patches, three scales, cells of
half a patch to two patches. Batches are of 32: in 225 steps of 128 images it did not
get beyond what knowing places gives, in 901 of 32, at the cost of fewer, it does.

    python -m crossmae_jax.main --config=configs/digits_local.py \\
        --workdir=runs/digits_local

Published: no paper has this configuration.
Measured by us: see docs/frameworks.md.
"""

from configs import common, digits_cross


def get_config():
    """Returns the experiment."""
    config = digits_cross.get_config()
    config.epochs, config.optim.warmup_epochs = 20.0, 2.0
    config.model = common.local("W64-D4-H4/4")
    config.model.fusion.maps = (0, 1, 3)
    config.model.decoder.update(dim=32, num_heads=4)
    config.model.dtype, config.model.remat = "float32", "none"
    config.masking = common.masking(pred_ratio=0.75)
    config.target = common.hog()
    config.target.cells = (2, 4, 8)
    config.optim.base_lr = 1.6e-2
    config.data.image_size, config.data.batch_size = (32, 32), 32
    return config
