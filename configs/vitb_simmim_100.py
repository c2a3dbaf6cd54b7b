"""SimMIM, ViT-B/16, the recipe of 100 epochs.

Xie et al., arXiv 2111.09886, see configs/vitb_simmim.py. The published code has this
recipe for Swin-B at 192 pixels; of ViT-B the baseline of PR-MIM (arXiv 2411.15746) has
100 epochs, and no settings of it are published. The reference's cosine begins at epoch
0 and not behind the warm-up.

    python -m crossmae_jax.main --config=configs/vitb_simmim_100.py \\
        --workdir=runs/vitb_simmim_100 --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 81.6 fine-tuned (arXiv 2411.15746, table 4).
Measured by us: nothing yet.
"""

from configs import vitb_simmim


def get_config():
    """Returns the experiment."""
    config = vitb_simmim.get_config()
    config.epochs = 100.0
    config.optim.update(
        base_lr=2e-4, warmup_lr=4e-6, schedule="cosine", drop_epochs=(), min_lr=4e-5
    )
    return config
