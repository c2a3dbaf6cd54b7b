"""GreenMIM, Swin-L: only visible squares are in the encoder, one mask for many images.

Huang et al., arXiv 2205.13515, see configs/swinb_green.py; windows of 14 cells, 256
images of a device share a mask.

    python -m crossmae_jax.main --config=configs/swinl_green.py \\
        --workdir=runs/swinl_green --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 85.1 fine-tuned (the code's page).
Measured by us: nothing yet.
"""

from configs import common, swinb_green


def get_config():
    """Returns the experiment."""
    config = swinb_green.get_config()
    config.epochs = 800.0
    config.model = common.green("L/4", window=14)
    config.masking.together = 256
    config.optim.base_lr = 1e-4
    config.data.batch_size = 2048
    return config
