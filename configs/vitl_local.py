"""LocalMIM, ViT-L/16: four blocks predict oriented gradients at four scales.

Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", arXiv
2303.05251, with twice as many orientations as configs/vitb_local.py. The released code
adds numbers to the gradients that are drawn and never trained; here only with
--config.target.bias=True.

    python -m crossmae_jax.main --config=configs/vitl_local.py \\
        --workdir=runs/vitl_local --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 85.8 fine-tuned (the paper).
Measured by us: nothing yet.
"""

from configs import common, vitb_local


def get_config():
    """Returns the experiment."""
    config = vitb_local.get_config()
    config.epochs = 800.0
    config.model = common.local("L/16")
    config.target = common.hog(bins=18)
    config.optim.base_lr = 1.5e-4
    config.data.batch_size = 4096
    return config
