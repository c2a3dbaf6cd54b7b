"""PR-MIM on MAE, ViT-L/16.

Progressive reconstruction and furthest sampling (PR-MIM, arXiv 2411.15746) on MAE
(arXiv 2111.06377). Half of all patches are thrown: the decoder works on a quarter,
chosen by furthest sampling, and a depth-wise convolution predicts the others. The
learning rate takes no factor of the ratio (table 13).

    python -m crossmae_jax.main --config=configs/vitl_mae_prmim.py \\
        --workdir=runs/vitl_mae_prmim --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 85.4 fine-tuned (arXiv 2411.15746, table 3;
MAE 85.4). At 100 epochs 83.2 (MAE 83.3, plain throwing 82.4).
Measured by us: nothing yet.
"""

from configs import vitl_mae


def get_config():
    """Returns the experiment."""
    config = vitl_mae.get_config()
    config.masking.update(throw_ratio=0.5, retain="furthest")
    config.model.aggregator.kind = "conv"
    config.optim.lr_scale = "none"
    return config
