"""PR-MIM on MFF, ViT-B/16: MAE on a mixture of six blocks, half of all patches thrown.

Progressive reconstruction and furthest sampling (PR-MIM, arXiv 2411.15746) on
configs/vitb_mff.py (MFF, arXiv 2308.00261), whose fusion they leave as it is. How many
patches were thrown in the published rows could not be established: here it is half, as
on MAE. The learning rate takes no factor of the ratio (table 13).

    python -m crossmae_jax.main --config=configs/vitb_mff_prmim.py \\
        --workdir=runs/vitb_mff_prmim --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 83.8 fine-tuned, 83.3 with plain throwing
(--config.model.aggregator.kind=none), 83.6 without (arXiv 2411.15746, table 4).
Measured by us: nothing yet.
"""

from configs import vitb_mff


def get_config():
    """Returns the experiment."""
    config = vitb_mff.get_config()
    config.masking.update(throw_ratio=0.5, retain="furthest")
    config.model.aggregator.kind = "conv"
    config.optim.lr_scale = "none"
    return config
