"""SimMIM, Swin-L: squares of 32 pixels are masked, a layer predicts their pixels.

Xie et al., arXiv 2111.09886, see configs/swinb_simmim.py; windows of 12 cells.

    python -m crossmae_jax.main --config=configs/swinl_simmim.py \\
        --workdir=runs/swinl_simmim --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 85.4 fine-tuned (the code's page).
Measured by us: nothing yet.
"""

from configs import common, swinb_simmim


def get_config():
    """Returns the experiment."""
    config = swinb_simmim.get_config()
    config.model = common.simmim_swin("L/4", window=12)
    return config
